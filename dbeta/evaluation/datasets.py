"""Records and targets of a label set: from the published split files, or derived by patient from a corpus."""

import csv
import hashlib
import re
from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from dbeta.evaluation.label_sets import SPLITS, LabelSet

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus

PRETRAINING = ("mimic-iv-ecg", "ptb-xl", "synthetic")  # sources whose own split tells what a model may have seen
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}  # of a derived split, where Table 9 has no proportions


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one split."""

    names: list[str]  # record names
    groups: list[str]  # patients
    targets: np.ndarray  # bool [N, C]
    records: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # corpus record ids, once matched

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray, records: np.ndarray | None = None) -> "Rows":
        """The rows with these indices."""
        return Rows(
            names=[self.names[i] for i in rows],
            groups=[self.groups[i] for i in rows],
            targets=self.targets[rows],
            records=self.records[rows] if records is None else records,
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A label set on a corpus."""

    labels: LabelSet
    splits: dict[str, Rows]
    origin: str  # "published", "corpus" (its own split, by patient) or "derived by patient"
    notes: tuple[str, ...] = ()  # counts that differ from Table 9, records that are not there, ...


def read_published(root: Path, labels: LabelSet) -> dict[str, Rows]:
    """All rows of the published split files below ``root``, columns found by name (their order differs between files).

    Raises:
        ValueError: a file or a column is missing.
    """
    return {split: _read_split(root / labels.splits.format(split=split[:3] if split == "validation" else split), labels)
            for split in SPLITS}  # fmt: skip


def count_notes(labels: LabelSet, rows: dict[str, Sized]) -> list[str]:
    """Where the number of rows of a split (records, or segments where those are counted) differs from Table 9."""
    return [
        f"{labels.title} {split}: {len(rows[split]):,} rows, Table 9 has {count:,}"
        for split, count in zip(SPLITS, labels.counts)
        if len(rows[split]) != count
    ]


def load_dataset(
    labels: LabelSet,
    corpus: "Corpus",
    splits: Path | None = None,
    *,
    derive: bool = False,
    patients: Path | None = None,
) -> Dataset:
    """The records of a corpus that belong to a label set, in three splits that no patient crosses.

    The published split is used where ``splits`` is given and none of its parts is empty for the records present. Else,
    for a source that models are pre-trained on, the corpus's own: a record of its training part is never tested, and
    where it has no test part half of the validation patients are. Else a split by patient, in Table 9's proportions.
    ``origin`` states which.

    Args:
        derive: make a split by patient whatever the source. Only for a corpus that the model never saw.
        patients: as in ``subjects_of``.

    Raises:
        ValueError: no record of the corpus belongs to the set, or ``patients`` is not PTB-XL's table.
    """
    notes = []
    if splits is not None and labels.splits:
        published = read_published(splits, labels)
        notes += count_notes(labels, published)
        matched = {split: _match(rows, corpus) for split, rows in published.items()}
        wanted, found = (sum(map(len, s.values())) for s in (published, matched))
        if found < wanted:
            notes.append(f"{labels.title}: {wanted - found:,} of {wanted:,} published records are not in {corpus.path}")
        if all(len(rows) for rows in matched.values()):
            return Dataset(labels=labels, splits=matched, origin="published", notes=tuple(notes))
        empty = ", ".join(split for split, rows in matched.items() if not len(rows))
        notes.append(f"{labels.title}: the published split is empty in {empty} here; another one by patient is used")
    if labels.by_substring:
        notes.append(f"{labels.title}: the targets are the records' own codes, not the published columns")
    if corpus.source == "cinc2021" and patients is None and any(map(_ecg_id, corpus.column("name"))):
        notes.append(
            f"{labels.title}: every record of PTB-XL counts as a patient; --patients ptbxl_database.csv names them"
        )
    rows = _corpus_rows(labels, corpus, subjects_of(corpus, patients))
    if not len(rows):
        raise ValueError(f"{corpus.path} ({corpus.source}) holds no record with a label of {labels.key}")
    if labels.counts[:2] == (0, 0) and labels.counts[2]:
        parts, origin = ["test"] * len(rows), "published"  # a pure test set
    else:
        own = [str(part) for part in corpus.column("split", rows.records)]
        seen = corpus.source in PRETRAINING and not derive
        parts, origin = own_split(own, rows.groups) if seen else derive_split(rows.groups, labels.shares or SHARES)
    member = np.array(parts)
    parted = {split: rows.take(np.flatnonzero(member == split)) for split in SPLITS}
    if any(labels.counts) and not labels.segments:
        notes += count_notes(labels, parted)
    return Dataset(labels=labels, splits=parted, origin=origin, notes=tuple(notes))


