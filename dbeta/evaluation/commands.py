"""``dbeta evaluate``: the options of each task, and one call out. ``cli`` registers it; nothing heavy is imported."""

from pathlib import Path
from typing import Any

import click

from dbeta.one_line import PathType

PATH = PathType()
LEADS = ("12", "P-6", "P-3", "P-2", "P-1")  # signals.LEAD_SETS, without its imports
DATA = "A corpus, or a folder of corpora (may be repeated)."
SPLITS = "Folder of the published split files; without it, a set's own folds or a split by patient."
SCORING = "Folder with the challenge's weights.csv; cinc2021 needs it."
OPTIONS = {
    "data": click.option("--data", type=PATH, multiple=True, required=True, metavar="CORPUS_OR_DIR", help=DATA),
    "out": click.option(
        "--out", type=PATH, help="Results and caches; what is there is not done again.  [default: MODEL/evaluation]"
    ),
    "splits": click.option("--splits", type=PATH, metavar="DIR", help=SPLITS),
    "derive": click.option(
        "--derive", is_flag=True, help="Split by patient anew: for a corpus that the model was not pre-trained on."
    ),
    "sets": click.option(
        "--sets", multiple=True, metavar="SET", help="Only this label set, such as ptbxl-form (may be repeated)."
    ),
    "labels": click.option(
        "--labels", type=click.Choice(["merl", "clean"]), default="merl",
        help="Of CSN: as published, made by substring, or whole diagnoses.",
    ),
    "prompts": click.option(
        "--prompts", default="descriptions", metavar="descriptions|names|FILE",
        help="What stands for a class: our description, its bare name, or a JSON file {label: text}.",
    ),
    "annotations": click.option(
        "--annotations", type=PATH, metavar="DIR", help="CODE-test's annotations: adds Table 5's human readers."
    ),
    "leads": click.option(
        "--leads", type=click.Choice(LEADS), multiple=True,
        help="Lead set (may be repeated).  [default: 12; fine-tuning and identification: all five]",
    ),
    "fractions": click.option(
        "--fraction", "fractions", type=click.FloatRange(0, 1, min_open=True), multiple=True,
        help="Share of the training records (may be repeated).  [default: 0.01, 0.1, 1]",
    ),
    "seeds": click.option(
        "--seed", "seeds", type=int, multiple=True,
        help="May be repeated; fine-tuning and identification take the first.  [default: 42, 43, 44]",
    ),
    "seed": click.option(
        "--seed", "seeds", type=int, multiple=True, help="Of the training; of several, the first.  [default: 42]"
    ),
    "epochs": click.option("--epochs", type=click.IntRange(1), help="Of training.  [default: the paper's]"),
    "lr": click.option(
        "--lr", type=click.FloatRange(0, min_open=True), help="Of fine-tuning, identification.  [default: the paper's]"
    ),
    "scoring": click.option("--scoring", type=PATH, metavar="DIR", help=SCORING),
    "patients": click.option(
        "--patients", type=PATH, metavar="FILE", help="ptbxl_database.csv: who the challenge's PTB-XL records are of."
    ),
    "untrained": click.option(
        "--untrained", is_flag=True, help="The same network with random weights: the difference is what training gave."
    ),
    "bootstrap": click.option(
        "--bootstrap", type=click.IntRange(0), default=1000, help="Resamples of an interval; 0: no intervals."
    ),
    "figures": click.option("--figures/--no-figures", default=True, help="ROC curves by class, t-SNE of the features."),
    "pairs": click.option(
        "--pairs", type=click.IntRange(0), default=0,
        help="Draw this many records of each corpus with their reports, which may be confidential.",
    ),
    "device": click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Run where."),
    "overrides": click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="An engine, e.g. runtime.attention=sdpa."
    ),
}  # fmt: skip
COMMON = ("data", "out", "untrained", "bootstrap", "device", "overrides")
SETS = ("splits", "derive", "patients", "sets", "labels")
TASKS = {
    "zero-shot": (
        "Score each class by its description alone (Tables 3, 5, 12, 13).",
        (*SETS, "prompts", "leads", "annotations", "figures", "pairs"),
    ),
    "linear-probe": (
        "Train a linear layer on frozen features at several shares of the records (Table 2).",
        (*SETS, "leads", "fractions", "seeds", "epochs"),
    ),
    "finetune": (
        "Train the whole ECG encoder to diagnose (Table 1, Dx.).",
        (*SETS, "leads", "scoring", "seed", "epochs", "lr"),
    ),
    "identify": (
        "Train the whole ECG encoder to tell patients apart (Table 1, Id.).",
        ("leads", "patients", "seed", "epochs", "lr"),
    ),
    "shift": ("Zero-shot on the classes that another set shares (Tables 4, 11).", (*SETS, "prompts")),
    "all": (
        "Every task that the corpora allow; what cannot be run is said.",
        tuple(name for name in OPTIONS if name not in (*COMMON, "seed")),
    ),
}  # fmt: skip


def register(main: click.Group) -> None:
    """Add ``evaluate`` to ``dbeta``, with the parent's way of reporting errors."""
    group = type(main)("evaluate", help="Every table of the paper, one command each, beside the paper's values.")
    main.add_command(group)
    for task, (summary, names) in TASKS.items():
        command = group.command(task, help=summary)(_run(task))
        command.params += [_parameter(OPTIONS[name]) for name in (*COMMON[:2], *names, *COMMON[2:])]
    group.command("ablations")(ablations)


def _parameter(option: Any) -> click.Parameter:
    """The parameter that an option's decorator adds."""

    @option
    def holder() -> None: ...

    return holder.__click_params__[0]


def _run(task: str) -> Any:
    @click.argument("model")
    def run(model: str, data: tuple[Path, ...], out: Path | None, **given: Any) -> None:
        from dbeta.evaluation.evaluate import Options, evaluate

        name = Path(model)
        out = out or (name / "evaluation" if name.is_dir() else Path("evaluation") / name.name)
        evaluate(task, model, data, out, Options.of(**given))

    return run


@click.option("--preset", default="hopper", help="Of pre-training.")
@click.option("--corpus", default="CORPUS", help="The pre-training corpus.")
@click.option("--data", default="EVALUATION_CORPORA", help="The folder of evaluation corpora.")
@click.option("--splits", help="As in the other commands.")
@click.option("--patients", help="As in the other commands.")
@click.option("--scoring", help="As in the other commands.")
@click.option("--out", type=PATH, default=Path("runs/ablations"), help="Below which the runs go.")
def ablations(preset: str, corpus: str, data: str, out: Path, **folders: str | None) -> None:
    """Print the runs of Tables 6, 7, 8, 12 and 13 as shell lines, with the paper's figures and those at hand."""
    from dbeta.evaluation.ablations import commands

    for line in commands(preset, corpus, data, out, **folders):
        click.echo(line)
