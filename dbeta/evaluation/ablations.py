"""The ablations of Tables 6, 7, 8, 12 and 13: a few settings each, run like the default."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dbeta.evaluation import results
from dbeta.evaluation.paper import ABLATIONS, SIX, ZERO_SHOT_ABLATIONS
from dbeta.evaluation.results import METRICS

CASES = ("fine-tuning", "linear probe 1 %", "zero-shot by names")  # over five lead sets, six data sets, six data sets

ENCODERS = {
    "medcpt": "ncbi/MedCPT-Query-Encoder",
    "deberta": "microsoft/deberta-base",
    "bert": "google-bert/bert-base-uncased",
}


def _text(name: str) -> tuple[str, ...]:
    """Another text encoder with its own weights and tokenizer."""
    return tuple(f"{key}={name}" for key in ("model.text_encoder", "model.text_weights", "data.tokenizer"))


WITHOUT_N3S, WITHOUT_ETS = ("data.negatives=random",), ("loss.ets=0",)
GRID: dict[str, tuple[str, ...]] = {
    "default": (),
    "without-n3s": WITHOUT_N3S,
    "without-n3s-ets": (*WITHOUT_N3S, *WITHOUT_ETS),
    "without-n3s-ets-t5": (*WITHOUT_N3S, *WITHOUT_ETS, *_text(ENCODERS["bert"])),
    **{f"text-{short}": _text(name) for short, name in ENCODERS.items()},
    "ecg-layers-4": ("model.ecg_layers=4",),
    "ecg-layers-1": ("model.ecg_layers=1",),
    "without-etm": ("loss.etm=0",),
    "without-mlm-mem": ("loss.mlm=0", "loss.mem=0"),
}


def commands(
    preset: str, corpus: str, data: str, out: Path, *, scoring: str | None = None, **folders: str | None
) -> Iterator[str]:
    """Shell lines that pre-train and evaluate the whole grid, with the paper's figures, and ours so far, as comments.

    Args:
        preset: of pre-training.
        corpus: the pre-training corpus.
        data: the folder of evaluation corpora.
        out: below which the runs go.
        scoring: folder of the challenge's weights.
        folders: ``splits``, the folder of the published splits, and ``patients``, PTB-XL's table.
    """
    given = "".join(_words(f"--{name}", path) for name, path in folders.items() if path)
    for name, settings in GRID.items():
        yield f"# {name}: {_paper(name)}"
        if ours := _ours(name, out / name / "evaluation"):
            yield f"#   {ours}"
        run, chosen = out / name, "".join(f" --set {setting}" for setting in settings)
        yield f"dbeta-pretrain --preset {preset}{_words('--data', corpus)}{_words('--out', run)}{chosen}"
        prompts = "descriptions" if name in ZERO_SHOT_ABLATIONS else "names"  # Tables 6-8 use category names
        more = {"zero-shot": f" --prompts {prompts}"}
        if name not in ZERO_SHOT_ABLATIONS:
            more |= {"linear-probe": " --fraction 0.01", "finetune": " --sets cinc2021"}
            more["finetune"] += _words("--scoring", scoring) if scoring else ""
        for task, options in more.items():
            yield f"dbeta evaluate {task}{_words(run)}{_words('--data', data)}{given}{options}"


def _words(*words: object) -> str:
    return "".join(f" {shlex.quote(str(word))}" for word in words)


def _paper(name: str) -> str:
    if name in ZERO_SHOT_ABLATIONS:
        return "paper, zero-shot: " + _listed(ZERO_SHOT_ABLATIONS[name])
    return "paper: " + _spread(dict(zip(CASES, ABLATIONS[name])))


def _ours(name: str, evaluated: Path) -> str:
    """What a run's results say so far, as the tables of the paper sum them up: mean and sample spread over cases."""
    _, rows = results.read(evaluated)
    values = {(r.task, r.prompts, r.dataset, r.leads, r.fraction): r.value for r in rows if r.seed is None and r.value}
    if name in ZERO_SHOT_ABLATIONS:
        found = {key: values.get(("zero-shot", "descriptions", key, "12", None)) for key in ZERO_SHOT_ABLATIONS[name]}
        known = {key: round(100 * value, 1) for key, value in found.items() if value}
        return "ours, zero-shot: " + _listed(known) if known else ""
    tuned = [r.value for r in rows if r.task == "finetune" and r.metric == METRICS["finetune"]]
    probed = [values.get(("linear-probe", "", key, "12", 0.01)) for key in SIX]
    named = [values.get(("zero-shot", "names", key, "12", None)) for key in SIX]
    cells = {}
    for case, found, wanted in zip(CASES, (tuned, probed, named), (5, 6, 6)):
        whole = np.array([100 * value for value in found if value is not None])
        cells[case] = (whole.mean().round(2), whole.std(ddof=1).round(2)) if len(whole) == wanted else None
    return "ours: " + _spread(cells) if any(cells.values()) else ""


def _spread(cells: dict[str, tuple[float, float] | None]) -> str:
    return ", ".join(f"{case} {cell[0]} +- {cell[1]}" for case, cell in cells.items() if cell)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