def own_split(own: list[str], groups: list[str]) -> tuple[list[str], str]:
    """The corpus's split of these rows, made whole where a part is missing, and its origin."""
    held_out = sorted({group for part, group in zip(own, groups) if part != "train"}, key=_hash)
    if set(own) == set(SPLITS):
        return own, "corpus"
    if "train" not in own or len(held_out) < 2:
        return derive_split(groups)
    tested = set(held_out[::2])
    halved = ["train" if p == "train" else "test" if g in tested else "validation" for p, g in zip(own, groups)]
    return halved, "corpus, its held-out patients halved"


def derive_split(groups: list[str], shares: dict[str, float] = SHARES, *, seed: int = 42) -> tuple[list[str], str]:
    """A split for each row, and its name: ``shares`` of the patients by seeded hash, at least one in each.

    Raises:
        ValueError: fewer than three patients.
    """
    patients = sorted(set(groups), key=lambda patient: _hash(patient, seed))
    if len(patients) < 3:
        raise ValueError(f"{len(patients)} patients cannot be split into train, validation and test; three are needed")
    test, validation = (max(1, round(shares[part] * len(patients))) for part in ("test", "validation"))
    part = dict.fromkeys(patients, "train")
    part |= dict.fromkeys(patients[:test], "test") | dict.fromkeys(patients[test : test + validation], "validation")
    return [part[group] for group in groups], "derived by patient"


def _hash(patient: str, seed: int = 42) -> bytes:
    return hashlib.sha256(f"{seed} {patient}".encode()).digest()


def subjects_of(corpus: "Corpus", patients: Path | None = None) -> list[str]:
    """The patient of each record of a corpus.

    Args:
        patients: ``ptbxl_database.csv``; names the patients of the challenge's PTB-XL records (HR00001 is ecg_id 1),
            whose headers do not.

    Raises:
        ValueError: ``patients`` cannot be read as that.
    """
    subjects = [str(subject) for subject in corpus.column("subject")]
    if patients is None:
        return subjects
    try:
        with patients.open(newline="") as file:
            known = {int(row["ecg_id"]): row["patient_id"].removesuffix(".0") for row in csv.DictReader(file)}
        if not known:
            raise ValueError("no row names a patient")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"--patients {patients}: {error!r}; give PTB-XL's ptbxl_database.csv") from None
    ecg_ids = map(_ecg_id, corpus.column("name"))
    return [f"PTB-XL {known[ecg]}" if ecg in known else subject for subject, ecg in zip(subjects, ecg_ids)]


def _ecg_id(name: str) -> int | None:
    """PTB-XL's number of a record of the challenge."""
    match = re.fullmatch(r"HR(\d{5})", record_stem(name))
    return int(match[1]) if match else None


def record_stem(name: str) -> str:
    """What a record is called without folder and ending: /a/JS00001.mat -> JS00001."""
    last = PurePosixPath(str(name)).name
    return last.removesuffix(".mat").removesuffix(".hea").removesuffix(".dat")


def _read_split(path: Path, labels: LabelSet) -> Rows:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{labels.title}: {error}; --splits DIR must hold {labels.splits}") from None
    columns = [] if labels.diagnoses else labels.labels
    needed = {labels.key_column, labels.group_column, *columns, *([labels.diagnoses] if labels.diagnoses else [])}
    absent = needed - set(rows[0] if rows else ())
    if absent:
        raise ValueError(f"{path} has no column {', '.join(sorted(absent))}")
    if labels.diagnoses:
        held = [set(row[labels.diagnoses].split(",")) for row in rows]
        targets = [[label in labels_held for label in labels.labels] for labels_held in held]
    else:
        targets = [[row[label] == "1" for label in labels.labels] for row in rows]
    return Rows(
        names=[record_stem(row[labels.key_column]) for row in rows],
        groups=[record_stem(row[labels.group_column]) for row in rows],
        targets=np.array(targets, bool).reshape(len(rows), len(labels.labels)),
    )


def _match(rows: Rows, corpus: "Corpus") -> Rows:
    where = {record_stem(name): record for record, name in enumerate(corpus.column("name"))}
    present = np.array([i for i, name in enumerate(rows.names) if name in where], np.int64)
    return rows.take(present, np.array([where[rows.names[i]] for i in present], np.int64))


def _corpus_rows(labels: LabelSet, corpus: "Corpus", subjects: list[str]) -> Rows:
    held = [{str(label).partition("+")[0] for label in record} for record in corpus.column("labels")]  # SPH: 22+308
    targets = np.array([labels.targets_of(record) for record in held], bool).reshape(len(held), len(labels.labels))
    records = np.arange(len(held)) if labels.unlabelled == "keep" else np.flatnonzero(targets.any(1))
    names = list(corpus.column("name"))
    return Rows(
        names=[str(names[i]) for i in records],
        groups=[subjects[i] for i in records],
        targets=targets[records],
        records=records.astype(np.int64),
    )
