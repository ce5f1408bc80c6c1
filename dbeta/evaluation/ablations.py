"""The ablations of Tables 6, 7, 8, 12 and 13: a few settings each, run like the default."""

from collections.abc import Iterator
from pathlib import Path

from dbeta.evaluation.paper import ABLATIONS, ZERO_SHOT_ABLATIONS

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


def commands(preset: str, corpus: str, data: str, out: Path) -> Iterator[str]:
    """Shell lines that pre-train and evaluate the whole grid, with the paper's figures as comments.

    Args:
        preset: of pre-training.
        corpus: the pre-training corpus.
        data: the folder of evaluation corpora.
        out: below which the runs go.
    """
    for name, settings in GRID.items():
        yield f"# {name}: {_paper(name)}"
        chosen = "".join(f" --set {setting}" for setting in settings)
        yield f"dbeta-pretrain --preset {preset} --data {corpus} --out {out / name}{chosen}"
        prompts = "descriptions" if name in ZERO_SHOT_ABLATIONS else "names"  # Tables 6-8 use category names
        tasks = ("zero-shot",) if name in ZERO_SHOT_ABLATIONS else ("zero-shot", "linear-probe", "finetune")
        for task in tasks:
            more = {"zero-shot": f" --prompts {prompts}", "linear-probe": " --fraction 0.01", "finetune": ""}[task]
            yield f"dbeta evaluate {task} {out / name} --data {data} --out {out / name / 'evaluation'}{more}"


def _paper(name: str) -> str:
    if name in ZERO_SHOT_ABLATIONS:
        return "paper, zero-shot: " + ", ".join(f"{key} {value}" for key, value in ZERO_SHOT_ABLATIONS[name].items())
    cells = zip(("fine-tuning", "linear probe 1 %", "zero-shot by names"), ABLATIONS[name])
    return "paper: " + ", ".join(f"{what} {cell[0]} +- {cell[1]}" for what, cell in cells if cell)
