"""The data sets that pre-training reads: from their own tables to a ``Plan`` of records."""

import ast
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from dbeta.data.corpus_writer import Plan
from dbeta.data.formats import read_wfdb
from dbeta.data.records import Record, Rejection, canonical
from dbeta.data.reports import join

Task = tuple[str, str, str, str, tuple[str, ...], str | None]  # path, name, subject, report, labels, split


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV as strings.

    Raises:
        ValueError: the file or one of ``columns`` is not there.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder that holds it as ROOT")
    try:
        with path.open("rb") as file:
            names = file.readline().decode("utf-8-sig").strip().split(",")
        options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        table = pyarrow.csv.read_csv(path, convert_options=options, parse_options=parse)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from None
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.column_names[:12])}")
    return table.to_pylist()


def mimic_iv_ecg(root: Path, seed: int, cleaning: str) -> tuple[Plan, list[Rejection]]:
    """MIMIC-IV-ECG: record_list.csv and machine_measurements.csv, whose report columns are joined in order (RECIPE 2).

    A record without a report, with NaN or of another shape than 12 leads at 500 Hz is refused, as in the paper.
    """
    measured = read_table(root / "machine_measurements.csv", "study_id", "report_0")
    columns = sorted((c for c in measured[0] if c.startswith("report_")), key=lambda c: int(c[7:])) if measured else []
    reports = {row["study_id"]: join(row[column] for column in columns) for row in measured}
    tasks, refused, seen = [], [], set()
    for row in read_table(root / "record_list.csv", "subject_id", "study_id", "path"):
        study = row["study_id"]
        if study in seen:
            refused.append(Rejection(name=row["path"], reason="duplicate study", detail=study))
        elif not reports.get(study):
            detail = "no text in its columns" if study in reports else "not in machine_measurements.csv"
            refused.append(Rejection(name=row["path"], reason="empty report", detail=detail))
        else:
            tasks.append((str(root / row["path"]), row["path"], row["subject_id"], reports[study], (), None))
        seen.add(study)
    read = partial(read_wfdb_tasks, root=root, all_leads=True, invalid=False, rate_hz=500.0)
    return Plan(source="mimic-iv-ecg", tasks=tasks, read=read, seed=seed, cleaning=cleaning), refused


PTBXL_SPLIT = {9: "validation", 10: "test"}


def ptb_xl(root: Path, seed: int, cleaning: str) -> tuple[Plan, list[Rejection]]:
    """PTB-XL at 500 Hz: folds 1-8, 9 and 10 are the splits; labels are the SCP codes, likelihood 0 included."""
    tasks, refused = [], []
    for row in read_table(
        root / "ptbxl_database.csv", "patient_id", "report", "scp_codes", "strat_fold", "filename_hr"
    ):
        path = row["filename_hr"]
        if not row["report"].strip():
            refused.append(Rejection(name=path, reason="empty report"))
            continue
        try:
            labels = tuple(sorted(ast.literal_eval(row["scp_codes"] or "{}")))
            split = PTBXL_SPLIT.get(int(float(row["strat_fold"])), "train")
        except (ValueError, SyntaxError) as error:
            refused.append(Rejection(name=path, reason="unreadable row", detail=str(error)))
            continue
        tasks.append((str(root / path), path, row["patient_id"].removesuffix(".0"), row["report"], labels, split))
    read = partial(read_wfdb_tasks, root=root, all_leads=True)
    return Plan(source="ptb-xl", tasks=tasks, read=read, seed=seed, cleaning=cleaning), refused


def read_wfdb_tasks(tasks: Sequence[Task], *, root: Path, **checks) -> Iterator[Record | Rejection]:
    """WFDB records of a data set, each checked by ``canonical`` with ``checks``."""
    inside = root.resolve()
    for path, name, subject, report, labels, split in tasks:
        try:
            if not Path(path).resolve().is_relative_to(inside) and ".." in Path(path).parts:
                raise ValueError("path leaves the data set: not read")
            raw = read_wfdb(Path(path))
            yield canonical(raw, name=name, subject=subject, report=report, labels=labels, split=split, **checks)
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            yield Rejection(name=name, reason=reason, detail=detail)
