"""``dbeta evaluate``: every table of the paper on the corpora that are there, one command each.

OUT/results.csv results.json results.png   one row per figure, beside the paper's; another task adds its own
    classes.csv                            AUC, interval and positives of every class
    units/     finished pieces of work; what is there is not done again
    features/  frozen features by model and corpus checksum
    segments/  5 s segments for fine-tuning;  figures/  ROC curves, t-SNE, ECGs with their reports
"""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console

from dbeta.config import Config, RuntimeConfig
from dbeta.evaluation import results
from dbeta.evaluation.datasets import Dataset, load_dataset
from dbeta.evaluation.features import FeatureCache
from dbeta.evaluation.label_sets import LabelSet, all_label_sets, sets_for
from dbeta.evaluation.linear_probe import FRACTIONS, SEEDS
from dbeta.evaluation.results import Result, Units, Work
from dbeta.evaluation.signals import LEAD_SETS, corpus_checksum
from dbeta.runtime import announce

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus
    from dbeta.models.dbeta import DBeta

TASKS = ("zero-shot", "linear-probe", "finetune", "identify", "shift")
FULL_SIZE = 100_000_000  # parameters; a smaller network is a smoke test, not a measurement
FEW = 100  # test records below which a figure says little


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen about an evaluation."""

    splits: Path | None = None  # folder with the published split files
    derive: bool = False  # split by patient anew: only for a corpus that the model was not pre-trained on
    prompts: str = "descriptions"  # or names, or a JSON file
    labels: str = "merl"  # or clean
    sets: tuple[str, ...] = ()  # label sets; empty: all that the corpora can answer
    leads: tuple[str, ...] = ()  # lead sets; empty: 12, and all five for fine-tuning and identification
    fractions: tuple[float, ...] = FRACTIONS
    seeds: tuple[int, ...] = SEEDS
    scoring: Path | None = None  # folder with the challenge's weights.csv
    patients: Path | None = None  # ptbxl_database.csv: who the challenge's PTB-XL records are of
    annotations: Path | None = None  # CODE-test's annotations, for the human readers of Table 5
    epochs: int | None = None  # of probe, fine-tuning and identification; None: the paper's
    lr: float | None = None  # of fine-tuning and identification; None: the paper's, which suit the full-size network
    untrained: bool = False  # the same network with random weights: what training is worth is the difference
    bootstrap: int = 1000
    figures: bool = True  # ROC curves and t-SNE of the test features
    pairs: int = 0  # records of each corpus to draw with their reports, which may be credentialed text
    device: str = "auto"
    overrides: tuple[str, ...] = ()  # runtime.KEY=VALUE: engines

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From a command line, where None and () mean the default."""
        return cls(**{name: value for name, value in given.items() if value is not None and value != ()})


@dataclass(kw_only=True)
class Evaluation:
    """A model, the corpora by source, and where results go."""

    model: "DBeta"
    corpora: dict[str, "Corpus"]
    out: Path
    options: Options
    features: FeatureCache = field(init=False)
    units: Units = field(init=False)
    loaded: dict[tuple[str, str], Dataset] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.features = FeatureCache(self.model, self.out / "features")
        self.units = Units(self.out / "units")
        size = sum(parameter.numel() for parameter in self.model.parameters())
        self.device = next(self.model.parameters()).device
        small = f"smoke-size model ({size / 1e6:.1f} M parameters): meaningless as a measurement"
        untrained = "untrained network" if self.options.untrained else ""
        self.warning = "; ".join(note for note in (untrained, small if size < FULL_SIZE else "") if note)

    def datasets(self, *, trainable: bool = False) -> list[tuple["Corpus", Dataset]]:
        """Every chosen label set that a corpus can answer."""
        found = []
        for corpus in self.corpora.values():
            for labels in sets_for(corpus.source, list(corpus.labels), labels=self.options.labels):
                if self.options.sets and labels.key.removesuffix("-clean") not in self.options.sets:
                    continue
                dataset = self._dataset(labels, corpus)
                if not trainable or len(dataset.splits["train"]):
                    found.append((corpus, dataset))
        return found

    def _dataset(self, labels: LabelSet, corpus: "Corpus") -> Dataset:
        """Loaded once, with its notes said once."""
        key = labels.key, corpus.source
        if key not in self.loaded:
            options = self.options
            self.loaded[key] = load_dataset(
                labels, corpus, options.splits, derive=options.derive, patients=options.patients
            )
            for note in self.loaded[key].notes:
                announce(note)
        return self.loaded[key]

    def unit(self, name: str, key: dict[str, Any], work: Work) -> list[Result]:
        """The results of a piece of work, which is done unless it was done before."""
        whole = key | {"unit": name, "model": self.features.checksum, "bootstrap": self.options.bootstrap}
        return self.units.get(name, whole, work)

    def key(self, corpus: "Corpus", dataset: Dataset) -> dict[str, Any]:
        """What identifies a data set: the corpus and the records, targets and patients of each split."""
        digest = hashlib.sha256(repr(dataset.labels).encode())
        for rows in dataset.splits.values():
            digest.update(rows.records.tobytes())
            digest.update(rows.targets.tobytes())
            digest.update(repr(rows.groups).encode())
        return {"corpus": corpus_checksum(corpus), "dataset": digest.hexdigest()}

    def fields(self, task: str, dataset: Dataset, **more: Any) -> dict[str, Any]:
        """The columns of a result that describe its case."""
        test = len(dataset.splits["test"])
        few = f"only {test} test record{'s' * (test != 1)}" if test < FEW else ""
        note = "; ".join(part for part in (self.warning, few) if part)
        labels = dataset.labels
        described = {"task": task, "dataset": labels.key, "title": labels.title, "records": test}
        return described | {"split": dataset.origin, "note": note} | more


