"""``dbeta embed`` and ``dbeta ask``: features and scores of files, whatever their format; what fails is listed.

Work is kept in parts beside the output until it is complete, so a killed run goes on where it was. A part is found
again by the model's tensors, the options, and names, sizes and times of its files.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbeta.data.records import LEADS, read_record
from dbeta.data.resample import resample
from dbeta.data.tables import load_arrays, save_arrays
from dbeta.files import must_be_writable, put_in_place, write_csv
from dbeta.runtime import announce, progress

if TYPE_CHECKING:
    from dbeta.models.dbeta import DBeta

PART = 512  # records whose features a killed run may lose
KINDS = (".parquet", ".npz")


@dataclass(kw_only=True)
class Encoded:
    """Features of records that could be read, and why others could not.

    Attributes:
        records: names; seconds: their lengths; leads: the leads each has.
        features: float32 [N, D].
        failures: (name, reason).
    """

    features: np.ndarray
    records: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    leads: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


def encode_files(
    model: "DBeta",
    names: Sequence[str],
    *,
    lengths: str = "crop",
    batch: int = 64,
    workers: int = 2,
    advance: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Features of records by name; see ``Inference.encode_ecg`` for ``lengths``. The next batch is read meanwhile."""
    result, found = Encoded(features=np.zeros((0, model.config.width), np.float32)), []
    with ThreadPoolExecutor(workers) as pool:
        for group, records in _ahead(pool, [names[i : i + batch] for i in range(0, len(names), batch)]):
            ecgs = []
            for name, record in zip(group, records):
                if isinstance(record, Exception):
                    result.failures.append((name, _reason(name, record)))
                    continue
                ecg, leads = record
                ecgs.append(ecg)
                result.records.append(name), result.leads.append(leads), result.seconds.append(ecg.shape[1] / 500)
            if ecgs:
                found.append(model.encode_ecg(ecgs, lengths=lengths, batch=batch).float().cpu().numpy())
            advance(len(group))
    if found:
        result.features = np.concatenate(found)
    return result


def _ahead(pool: ThreadPoolExecutor, groups: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], list[Any]]]:
    waiting = pool.map(_read, groups[0]) if groups else None
    for place, group in enumerate(groups):
        records = list(waiting)
        waiting = pool.map(_read, groups[place + 1]) if place + 1 < len(groups) else None
        yield group, records


def _read(name: str) -> tuple[np.ndarray, str] | Exception:
    try:
        record = read_record(name)
        leads = " ".join(lead for lead, there in zip(LEADS, record.present) if there)
        return resample(record.to_mv(), record.rate_hz), leads
    except Exception as error:  # damaged files provoke whatever their libraries raise; one must not end the run
        return error


def _reason(name: str, error: Exception) -> str:
    said = " ".join(str(error).split()).removeprefix(f"{name}: ")
    return said if isinstance(error, ValueError) else f"{type(error).__name__} {said}"


def embed(
    model: "DBeta", names: Sequence[str], out: Path, *, lengths: str = "crop", batch: int = 64, workers: int = 2
) -> list[tuple[str, str]]:
    """Write features of records to ``out``; returns (name, reason) of what failed, also in ``OUT.failures.csv``.

    ``.parquet`` has the columns record, seconds, leads and feature (a list of D float32); ``.npz`` the arrays record,
    seconds, leads and feature, for ``numpy.load``.

    Raises:
        ValueError: another ending, a file that is already there, or no place to write to.
    """
    from dbeta.evaluation.features import model_checksum

    check_out(out)
    groups = [names[i : i + PART] for i in range(0, len(names), PART)]
    parts = Parts(out.with_name(out.name + ".parts"), f"{model_checksum(model)} {lengths}", groups)
    if before := sum(len(groups[place]) for place in range(len(groups)) if parts.has(place)):
        announce(f"going on: {before:,} of {len(names):,} records were done before")
    with progress("records", len(names)) as advance:
        for place, group in enumerate(groups):
            if parts.has(place):
                advance(len(group))
            else:
                how = {"lengths": lengths, "batch": batch, "workers": workers, "advance": advance}
                parts.save(place, encode_files(model, group, **how))
    (_write_parquet if out.suffix == ".parquet" else _write_npz)(out, iter(parts), model.config.width)
    failures = [failure for part in parts for failure in part.failures]
    if failures:
        write_table(out.with_name(out.name + ".failures.csv"), ("record", "reason"), failures)
    shutil.rmtree(parts.folder)
    return failures


