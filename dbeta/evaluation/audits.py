"""Audits of label sets and corpora, for ``dbeta doctor``: what silently spoils an evaluation.

Patients in two splits, the same signal twice (within a set, or in a pre-training set and a test set), labels made by
substring, classes that a split cannot measure.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbeta.evaluation.datasets import Rows, count_notes, load_dataset, read_published
from dbeta.evaluation.label_sets import LabelSet, all_label_sets, label_set, sets_for
from dbeta.runtime import track

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus

INDEPENDENT = (0, 1, 6, 7, 8, 9, 10, 11)  # I, II, V1..V6; the other limb leads follow from I and II
AGREEING = 3  # leads whose extremes must coincide; by chance one does so in 1 of 25 million pairs of 10 s
MOST = 10  # examples in a finding
Signal = tuple[str, str, np.ndarray, float]  # set, record, samples [12, L], rate in Hz


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


def audit(corpora: Sequence["Corpus"], splits: Path | None = None, *, signals: bool = True) -> list[Finding]:
    """Everything that this module can find, of several corpora at once; ``dbeta doctor`` makes the same audits of one.

    Args:
        corpora: audited one by one, and against each other for records that they share.
        splits: folder of the published splits, audited too, and used for the classes that a corpus can measure.
        signals: compare the records' signals, which reads every record once.

    Returns:
        Findings in the order: published splits, each corpus (patients in two of its splits; then, for each label set
        that fits it, counts and classes that cannot be measured), signals that are there twice. Empty: nothing found.

    Raises:
        ValueError: ``splits`` holds no published split, or a corpus is damaged.
    """
    found = audit_splits(splits) if splits is not None else []
    for corpus in corpora:
        found += audit_corpus(corpus, splits)
    return found + (duplicate_signals(corpora) if signals else [])


def audit_corpus(corpus: "Corpus", splits: Path | None = None) -> list[Finding]:
    """Patients in two splits of a corpus; counts, such patients and missing classes of the label sets it can answer."""
    found = shared_patients(_stored_splits(corpus), str(corpus.path))
    for labels in sets_for(corpus.source, list(corpus.labels)):
        try:
            dataset = load_dataset(labels, corpus, splits)
        except ValueError as error:
            found.append(Finding(kind="label set", where=labels.title, detail=str(error)))
            continue
        found += [Finding(kind="counts", where=labels.title, detail=note) for note in dataset.notes]
        found += shared_patients(dataset.splits, labels.title) + unmeasurable_classes(dataset.splits, labels)
    return found


def _stored_splits(corpus: "Corpus") -> dict[str, Rows]:
    """The splits that the corpus was prepared with; records of nobody known are left out."""
    held: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, subject, split in zip(*(corpus.column(key) for key in ("name", "subject", "split"))):
        if subject:
            held[str(split)].append((str(name), str(subject)))
    return {
        split: Rows(names=[n for n, _ in those], groups=[s for _, s in those], targets=np.zeros((len(those), 0), bool))
        for split, those in held.items()
    }


def audit_splits(root: Path) -> list[Finding]:
    """Audit every published split below ``root`` (the ``--splits`` folder).

    Raises:
        ValueError: there is none.
    """
    found, seen = [], 0
    for key in all_label_sets():
        labels = label_set(key)
        if not labels.splits or not (root / labels.splits.format(split="train")).is_file():
            continue
        seen += 1
        rows = read_published(root, labels)
        found += [Finding(kind="counts", where=labels.title, detail=note) for note in count_notes(labels, rows)]
        found += shared_patients(rows, labels.title) + unmeasurable_classes(rows, labels)
        clean = label_set(key, labels="clean")
        if clean.diagnoses:
            for split in ("train", "val", "test"):
                found += substring_labels(root / labels.splits.format(split=split), labels.labels, clean.diagnoses)
    if not seen:
        raise ValueError(f"--splits {root} holds no published split, such as ptbxl/form/ptbxl_form_train.csv")
    return found


def shared_patients(rows: dict[str, Rows], where: str) -> list[Finding]:
    """Patients and records that stand in two splits."""
    found = []
    for first, second in combinations(rows, 2):
        for kind, column in (("patient in two splits", "groups"), ("record in two splits", "names")):
            both = sorted(set(getattr(rows[first], column)) & set(getattr(rows[second], column)))
            if both:
                found.append(Finding(kind=kind, where=f"{where}, {first} and {second}", detail=_listed(both)))
    return found


def unmeasurable_classes(rows: dict[str, Rows], labels: LabelSet, few: int = 4) -> list[Finding]:
    """Classes with no positive, no negative or fewer than ``few`` positives in a split."""
    found = []
    for split, part in rows.items():
        positives = dict(zip(labels.labels, part.targets.sum(0).tolist()))
        for kind, names in (
            ("class without positives", [n for n, c in positives.items() if c == 0]),
            ("class without negatives", [n for n, c in positives.items() if c == len(part) > 0]),
            (f"class with fewer than {few} positives", [f"{n} ({c})" for n, c in positives.items() if 0 < c < few]),
        ):
            if names:
                found.append(Finding(kind=kind, where=f"{labels.title} {split}", detail=", ".join(names)))
    return found


def substring_labels(path: Path, columns: Sequence[str], diagnoses: str) -> list[Finding]:
    """0/1 columns that were filled by searching for their name inside the text of all diagnoses.

    Args:
        path: a CSV file with the columns and a comma-separated text column ``diagnoses``.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = []
    for column in columns:
        marked = [row[column] == "1" for row in rows]
        whole = [column in row[diagnoses].split(",") for row in rows]
        if marked != whole and marked == [column in row[diagnoses] for row in rows]:
            wrong.append(f"{column} {sum(marked):,} (true {sum(whole):,})")
    return [Finding(kind="labels by substring", where=path.name, detail=", ".join(wrong))] if wrong else []


