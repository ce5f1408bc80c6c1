"""What a run writes for people: metrics.jsonl, TensorBoard, the progress bar, the summary table and report.html."""

import base64
import contextlib
import html
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dbeta import compilation
from dbeta.config import Config
from dbeta.files import write_whole

LOSSES = ("mlm", "mem", "etm", "ets")
console = Console()


class RunLog:
    """The metrics of one run: appended line by line, so that a killed run loses nothing it had logged.

    Steps that were skipped go to ``nonfinite.jsonl``, with the record ids of their batch. A log that is not ``active``
    (another rank keeps it) writes and says nothing.
    """

    def __init__(self, out: Path, steps: int, *, active: bool = True):
        self.path, self.steps, self.active = out / "metrics.jsonl", steps, active
        self.status = ""
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out / "tensorboard")

    @property
    def skipped(self) -> Path:
        """Where skipped steps are listed."""
        return self.path.with_name("nonfinite.jsonl")

    def truncate(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run writes those lines again."""
        for path in (self.path, self.skipped) if self.active else ():
            if path.is_file():
                kept = [line for line in path.read_text(errors="replace").splitlines() if _step(line) <= step]
                write_whole(path, "".join(line + "\n" for line in kept))

    def train(self, step: int, metrics: dict[str, float], records_per_s: float) -> None:
        """One line for the window of steps that ends at ``step``."""
        self._write({"step": step, "kind": "train", **metrics, "records_per_s": records_per_s})
        self.status = f"loss {metrics['total']:.3f}  {records_per_s:,.0f} records/s"

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """One line for a validation, also shown where output is not a terminal."""
        self._write({"step": step, "kind": "validation", **metrics})
        if not self.active:
            return
        shown = {k: metrics[k] for k in ("total", "etm_accuracy", "recall_at_1", "zero_shot_auc") if k in metrics}
        console.print(f"step {step:>7,}  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))

    def nonfinite(self, step: int, records: list[int]) -> None:
        """One line for a step that was skipped."""
        if self.active:
            _append(self.skipped, {"step": step, "kind": "nonfinite", "records": records})

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """All lines of one kind, in order."""
        lines = (json.loads(line) for line in self.path.read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    @contextlib.contextmanager
    def progress(self, first: int) -> Iterator[Callable[[int], None]]:
        """A bar with the latest loss and records/s; silent where output is not a terminal."""
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, disable=not (self.active and console.is_terminal)) as bar:
            task = bar.add_task("", total=self.steps, completed=first)
            yield lambda done: bar.update(task, completed=done, description=self.status)
        if self.active:
            self.board.close()

    def _write(self, line: dict[str, Any]) -> None:
        if not self.active:
            return
        _append(self.path, line)
        for name, value in line.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{line['kind']}/{name}", value, line["step"])


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}; free some space and use --resume") from error


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the line that was being written when the run was killed
        return float("inf")


def summary(last: dict[str, Any], out: Path) -> Table:
    """The table a run ends with."""
    table = Table(title=f"{out}: validation at step {last['step']:,}", show_header=False)
    for name in (
        "total",
        *LOSSES,
        "etm_accuracy",
        "mlm_accuracy",
        "recall_at_1",
        "recall_at_5",
        "recall_at_10",
        "zero_shot_auc",
    ):
        if name in last:
            table.add_row(name.replace("_", " "), f"{last[name]:.4f}")
    return table


def write_report(out: Path, config: Config, log: RunLog, validator: Any, *, show_examples: bool) -> dict[str, Any]:
    """Write ``report.html`` (one file, no scripts, no network) and print the summary; returns the last validation."""
    training, checks = log.lines("train"), log.lines("validation")
    last = checks[-1]
    parts = [_curves(training, checks)]
    if validator.per_class:
        rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{v:.3f}</td></tr>" for n, v in validator.per_class.items())
        parts.append(f"<h2>Zero-shot AUC by class</h2><table>{rows}</table>")
    if show_examples or validator.corpus.source == "synthetic":  # a real record may be credentialed
        parts.append("<h2>A record and its reconstruction</h2>" + _reconstruction(validator))
    numbers = "".join(
        f"<tr><td>{k.replace('_', ' ')}</td><td>{v:.4f}</td></tr>" for k, v in last.items() if isinstance(v, float)
    )
    page = _PAGE.format(
        title=html.escape(str(out)), preset=html.escape(config.preset), step=last["step"], numbers=numbers,
        parts="".join(parts), config=html.escape(config.to_json()),
    )  # fmt: skip
    write_whole(out / "report.html", page)
    console.print(summary(last, out))
    console.print(f"report: {out / 'report.html'}")
    return last


def _curves(training: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(2, 4).flat
    for axis, name in zip(panels, ("total", *LOSSES, "etm_accuracy", "recall_at_10", "zero_shot_auc")):
        for lines, label, style in ((training, "training", "-"), (checks, "validation", "o-")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    return "<h2>Curves</h2>" + _image(figure)


def _reconstruction(validator: Any) -> str:
    from dbeta.evaluation.figures import draw_ecg

    raw, batch = validator.first_batch()
    whole = validator.whole_ecg(raw)
    config = validator.config
    with compilation.uncompiled(config.runtime):
        rebuilt = reconstruct(validator.model, batch, whole)
    hidden = (
        f"Reconstructed: {config.model.mask_ratio:.0%} of the patches and {1 - config.data.lead_keep_probability:.0%} "
    )
    pairs = (("Original", whole), (hidden + "of the leads, on average, were hidden", rebuilt))
    return "".join(f"<h3>{title}</h3>" + _image(draw_ecg(ecg[0].cpu().numpy())) for title, ecg in pairs)


@torch.no_grad()
def reconstruct(model: Any, batch: Any, ecg: torch.Tensor) -> torch.Tensor:
    """The ECG with its masked patches replaced by the MEM decoder's prediction, float32 [B,12,L] in mV."""
    from dbeta.models.inference import place_patches

    model.eval()
    out = model(batch.ecg, batch.text_ids, batch.text_mask, noise=batch.noise, mlm_positions=batch.mlm_positions)
    model.train()
    return place_patches(ecg, out.mem_prediction.float(), out.mem_patches, batch.mean, batch.rstd)


def _image(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}}
img{{max-width:100%}}table{{border-collapse:collapse}}td{{padding:.15rem .8rem .15rem 0;border-bottom:1px solid #eee}}
td+td{{text-align:right;font-variant-numeric:tabular-nums}}pre{{background:#f6f6f6;padding:1rem;overflow:auto}}</style>
<h1>{title}</h1><p>Preset {preset}, step {step:,}.</p><h2>Validation</h2><table>{numbers}</table>{parts}
<details><summary>Configuration</summary><pre>{config}</pre></details></html>
"""
