"""``dbeta evaluate``: every table of the paper on the corpora that are there, one command each.

OUT/results.csv results.json results.png   one row per figure, beside the paper's
    units/     finished pieces of work with per-class details; what is there is not done again
    features/  frozen features by model and corpus checksum
    segments/  5 s segments for fine-tuning;  figures/  ROC curves and t-SNE
"""

import copy
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from dbeta.evaluation import results
from dbeta.evaluation.datasets import Dataset, load_dataset
from dbeta.evaluation.features import FeatureCache
from dbeta.evaluation.label_sets import LabelSet, sets_for
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
    patients: Path | None = None  # ptbxl_database.csv, for identification on the challenge's records
    annotations: Path | None = None  # CODE-test's annotations, for the human readers of Table 5
    epochs: int | None = None  # of probe, fine-tuning and identification; None: the paper's
    lr: float | None = None  # of fine-tuning and identification; None: the paper's, which suit the full-size network
    untrained: bool = False  # the same network with random weights: what training is worth is the difference
    bootstrap: int = 1000
    figures: bool = True  # ROC curves and t-SNE of the test features

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From a command line, where None and () mean the default."""
        return cls(**{name: value for name, value in given.items() if value is not None and value != ()})

    device: str = "auto"


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
            self.loaded[key] = load_dataset(labels, corpus, self.options.splits, derive=self.options.derive)
            for note in self.loaded[key].notes:
                announce(note)
        return self.loaded[key]

    def unit(self, name: str, key: dict[str, Any], work: Work) -> list[Result]:
        """The results of a piece of work, which is done unless it was done before."""
        whole = key | {"unit": name, "model": self.features.checksum, "bootstrap": self.options.bootstrap}
        return self.units.get(name, whole, work)

    def key(self, corpus: "Corpus", dataset: Dataset) -> dict[str, Any]:
        """What identifies a data set: the corpus and the records and targets of each split."""
        digest = hashlib.sha256(repr(dataset.labels).encode())
        for rows in dataset.splits.values():
            digest.update(rows.records.tobytes())
            digest.update(rows.targets.tobytes())
        return {"corpus": corpus_checksum(corpus), "dataset": digest.hexdigest()}

    def fields(self, task: str, dataset: Dataset, **more: Any) -> dict[str, Any]:
        """The columns of a result that describe its case."""
        test = len(dataset.splits["test"])
        few = f"only {test} test records" if test < FEW else ""
        note = "; ".join(part for part in (self.warning, few) if part)
        labels = dataset.labels
        described = {"task": task, "dataset": labels.key, "title": labels.title, "records": test}
        return described | {"split": dataset.origin, "note": note} | more


def evaluate(
    task: str, model: "DBeta | str | Path", data: Path, out: Path, options: Options | None = None
) -> list[Result]:
    """Evaluate a model and write the results; returns them.

    Args:
        task: one of ``TASKS``, or ``all``.
        model: a model, or what ``DBeta.from_pretrained`` accepts.
        data: a corpus, or a folder of corpora.
        out: where results and caches go; a second run with the same ``out`` does only what is missing.

    Raises:
        ValueError: an unknown task, nothing to evaluate on, or data that do not fit, with what to do.
    """
    from dbeta.evaluation import tasks

    options = options or Options()
    chosen = TASKS if task == "all" else (task,)
    unknown = [*({*chosen} - {*TASKS}), *({*options.leads} - {*LEAD_SETS})]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: accepted are tasks {', '.join(TASKS)}, all; lead sets {', '.join(LEAD_SETS)}"
        )
    corpora = find_corpora(Path(data))
    evaluation = Evaluation(model=_load(model, options), corpora=corpora, out=Path(out), options=options)
    found: list[Result] = []
    problems: list[str] = []
    for name in chosen:
        try:
            found += tasks.RUN[name](evaluation, everything=task == "all")
        except ValueError as error:
            if task != "all":
                raise
            problems.append(f"{name}: {error}")
    if not found:
        reason = "; ".join(problems) or f"no label set for {', '.join(corpora)}"
        raise ValueError(f"nothing to evaluate for {task}: {reason}; see dbeta prepare, --sets and --data")
    for problem in problems:
        announce(problem)
    listed = [*found, *results.not_run(found, chosen)]
    results.write(listed, evaluation.out)
    from dbeta.evaluation.figures import draw_results

    draw_results(listed).savefig(evaluation.out / "results.png", dpi=150)
    Console().print(results.show(listed))
    return found


def find_corpora(data: Path) -> dict[str, "Corpus"]:
    """The corpora of a folder by source: the folder itself, or those directly inside it.

    Raises:
        ValueError: there is none, or two of one source.
    """
    from dbeta.data.corpus import Corpus

    if (data / "corpus.json").is_file() or not data.is_dir():
        opened = [Corpus.open(data)]
    else:
        opened = [Corpus.open(path.parent) for path in sorted(data.glob("*/corpus.json"))]
    if not opened:
        raise ValueError(
            f"--data {data} is no corpus and holds none; make one with: dbeta prepare SOURCE ROOT --out ..."
        )
    sources = [corpus.source for corpus in opened]
    twice = {source for source in sources if sources.count(source) > 1}
    if twice:
        raise ValueError(f"--data {data} holds several corpora of {', '.join(sorted(twice))}; give one of them")
    return dict(zip(sources, opened))


def _load(model: "DBeta | str | Path", options: Options) -> "DBeta":
    import torch

    from dbeta.models.dbeta import DBeta
    from dbeta.runtime import resolve_device

    if isinstance(model, str | Path):
        model = DBeta.from_pretrained(model)
    if options.untrained:
        announce("--untrained: the network is evaluated with random weights")
        model = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seeds[0])
            model.reset_parameters()
    return model.to(resolve_device(options.device)).eval()