def duplicate_signals(corpora: Iterable["Corpus"]) -> list[Finding]:
    """Pairs of records, of one corpus or of two, that hold the same signal, whatever its gain and offset.

    A fingerprint is where each lead has its first maximum and minimum within 10 s at its own rate: gain, offset and
    rounding leave these alone. Records at different rates, or cut differently, are not recognised.
    """
    return same_signals(signals_of(corpora))


def signals_of(corpora: Iterable["Corpus"]) -> Iterator[Signal]:
    """The signals of all records, one at a time."""
    for corpus in corpora:
        names, rates = corpus.column("name"), corpus.column("rate_hz")
        for record in track(range(len(names)), f"fingerprints of {corpus.path}"):
            yield str(corpus.path), str(names[record]), corpus.read_adc(record), float(rates[record])


def same_signals(signals: Iterable[Signal]) -> list[Finding]:
    """The same for records of any origin, taken one at a time."""
    index: dict[tuple, list[tuple[str, str]]] = defaultdict(list)
    for where, name, adc, rate_hz in signals:
        for key in fingerprint(adc, rate_hz):
            index[key].append((where, name))
    agreeing: Counter = Counter()
    for those in index.values():
        agreeing.update(combinations(sorted(set(those)), 2) if len(those) < 100 else ())
    pairs = defaultdict(list)
    for ((first, one), (second, other)), leads in sorted(agreeing.items()):
        if leads >= AGREEING:
            pairs[first, second].append(f"{one} = {other}")
    return [
        Finding(kind="same signal twice", where=a if a == b else f"{a} and {b}", detail=_listed(those))
        for (a, b), those in pairs.items()
    ]


def fingerprint(adc: np.ndarray, rate_hz: float) -> list[tuple[int, float, int, int]]:
    """(lead, rate, first maximum, first minimum) of each independent lead that moves; invalid samples are ignored."""
    part = adc[list(INDEPENDENT), : round(10 * rate_hz)]
    valid = part != np.iinfo(adc.dtype).min
    keys = []
    for lead, (samples, usable) in enumerate(zip(part.astype(np.int64), valid)):
        if usable.any() and np.ptp(samples[usable]):
            highest = np.where(usable, samples, np.iinfo(np.int64).min).argmax()
            lowest = np.where(usable, samples, np.iinfo(np.int64).max).argmin()
            keys.append((lead, rate_hz, int(highest), int(lowest)))
    return keys


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST])
    return shown + (f" and {len(names) - MOST:,} more" if len(names) > MOST else "")
