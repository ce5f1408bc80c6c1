"""Pre-training: from a corpus and a configuration to a run folder. Reads from top to bottom.

    RUN/config.json  environment.json  metrics.jsonl  tensorboard/  checkpoints/  model/  report.html

``metrics.jsonl`` holds one line per ``log_every`` steps and one per validation. Everything random is a function of
(seed, step, row), so a run that was killed and resumed writes the same lines, times and rates excepted.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbeta import checkpoint, compilation
from dbeta.config import Config
from dbeta.data.batch import Batch, BatchMaker
from dbeta.data.corpus import Corpus
from dbeta.data.inputs import load_inputs
from dbeta.data.loader import RawBatch, make_loader
from dbeta.losses import Losses, pretraining_losses
from dbeta.models.card import about_run
from dbeta.models.dbeta import DBeta
from dbeta.models.pretrained import load_text_weights
from dbeta.optim import learning_rate, make_optimizer, set_learning_rate
from dbeta.report import RunLog, write_report
from dbeta.runtime import announce, autocast, environment, prepare_process, resolve_device
from dbeta.validation import Validator

# A run can be resumed with other values of these; any other change would make it a different run.
RESUMABLE = {"train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints"}


class Stepper:
    """Model, optimiser and counters of a run, and the step itself."""

    def __init__(self, model: DBeta, config: Config, device: torch.device):
        self.model, self.config, self.device = model, config, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config.optim)
        self.losses = compilation.compiled(pretraining_losses, config.runtime, device)
        # Under CUDA graphs a gradient lies where the next micro-batch writes: they add up in tensors that stay.
        self.keep_gradients = config.train.accumulate > 1 and compilation.uses_graphs(config.runtime, device)
        for parameter in self.parameters if self.keep_gradients else ():
            parameter.grad = torch.zeros_like(parameter)
        self.sums: dict[str, Tensor] = {}  # since the last log line, on the device
        self.counted = 0  # steps in these sums
        self.skipped = torch.zeros(2, device=device)  # [all, in a row right now]

    def step(self, batches: list[Batch]) -> None:
        """One update from the micro-batches of one global batch; reads nothing back from the device."""
        for batch in batches:
            with autocast(self.config.runtime, self.device):
                losses = self.losses(self.model, batch, self.config.loss)  # total = MLM + MEM + ETM + ETS
            (losses.total / len(batches)).backward()
            self._count(losses, 1 / len(batches))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = (~norm.isfinite()).float()
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip, norm)
        self.optimizer.found_inf = bad  # the fused kernel leaves weights and moments alone where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.skipped = torch.stack((self.skipped[0] + bad, (self.skipped[1] + bad) * bad))
        self._add("grad_norm", norm)
        self.counted += 1

    def _count(self, losses: Losses, weight: float) -> None:
        for field in dataclasses.fields(losses):
            self._add(field.name, getattr(losses, field.name).detach() * weight)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of a log window that is still open; float32 goes through JSON unchanged."""
        sums = {name: value.item() for name, value in self.sums.items()}
        return {"sums": sums, "counted": self.counted, "skipped": self.skipped.tolist()}

    def restore(self, counters: dict[str, Any]) -> None:
        """Continue from ``counters``."""
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in counters["sums"].items()}
        self.counted = counters["counted"]
        self.skipped = torch.tensor(counters["skipped"], device=self.device)

    def drain(self) -> dict[str, float]:
        """Means over the steps since the last call; the one place where the host waits for the device.

        Raises:
            ArithmeticError: the last ``optim.max_nonfinite`` steps were all skipped.
        """
        names = list(self.sums)
        values = torch.stack([self.sums[name].double() for name in names]).tolist()
        total, row = self.skipped.tolist()
        if row >= self.config.optim.max_nonfinite:
            raise ArithmeticError(
                f"the gradient was not finite for {int(row)} steps in a row (optim.max_nonfinite); the weights are "
                "those before them. Lower optim.lr, or set optim.clip=1"
            )
        means = {name: value / self.counted for name, value in zip(names, values)}
        means["etm_accuracy"] = means.pop("etm_correct") * self.config.train.accumulate / self.config.train.batch
        means["mlm_accuracy"] = means.pop("mlm_correct") / max(means.pop("mlm_count"), 1.0)
        self.sums, self.counted = {}, 0
        return means | {"skipped": total}


