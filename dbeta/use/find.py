"""Which records a user means: files, folders, globs and tables of paths, of any supported format."""

import contextlib
import csv
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from dbeta.data.formats import count_exams
from dbeta.data.records import ACCEPTED, HDF5

TABLES = (".csv", ".tsv", ".txt", ".parquet")
COLUMNS = ("path", "record", "file", "filename", "filename_hr", "waveform_path")


def find_records(paths: Iterable[str | Path], column: str = "") -> list[str]:
    """Names of records for ``dbeta.read_ecg``, in order, each once.

    Args:
        paths: a record; a folder, searched with all below it; a glob (``**`` goes down); a ``.csv``, ``.tsv`` or
            ``.parquet`` table with a column of paths, or a ``.txt`` with one path a line, relative to the table.
        column: the table's column; "": the first of ``COLUMNS`` that it has.

    Raises:
        ValueError: a path or a column that is not there, or nothing found.
    """
    paths = [str(path) for path in paths]
    found = list(dict.fromkeys(name for path in paths for name in _expand(path, column)))
    if not found:
        raise ValueError(f"no record in {', '.join(paths)}; accepted: {ACCEPTED}")
    return found


def _expand(path: str, column: str) -> Iterator[str]:
    file = Path(path)
    if not path:  # it would be the folder we are in
        raise ValueError("a path is empty; give records, folders, globs or tables of paths")
    if file.is_dir():
        if (file / "corpus.json").is_file():
            raise ValueError(f"{path} is a corpus; give raw records, or use dbeta evaluate")
        yield from _search(file)
    elif file.is_file() and file.suffix in TABLES:
        yield from _rows(file, column)
    elif not file.exists() and any(mark in path for mark in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
        for match in matches:
            yield from _search(match) if match.is_dir() else _named(match) if _telling(match) else ()
    elif file.exists() or Path(f"{path}.hea").is_file() or Path(path.rpartition("#")[0]).is_file():
        yield from _named(file)
    else:
        raise ValueError(f"{path} is not there; give records, folders, globs or tables of paths")


def _search(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if _telling(file) and file.is_file() and not file.name.startswith("."):
            yield from _named(file)


def _telling(file: Path) -> bool:
    """Whether the ending says that this is a record, and not a part of one."""
    return file.suffix in (".hea", ".mat", ".dat", *HDF5)


def _named(file: Path) -> Iterator[str]:
    """A WFDB record by its header, every exam of a CODE file, anything else as it is."""
    if file.suffix in (".dat", ".mat") and file.with_suffix(".hea").is_file():
        yield str(file.with_suffix(".hea"))
        return
    exams = None
    if file.suffix in HDF5 and file.is_file():
        with contextlib.suppress(ValueError):  # the reader says what is wrong with it
            exams = count_exams(file)
    yield from (f"{file}#{row}" for row in range(exams)) if exams is not None else (str(file),)


def _rows(table: Path, column: str) -> Iterator[str]:
    for cell in _column(table, column):
        name = str(cell or "").strip()
        if name:
            beside = table.parent / name
            yield from _named(Path(name) if Path(name).is_absolute() else beside)


def _column(table: Path, column: str) -> list[str]:
    if table.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(table).names
            return pq.read_table(table, columns=[_choose(names, column, table)]).column(0).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{table} is not a Parquet table: {error}") from None
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            if table.suffix == ".txt":
                return file.read().splitlines()
            rows = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
            chosen = _choose(rows.fieldnames or [], column, table)
            return [row[chosen] for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is not a table of paths in UTF-8: {error}") from None


def _choose(names: Iterable[str], column: str, table: Path) -> str:
    names = list(names)
    for wanted in [column] if column else COLUMNS:
        if wanted in names:
            return wanted
    wanted = column or " or ".join(COLUMNS)
    raise ValueError(f"{table} has no column {wanted}; it has {', '.join(names) or 'none'}; choose one with --column")
