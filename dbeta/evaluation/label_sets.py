"""The label sets of the evaluation (``label_sets.toml``): classes, what they are called, the codes they unite."""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """Classes of one data set, in the order of our tables, and where its published split lies."""

    key: str
    title: str  # as the paper's tables write it
    sources: tuple[str, ...]  # corpus sources that hold its records
    names: dict[str, str]  # label -> what it is called; an entry of descriptions.toml
    codes: dict[str, tuple[str, ...]]  # label -> corpus labels that mean it
    counts: tuple[int, int, int] = (0, 0, 0)  # Table 9: train, validation, test
    splits: str = ""  # file below --splits, with {split} = train, val or test; "" if nothing is published
    key_column: str = ""  # column that names the record
    group_column: str = ""  # column that names the patient
    diagnoses: str = ""  # column with the labels as text, where the 0/1 columns cannot be trusted
    window_s: float = 10.0  # how much of a record is shown
    unlabelled: str = "drop"  # records with none of the labels: drop or keep
    segments: bool = False  # whether ``counts`` are of segments of ``window_s``
    by_substring: bool = False  # the published columns are: targets from a corpus's own labels are others

    @property
    def labels(self) -> tuple[str, ...]:
        """The class labels."""
        return tuple(self.names)

    @property
    def shares(self) -> dict[str, float] | None:
        """Table 9's proportions of train, validation and test; None where it has no such split."""
        return {s: n / sum(self.counts) for s, n in zip(SPLITS, self.counts)} if all(self.counts) else None

    def targets_of(self, held: set[str]) -> list[bool]:
        """One row of targets from a record's corpus labels."""
        return [not held.isdisjoint(self.codes[label]) for label in self.names]


@functools.cache
def _table() -> dict[str, dict]:
    return tomllib.loads(resources.files("dbeta.evaluation").joinpath("label_sets.toml").read_text())


def all_label_sets() -> tuple[str, ...]:
    """The keys of all label sets."""
    return tuple(_table())


def label_set(key: str, *, labels: str = "merl") -> LabelSet:
    """A label set by key.

    Args:
        labels: ``merl`` for the published columns, comparable with the paper's tables; ``clean`` for labels taken whole
            from the data set's own diagnoses (they differ for CSN alone, whose columns were made by substring).

    Raises:
        ValueError: no such set, or no such choice of labels.
    """
    if key not in _table():
        raise ValueError(f"no label set {key!r}; there are {', '.join(_table())}")
    if labels not in ("merl", "clean"):
        raise ValueError(f"labels = {labels!r}; accepted: merl (the published columns), clean (whole diagnoses)")
    entry = _table()[key]
    clean = labels == "clean" and "diagnoses" in entry
    names = {**entry["names"], **(entry["clean_names"] if clean else {})}
    codes = entry.get("codes", {})
    return LabelSet(
        key=f"{key}-clean" if clean else key,
        title=entry["title"] + (" (clean labels)" if clean else ""),
        sources=tuple(entry["sources"]),
        names=names,
        codes={label: tuple(codes.get(label, [label])) for label in names},
        counts=tuple(entry["counts"]),
        splits=entry.get("splits", ""),
        key_column=entry.get("key", ""),
        group_column=entry.get("group", ""),
        diagnoses=entry["diagnoses"] if clean else "",
        window_s=entry.get("window_s", 10.0),
        unlabelled=entry.get("unlabelled", "drop"),
        segments=entry.get("segments", False),
        by_substring="diagnoses" in entry and not clean,
    )


def synthetic_set(labels: list[str]) -> LabelSet:
    """The label set of the built-in corpus: its own labels."""
    return LabelSet(
        key="synthetic", title="synthetic", sources=("synthetic",),
        names={label: label for label in labels}, codes={label: (label,) for label in labels},
    )  # fmt: skip


def sets_for(source: str, corpus_labels: list[str], *, labels: str = "merl") -> list[LabelSet]:
    """The label sets that a corpus of this source can be evaluated on."""
    if source == "synthetic":
        return [synthetic_set(corpus_labels)]
    return [chosen for key in _table() if source in (chosen := label_set(key, labels=labels)).sources]