def train(
    config: Config, corpus: Corpus, out: Path, *, resume: bool = False, show_examples: bool = False
) -> dict[str, Any]:
    """Pre-train on ``corpus`` and write the run folder ``out``; returns the last metrics.

    Raises:
        ValueError: the corpus or the run folder does not fit the configuration.
        ArithmeticError: training diverged (a run of non-finite steps).
    """
    # --- where, and what ---------------------------------------------------------------------------------------------
    device = resolve_device(config.runtime.device)
    prepare_process(config.runtime)
    restored = _open_run(out, config, resume)
    torch.manual_seed(config.train.seed)
    host_maker, tokenizer = load_inputs(corpus, config)
    maker = host_maker.to(device)
    model = DBeta(
        config.model, config.runtime, tokenizer=tokenizer, report_cleaning=corpus.info.get("cleaning", "paper")
    )
    if not restored:
        load_text_weights(model, config.model.text_weights)
    model.to(device)
    stepper = Stepper(model, config, device)
    validator = Validator(model, corpus, host_maker, maker, config, device)
    loader = make_loader(
        corpus, split="train", batch=config.train.batch, seed=config.train.seed,
        engine=config.data.engine, workers=config.data.workers, device=device.type,
    )  # fmt: skip
    log = RunLog(out, config.train.steps)
    first, best = 0, {"score": float("-inf"), "step": 0}
    if restored:
        state = checkpoint.load(restored, model, stepper.optimizer)
        first, best = state["step"], state["best"]
        stepper.restore(state["counters"])
        loader.load_state_dict(state["loader"])
        announce(f"resumed {out} at step {first} of {config.train.steps}")
    log.truncate(first)

    # --- the loop ----------------------------------------------------------------------------------------------------
    started, begun = time.perf_counter(), first
    with log.progress(first) as progress:
        for done, batches, position in _batches(loader, host_maker, maker, config, device, first):
            torch.manual_seed(config.train.seed * 1_000_003 + done)  # dropout depends on the step alone
            rate = learning_rate(done, config.train.steps, config.optim)
            set_learning_rate(stepper.optimizer, rate)
            stepper.step(batches)
            done += 1
            progress(done)
            last = done == config.train.steps
            if done % config.train.log_every == 0 or last:
                records_per_s = (done - begun) * config.train.batch / (time.perf_counter() - started)
                log.train(done, stepper.drain() | {"lr": rate}, records_per_s)
                started, begun = time.perf_counter(), done
            if done % config.train.eval_every == 0 or last:
                metrics = validator()
                log.validation(done, metrics)
                if metrics["score"] > best["score"]:
                    best = {"score": metrics["score"], "step": done}
                    model.about = about_run(config, corpus, done, metrics)
                    model.save_pretrained(out / "model")
                started, begun = time.perf_counter(), done
            if done % config.train.checkpoint_every == 0 or last:
                state = {"loader": position, "best": best, "counters": stepper.counters(), "config": config.to_dict()}
                checkpoint.save(
                    out / "checkpoints", done, model, stepper.optimizer, state, config.train.keep_checkpoints
                )
    loader.close()
    if compiled := compilation.report():
        announce(compiled)
    return write_report(out, config, log, validator, show_examples=show_examples)


def _batches(
    loader: Any, host: BatchMaker, maker: BatchMaker, config: Config, device: torch.device, first: int
) -> Iterator[tuple[int, list[Batch], dict[str, Any]]]:
    """(completed steps, micro-batches on the device, loader state after them), up to ``train.steps``.

    The text shape comes from the host's own repetition of the draw, so making a batch never waits for the device.
    """
    bucketed = config.runtime.compile or device.type == "cuda"
    rows = torch.arange(config.train.batch).chunk(config.train.accumulate)
    for step in range(first, config.train.steps):
        raw: RawBatch = next(loader)
        batches = []
        for chunk in rows:
            part = raw.rows(slice(int(chunk[0]), int(chunk[-1]) + 1))
            shape = host.shape(part.records, step, chunk, bucketed=bucketed)
            batches.append(maker.make(part.to(device), step, chunk.to(device, non_blocking=True), shape))
        yield step, batches, loader.state_dict()


def _open_run(out: Path, config: Config, resume: bool) -> Path | None:
    """Make or check the run folder; the checkpoint to go on from, if any."""
    folder = out / "checkpoints"
    if not resume:
        if folder.is_dir() and checkpoint.whole(folder):
            raise ValueError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(config.to_json())
            (out / "environment.json").write_text(json.dumps(environment(), indent=2))
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from None
        return None
    stored = out / "config.json"
    if not stored.is_file():
        raise ValueError(f"--resume: {out} holds no run (no config.json); leave --resume out to start one")
    changed = _differences(json.loads(stored.read_text()), config.to_dict())
    if changed:
        raise ValueError(f"--resume: {out} was started with another {', '.join(changed)}; use the same values")
    return checkpoint.latest(folder)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose change would make a resumed run a different one."""
    sections = ("data", "model", "loss", "optim", "train")
    keys = [f"{section}.{key}" for section in sections for key in new[section]]
    return [k for k in keys if k not in RESUMABLE and _get(old, k) != _get(new, k)]


def _get(values: dict[str, Any], dotted: str) -> Any:
    section, key = dotted.split(".")
    return values.get(section, {}).get(key)