def check_out(out: Path) -> None:
    """Whether ``embed`` can write ``out``; it raises what ``embed`` would."""
    must_be_writable(out, KINDS)
    if out.exists():
        raise ValueError(f"{out} is already there; remove it or choose another --out")


class Parts:
    """Finished groups of records in a folder beside the output, each with the key of what it was made of."""

    def __init__(self, folder: Path, settings: str, groups: Sequence[Sequence[str]]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.keys = [part_key(settings, group) for group in groups]

    def has(self, place: int) -> bool:
        """Whether this group is done, with these options, model and files."""
        path = self._path(place)
        return path.is_file() and load_arrays(path, ())[1]["key"] == self.keys[place]

    def save(self, place: int, done: Encoded) -> None:
        """Keep a group."""
        told = {name: getattr(done, name) for name in ("records", "seconds", "leads", "failures")}
        save_arrays(self._path(place), {"features": done.features}, told | {"key": self.keys[place]})

    def __iter__(self) -> Iterator[Encoded]:
        """The groups in order, one at a time."""
        for place in range(len(self.keys)):
            arrays, told = load_arrays(self._path(place), ("features",))
            del told["key"]
            told["failures"] = [tuple(failure) for failure in told["failures"]]
            yield Encoded(features=arrays["features"], **told)

    def _path(self, place: int) -> Path:
        return self.folder / f"{place:06d}.npz"


def part_key(settings: str, names: Sequence[str]) -> str:
    """Changes with the options, the names, and size or time of a file (of a WFDB record: of its signal files too)."""
    digest = hashlib.sha256(settings.encode())
    for name in names:
        file = Path(name.rpartition("#")[0] or name)
        for part in (file, file.with_suffix(".dat"), file.with_suffix(".mat")):
            stat = part.stat() if part.is_file() else None
            digest.update(f"{name} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def _write_parquet(out: Path, parts: Iterator[Encoded], width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "record": pa.string(),
        "seconds": pa.float32(),
        "leads": pa.string(),
        "feature": pa.list_(pa.float32(), width),
    }
    partial = out.with_name(f".{out.name}")
    with pq.ParquetWriter(partial, pa.schema(kinds.items())) as writer:
        for part in parts:
            feature = pa.FixedSizeListArray.from_arrays(pa.array(part.features.ravel(), pa.float32()), width)
            columns = {"record": part.records, "seconds": part.seconds, "leads": part.leads, "feature": feature}
            writer.write_table(pa.table(columns, pa.schema(kinds.items())))
    put_in_place(partial, out)


def _write_npz(out: Path, parts: Iterator[Encoded], width: int) -> None:
    every = list(parts)
    arrays = {
        "record": np.array([name for part in every for name in part.records], np.str_),
        "seconds": np.array([s for part in every for s in part.seconds], np.float32),
        "leads": np.array([leads for part in every for leads in part.leads], np.str_),
        "feature": np.concatenate([part.features for part in every]),
    }
    save_arrays(out, arrays, {"width": width})


def ask(
    model: "DBeta", names: Sequence[str], prompts: dict[str, Sequence[str]], **how: Any
) -> tuple[list[tuple], list[tuple[str, str]]]:
    """Scores of described classes for records: rows (record, score of each prompt in order), and what failed.

    Args:
        prompts: name -> texts; several count as the mean of their features.
        how: of ``encode_files``.
    """
    classes = model.encode_prompts(prompts).float().cpu().numpy()
    with progress("records", len(names)) as advance:
        done = encode_files(model, names, advance=advance, **how)
    scores = done.features @ classes.T
    return [(name, *row) for name, row in zip(done.records, scores.tolist())], done.failures


def write_table(path: Path, columns: Sequence[str], rows: Sequence[tuple]) -> None:
    """A CSV file that appears whole; floats with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = ([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    write_csv(path, [columns, *cells])


def show(columns: Sequence[str], rows: Sequence[tuple], most: int = 40) -> Any:
    """Rows as a table for people; the folder that all records share is said once."""
    from rich import box
    from rich.table import Table

    shared = os.path.commonpath([Path(name).parent for name, *_ in rows]) if rows else ""
    more = f"the first {most} of {len(rows):,}; --out FILE.csv writes all" if len(rows) > most else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=more, title=shared, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for name, *scores in rows[:most]:
        table.add_row(name.removeprefix(f"{shared}/"), *(f"{score:.3f}" for score in scores))
    return table
