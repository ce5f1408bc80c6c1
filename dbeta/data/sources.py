"""The data sets that pre-training reads, MIMIC-IV-ECG and PTB-XL: from their own tables to a ``Plan``.

A plan's table holds for every source: name, path (below the root), subject, report, labels, split, refused, detail.
"""

import csv
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from dbeta.data.corpus_writer import Plan, Row
from dbeta.data.records import Record, Rejection, canonical
from dbeta.data.wfdb_files import read_wfdb

TASK = pa.schema(
    [
        ("name", pa.string()), ("path", pa.string()), ("subject", pa.string()), ("report", pa.string()),
        ("labels", pa.list_(pa.string())), ("split", pa.string()), ("refused", pa.string()), ("detail", pa.string()),
    ]
)  # fmt: skip


def task_table(rows: list[Row]) -> pa.Table:
    """Rows as a plan's table; what a row does not have is null."""
    return pa.Table.from_pylist(rows, TASK)


def read_csv(path: Path, *columns: str, optional: str = "") -> pa.Table:
    """Columns of a CSV as strings, read in blocks so that only they are ever in memory.

    Args:
        columns: those that must be there.
        optional: a regular expression of further ones.

    Raises:
        ValueError: the file or one of ``columns`` is not there, or it is not a CSV table.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder that holds it as ROOT")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            names = next(csv.reader(file), [])
        except csv.Error as error:
            raise ValueError(f"{path} is not a CSV table: {error}") from None
    missing = [column for column in columns if column not in names]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names[:12])}")
    wanted = [name for name in names if name in columns or (optional and re.fullmatch(optional, name))]
    options = pyarrow.csv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False
    )
    try:
        parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
        return pyarrow.csv.open_csv(path, convert_options=options, parse_options=parse).read_all()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from None


def mimic_iv_ecg(root: Path) -> Plan:
    """MIMIC-IV-ECG: record_list.csv and machine_measurements.csv, whose report columns are joined in order (RECIPE 2).

    A record without a report, with NaN or of another shape than 12 leads at 500 Hz is refused, as in the paper.
    """
    measured = read_csv(root / "machine_measurements.csv", "study_id", optional=r"report_\d+")
    texts = sorted((name for name in measured.column_names if name != "study_id"), key=lambda name: int(name[7:]))
    if not texts:
        raise ValueError(f"{root / 'machine_measurements.csv'} has no column report_0, report_1, ...")
    report = join_columns([measured[name] for name in texts])
    listed = read_csv(root / "record_list.csv", "subject_id", "study_id", "path")
    study, rows = listed["study_id"], len(listed)
    place = pc.index_in(study, value_set=measured["study_id"].combine_chunks())
    report = report.take(place)
    codes = study.combine_chunks().dictionary_encode().indices.to_numpy()
    again = np.ones(rows, bool)
    again[np.unique(codes, return_index=True)[1]] = False
    unknown, empty = pc.is_null(place), pc.fill_null(pc.equal(report, ""), True)
    refused = pc.if_else(pa.array(again), "duplicate study", pc.if_else(empty, "empty report", None))
    why = pc.if_else(unknown, "not in machine_measurements.csv", "no text in its columns")
    table = pa.table(
        {
            "name": listed["path"], "path": listed["path"], "subject": listed["subject_id"], "report": report,
            "labels": pa.nulls(rows, TASK.field("labels").type), "split": pa.nulls(rows, pa.string()),
            "refused": refused, "detail": pc.if_else(pa.array(again), study, why),
        },
        TASK,
    )  # fmt: skip
    strict = {"all_leads": True, "invalid": False, "limb_leads": "reject", "rate_hz": 500.0}
    return Plan(table=table, read=partial(read_wfdb_rows, root=root, **strict))


def join_columns(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """One report per row: the cells that hold text, trimmed, in order, with one space between."""
    # No nulls on the way: pyarrow 26's binary_join_element_wise loses a row whose cells are all null.
    report, *rest = [pc.utf8_trim_whitespace(column) for column in columns]
    for cell in rest:
        space = pc.if_else(pc.or_(pc.equal(report, ""), pc.equal(cell, "")), "", " ")
        report = pc.binary_join_element_wise(report, cell, space)
    return report


PTBXL_SPLIT = {9: "validation", 10: "test"}


def ptb_xl(root: Path) -> Plan:
    """PTB-XL at 500 Hz: folds 1-8, 9 and 10 are the splits; labels are the SCP codes, likelihood 0 included."""
    columns = ("patient_id", "report", "scp_codes", "strat_fold", "filename_hr")
    rows = []
    for row in read_csv(root / "ptbxl_database.csv", *columns).to_pylist():
        task = {"name": row["filename_hr"], "path": row["filename_hr"], "report": row["report"].strip()}
        if not task["report"]:
            task |= {"refused": "empty report"}
        try:
            task["split"] = PTBXL_SPLIT.get(int(float(row["strat_fold"])), "train")
        except ValueError:
            task |= {"refused": "unreadable row", "detail": f"strat_fold {row['strat_fold']!r}"}
        task["labels"] = sorted(re.findall(r"'([^']+)'\s*:", row["scp_codes"]))
        task["subject"] = row["patient_id"].removesuffix(".0")
        rows.append(task)
    return Plan(table=task_table(rows), read=partial(read_wfdb_rows, root=root, all_leads=True))


def read_wfdb_rows(rows: list[Row], *, root: Path, **checks: Any) -> Iterator[Record | Rejection]:
    """WFDB records of a data set, each checked by ``canonical`` with ``checks``."""
    for row in rows:
        yield checked(row, lambda path: read_wfdb(path), root, **checks)


def checked(row: Row, read: Any, root: Path, **checks: Any) -> Record | Rejection:
    """``read`` at the row's path to a ``Record``, or the ``Rejection`` that says why not."""
    try:
        path = PurePosixPath(row["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"path outside the data set: {path}")
        given = {key: row[key] or "" for key in ("name", "subject", "report")}
        raw = read(root / path)
        return canonical(raw, **given, labels=tuple(row["labels"] or ()), split=row["split"], **checks)
    except ValueError as error:
        reason, _, detail = str(error).partition(": ")
    except OSError as error:
        reason, detail = "unreadable file", str(error)
    return Rejection(name=row["name"], reason=reason, detail=" ".join(detail.split())[:300])