def evaluate(
    task: str,
    model: "DBeta | str | Path",
    data: Path | Iterable[Path],
    out: Path,
    options: Options | None = None,
) -> list[Result]:
    """Evaluate a model and write the results; returns them.

    Args:
        task: one of ``TASKS``, or ``all``.
        model: a model, or what ``DBeta.from_pretrained`` accepts.
        data: a corpus, a folder of corpora, or several of these.
        out: where results and caches go; a second run with the same ``out`` does only what is missing.

    Raises:
        ValueError: an unknown task, nothing to evaluate on, or data that do not fit, with what to do.
    """
    options, out = options or Options(), Path(out)
    chosen = TASKS if task == "all" else (task,)
    _check(chosen, options)
    corpora = find_corpora(*([data] if isinstance(data, str | Path) else data))
    evaluation = Evaluation(model=_load(model, options), corpora=corpora, out=out, options=options)
    found = _run(evaluation, chosen)
    if options.pairs:
        from dbeta.evaluation.figures import save_pairs

        save_pairs(corpora, out / "figures", options.pairs)
    named = model if isinstance(model, str | Path) else type(model).__name__
    written = results.write(found, out, model=str(named), checksum=evaluation.features.checksum)
    from dbeta.evaluation.figures import draw_results

    draw_results(written).savefig(out / "results.png", dpi=150)
    console = Console()
    console = console if console.is_terminal else Console(width=120)  # in a file nothing is cut
    console.print(results.show([*found, *results.not_run(found, chosen)]))
    click.echo(f"{out}: results.csv, classes.csv, results.json, results.png", err=True)
    return found


def _check(chosen: Iterable[str], options: Options) -> None:
    """Names that nothing is called by, before anything is loaded."""
    sets = (*all_label_sets(), "synthetic")
    for what, given, accepted in (
        ("task", chosen, (*TASKS, "all")), ("--leads", options.leads, LEAD_SETS), ("--sets", options.sets, sets)
    ):  # fmt: skip
        unknown = [name for name in given if name not in accepted]
        if unknown:
            raise ValueError(f"{what} {', '.join(unknown)}: accepted are {', '.join(accepted)}")


def _run(evaluation: Evaluation, chosen: tuple[str, ...]) -> list[Result]:
    """The results of the tasks; of several, one that cannot be run is announced."""
    from dbeta.evaluation import tasks

    found: list[Result] = []
    problems: list[str] = []
    for name in chosen:
        try:
            found += tasks.RUN[name](evaluation, everything=len(chosen) > 1)
        except ValueError as error:
            if len(chosen) == 1:
                raise
            problems.append(f"{name}: {error}")
    if not found:
        kind = "label set" if "zero-shot" in chosen else "label set with records to train on"
        reason = "; ".join(problems) or f"no {kind} for {', '.join(evaluation.corpora)}"
        raise ValueError(f"nothing to evaluate for {', '.join(chosen)}: {reason}; see dbeta prepare, --sets and --data")
    for problem in problems:
        announce(f"not run: {problem}")
    return found


def find_corpora(*data: str | Path) -> dict[str, "Corpus"]:
    """The corpora of some folders by source: each folder itself, or those directly inside it.

    Raises:
        ValueError: a folder is none and holds none, or there are two of one source.
    """
    from dbeta.data.corpus import Corpus

    found: dict[str, Corpus] = {}
    for folder in map(Path, data):
        paths = [folder] if (folder / "corpus.json").is_file() or not folder.is_dir() else []
        paths = paths or [path.parent for path in sorted(folder.glob("*/corpus.json"))]
        if not paths:
            raise ValueError(
                f"--data {folder} is no corpus and holds none; make one with: dbeta prepare SOURCE ROOT --out ..."
            )
        for corpus in map(Corpus.open, paths):
            other = found.setdefault(corpus.source, corpus)
            if other is not corpus:
                raise ValueError(
                    f"--data: {other.path} and {corpus.path} are both of {corpus.source}; give one of them"
                )
    return found


def _load(model: "DBeta | str | Path", options: Options) -> "DBeta":
    import torch

    from dbeta.models.dbeta import DBeta
    from dbeta.runtime import resolve_device

    if isinstance(model, str | Path):
        model = DBeta.from_pretrained(model, _runtime(options))
    if options.untrained:
        announce("--untrained: the network is evaluated with random weights")
        model = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seeds[0])
            model.reset_parameters()
    return model.to(resolve_device(options.device)).eval()


def _runtime(options: Options) -> RuntimeConfig:
    """The engines that ``--set`` chooses."""
    for override in options.overrides:
        if not override.strip().startswith("runtime."):
            raise ValueError(f"--set {override}: only runtime.KEY can be set here; the network is the model's own")
    return Config.load("smoke", [*options.overrides, f"runtime.device={options.device}"]).runtime
