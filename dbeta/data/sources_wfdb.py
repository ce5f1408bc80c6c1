"""The evaluation data sets in WFDB form: CPSC2018, CSN, PhysioNet Challenge 2021 and PTB.

Their labels are diagnosis codes; reports are empty. Nothing is refused that published splits may count: records with
invalid samples, missing leads or contradicting limb leads are kept and noted.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dbeta.data.corpus_writer import Plan, Row
from dbeta.data.formats import ROUNDING_UV, Raw, from_cpsc, load_mat
from dbeta.data.records import Record, Rejection
from dbeta.data.sources import checked, read_csv, task_table
from dbeta.data.wfdb_files import read_header, read_wfdb


def cpsc2018(root: Path) -> Plan:
    """CPSC2018 in either form: MATLAB structs with a reference table, or PhysioNet's WFDB records.

    Labels are the numbers 1-9 of the table, or the SNOMED CT codes of the headers.
    """
    tables = sorted(root.rglob("REFERENCE*.csv"))
    if not tables:
        return wfdb_folder(root, "A*.hea")
    names = ("First_label", "Second_label", "Third_label")
    labels = {
        row["Recording"]: [row[name].removesuffix(".0") for name in names if row[name].strip()]
        for row in read_csv(tables[0], "Recording", *names).to_pylist()
    }
    rows = []
    for path in sorted(root.rglob("*.mat")):
        task = {"name": path.stem, "path": path.relative_to(root).as_posix(), "labels": labels.get(path.stem)}
        if path.stem not in labels:
            task |= {"refused": "no label", "detail": f"not in {tables[0].name}"}
        rows.append(task | {"subject": path.stem})
    _none(rows, root, "A*.mat beside a REFERENCE*.csv")
    return Plan(table=task_table(rows), read=partial(_read_cpsc, root=root), facts={"rounding_uv": ROUNDING_UV})


def _read_cpsc(rows: list[Row], *, root: Path) -> Iterator[Record | Rejection]:
    for row in rows:
        yield checked(row, lambda path: from_cpsc(load_mat(path)), root)


def csn(root: Path) -> Plan:
    """Chapman-Shaoxing-Ningbo: JS*.hea in any folders; labels are the SNOMED CT codes of the headers."""
    return wfdb_folder(root, "JS*.hea")


def cinc2021(root: Path) -> Plan:
    """PhysioNet Challenge 2021: every WFDB record in any folders; labels are the SNOMED CT codes of the headers."""
    return wfdb_folder(root, "*.hea")


def ptb(root: Path) -> Plan:
    """PTB: ``patientNNN/*.hea`` at 1000 Hz; the label is the header's reason for admission, Frank leads are dropped."""
    return wfdb_folder(root, "*.hea", diagnosis="Reason for admission")


def wfdb_folder(root: Path, pattern: str, diagnosis: str = "Dx") -> Plan:
    """All WFDB records below ``root`` whose header matches ``pattern``; labels are read with the records."""
    rows = [
        {"name": path.relative_to(root).with_suffix("").as_posix(), "path": path.relative_to(root).as_posix()}
        for path in sorted(root.rglob(pattern))
    ]
    _none(rows, root, pattern)
    return Plan(table=task_table(rows), read=partial(_read_folder, root=root, diagnosis=diagnosis))


def _none(rows: list[Row], root: Path, what: str) -> None:
    if not rows:
        raise ValueError(f"ROOT {root} holds no {what}; give the folder that the data set was unpacked in")


def _read_folder(rows: list[Row], *, root: Path, diagnosis: str) -> Iterator[Record | Rejection]:
    for row in rows:
        try:
            header = read_header(root / row["path"])
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            yield Rejection(name=row["name"], reason=reason, detail=detail)
            continue
        value = header.comment(diagnosis)
        labels = value.split(",") if diagnosis == "Dx" else [value]
        labels = sorted({label.strip() for label in labels} - {"", "n/a"})
        yield checked(row | {"labels": labels, "subject": _subject(row["name"])}, _read_georgia_gain, root)


def _subject(name: str) -> str:
    """PTB's folders are patients; the other sets publish none, so every record is its own."""
    patient = re.search(r"(?:^|/)(patient\d+)/", name)
    return patient[1] if patient else name.rpartition("/")[2]


def _read_georgia_gain(path: Path) -> Raw:
    """A WFDB record; an early release of Georgia's said gain 4880 where the later one, same samples, says 1000."""
    raw = read_wfdb(path)
    if re.fullmatch(r"E\d{5}", path.stem) and (raw.gain == 4880).all():
        note = ("gain", "4880 of the early release of Georgia's records is 1000 in the later one, used here")
        return Raw(**{**_fields(raw), "gain": raw.gain * 0 + 1000, "notes": (*raw.notes, note)})
    return raw


def _fields(raw: Raw) -> dict:
    return {name: getattr(raw, name) for name in raw.__dataclass_fields__}
