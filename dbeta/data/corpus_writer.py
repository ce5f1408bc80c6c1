"""Writing a corpus: in parallel, resumable, atomic, in memory that grows with the distinct reports only.

    1. plan    a table with a row per record of the data set, permuted once by seed, cut into shards, put on disk
    2. read    a worker reads the rows of one shard and writes its tar and its part of the tables; the part comes last
    3. number  how many records were rejected is known now: every shard gets its ids, its index and its checksum
    4. finish  the parts are joined; corpus.json makes the folder a corpus

A killed run goes on where it was: a shard with its part is whole, step 3 may be repeated, step 4 is quick.
"""

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dbeta.data.corpus import BUILDING, FORMAT, VERSION
from dbeta.data.pool import WorkerPool
from dbeta.data.records import Record, Rejection
from dbeta.data.shards import ShardWriter, number_shard
from dbeta.files import file_digest, put_in_place, sync_file, write_csv, write_whole

SHARD_RECORDS = 1000
PART = pa.schema(
    [
        ("name", pa.string()), ("subject", pa.string()), ("text", pa.string()), ("split", pa.string()),
        ("rate_hz", pa.float64()), ("samples", pa.int32()), ("dtype", pa.string()), ("gain", pa.list_(pa.float64())),
        ("baseline", pa.list_(pa.int32())), ("present", pa.list_(pa.bool_())), ("flat", pa.list_(pa.bool_())),
        ("shard", pa.int32()), ("offset", pa.int64()), ("labels", pa.list_(pa.string())), ("sha256", pa.string()),
    ]
)  # fmt: skip
REJECTED = ("name", "reason", "action", "detail")  # columns of rejected.csv
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a corpus is made of.

    Attributes:
        table: a row per record, with whatever columns ``read`` needs. A row whose ``refused`` column is not null is
            rejected for that reason (with ``name`` and ``detail``) and never read.
        read: rows to one ``Record`` or ``Rejection`` each, in order; runs in worker processes, so it is picklable.
        shuffle: permute the rows (synthetic records need none).
        facts: further entries of corpus.json.
    """

    table: pa.Table
    read: Callable[[list[Row]], Iterator[Record | Rejection]]
    shuffle: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides a corpus beside the raw records; a resumed preparation must have the same.

    Attributes:
        validation: share of the subjects held out, where the data set does not say a record's split itself.
    """

    source: str
    root: str = ""
    limit: int | None = None
    seed: int = 0
    cleaning: str = "paper"
    validation: float = 0.05


@dataclass(frozen=True)
class _Job:
    read: Callable
    options: Options
    out: Path


def write_corpus(plan: Plan, options: Options, out: Path, *, workers: int = 2) -> dict[str, Any]:
    """Write the corpus of ``plan`` to ``out``; returns the content of corpus.json.

    Raises:
        ValueError: ``out`` holds something else, cannot be written, or holds an unfinished corpus of other options; or
            not one record can be used, and then nothing but rejected.csv is left in ``out``.
    """
    from dbeta.runtime import progress

    with _claimed(out, options) as parts:
        planned = parts / "plan.arrow"
        if not planned.is_file():
            _write_plan(plan, options.seed, planned)
        sizes = _shard_sizes(planned)
        job = _Job(plan.read, options, out)
        missing = [i for i in range(len(sizes)) if not _part(out, i).is_file()]
        with WorkerPool(min(workers, len(sizes))) as pool:
            with progress(f"prepare {options.source}", sum(sizes)) as advance:
                advance(sum(sizes) - sum(sizes[i] for i in missing))
                for done in pool(_write_shard, ((job, shard) for shard in missing)):
                    advance(done)
            counts = [pq.read_metadata(_part(out, i)).num_rows for i in range(len(sizes))]
            first = np.cumsum([0, *counts]).tolist()
            with progress("index and checksums", sum(counts)) as advance:
                entries = []
                for entry in pool(_number, ((out, i, first[i]) for i in range(len(sizes)) if counts[i])):
                    entries.append(entry)
                    advance(entry["records"])
        if not entries:
            raise ValueError(_none_kept(options, out, len(sizes)))
        return _finish(plan, options, out, len(sizes), sorted(entries, key=lambda entry: entry["name"]))


# --- 1. plan ---------------------------------------------------------------------------------------------------------


class _claimed:
    """The folder of parts, made or found, locked against a second preparation while it is used."""

    def __init__(self, out: Path, options: Options):
        self.out, self.parts = out, out / BUILDING
        self.wanted = {**options.__dict__, "version": VERSION}

    def __enter__(self) -> Path:
        out, mark = self.out, self.parts / "options.json"
        if (out / "corpus.json").exists():
            raise ValueError(f"--out {out} is already a corpus; choose another folder or delete it first")
        begun = {path.relative_to(out).as_posix() for path in out.rglob("*")} if out.is_dir() else set()
        again = {"rejected.csv"} if _is_rejected(out / "rejected.csv") else set()  # all that is left if none was kept
        if not begun <= {BUILDING, f"{BUILDING}/.options.json", *again}:  # else one was killed in its first moment
            if not mark.is_file():
                raise ValueError(f"--out {out} is not empty and not an unfinished corpus; choose another folder")
            held = json.loads(mark.read_text())
            if other := [key for key in self.wanted if held.get(key) != self.wanted[key]]:
                raise ValueError(
                    f"--out {out} holds an unfinished corpus with another {', '.join(other)}; "
                    "repeat its options to finish it, or delete it first"
                )
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            write_whole(mark, json.dumps(self.wanted))
            (out / "shards").mkdir(exist_ok=True)
            self.lock = (self.parts / "lock").open("w")
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise ValueError(f"--out {out} is being written by another dbeta prepare; wait for it") from None
        return self.parts

    def __exit__(self, *_: object) -> None:
        self.lock.close()


def _is_rejected(path: Path) -> bool:
    """Whether the file is a rejected.csv of ours, and not a user's that happens to have its name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(100).split(b"\r\n")[0] == ",".join(REJECTED).encode()


def _write_plan(plan: Plan, seed: int, path: Path) -> None:
    """Rows in their final order, a batch per shard; those refused already are the last batch."""
    table, refused = plan.table, np.zeros(len(plan.table), bool)
    if "refused" in table.column_names:
        refused = pc.is_valid(table["refused"]).to_numpy()
    kept = np.flatnonzero(~refused)
    if plan.shuffle:
        kept = kept[np.random.default_rng(seed).permutation(len(kept))]
    partial = path.with_name(f".{path.name}")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        for low in range(0, len(kept), SHARD_RECORDS):
            rows = table.take(pa.array(kept[low : low + SHARD_RECORDS])).combine_chunks()
            writer.write_table(rows, max_chunksize=SHARD_RECORDS)
    rows = table.filter(pa.array(refused)).select(["name", "refused", "detail"]).to_pylist() if refused.any() else []
    noted = [(row["name"], row["refused"], "rejected", row["detail"] or "") for row in rows]
    write_whole(path.with_name("refused.json"), json.dumps(noted))
    put_in_place(partial, path)


def _shard_sizes(planned: Path) -> list[int]:
    with pa.memory_map(str(planned)) as file:
        reader = pa.ipc.open_file(file)
        return [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]


# --- 2. read, 3. number: in worker processes -------------------------------------------------------------------------


def _write_shard(job: _Job, shard: int) -> int:
    """One shard: its tar under provisional ids, then its part of the tables; each whole or absent."""
    with pa.memory_map(str(job.out / BUILDING / "plan.arrow")) as file:
        tasks = pa.ipc.open_file(file).get_batch(shard).to_pylist()
    rows, noted = [], []
    path = job.out / "shards" / f"{shard:05d}.tar"
    partial = path.with_name(f".{path.name}")
    writer = ShardWriter(partial)
    for record in job.read(tasks):
        if isinstance(record, Rejection):
            noted.append((record.name, record.reason, "rejected", record.detail))
            continue
        noted += [(record.name, reason, "repaired", detail) for reason, detail in record.notes]
        rows.append(_row(record, shard, writer.add(len(rows), record.adc), job.options))
    writer.close()
    put_in_place(partial, path)
    part = _part(job.out, shard)
    table = pa.Table.from_pylist(rows, PART.with_metadata({"noted": json.dumps(noted)}))
    _write_parquet([table], part, table.schema)
    return len(tasks)


def _row(record: Record, shard: int, offset: int, options: Options) -> Row:
    return {
        "name": record.name, "subject": record.subject, "text": record.report,
        "split": record.split or drawn_split(record.subject, options.seed, options.validation),
        "rate_hz": float(record.rate_hz), "samples": record.adc.shape[1], "dtype": record.adc.dtype.name,
        "gain": record.gain, "baseline": record.baseline, "present": record.present, "flat": record.flat,
        "shard": shard, "offset": offset, "labels": record.labels,
        "sha256": hashlib.sha256(np.ascontiguousarray(record.adc)).hexdigest()[:16],
    }  # fmt: skip


def drawn_split(subject: str, seed: int, validation: float) -> str:
    """A subject's split by a seeded hash, so that none is on both sides whatever else the corpus holds."""
    word = int.from_bytes(hashlib.sha256(f"{seed}:{subject}".encode()).digest()[:8])
    return "validation" if word < validation * 2**64 else "train"


def _number(out: Path, shard: int, first: int) -> dict[str, Any]:
    table = pq.read_table(_part(out, shard), columns=["offset", "samples", "dtype"])
    width = np.where(pc.equal(table["dtype"], "int16").to_numpy(zero_copy_only=False), 2, 4)
    sizes = 12 * table["samples"].to_numpy().astype(np.int64) * width
    return number_shard(out / "shards" / f"{shard:05d}.tar", first, table["offset"].to_numpy(), sizes)


# --- 4. finish -------------------------------------------------------------------------------------------------------


def _finish(plan: Plan, options: Options, out: Path, shards: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
    noted = _noted(out, shards)
    texts, splits, subjects, labels = _Texts(options.cleaning), Counter(), set(), set()

    def joined() -> Iterator[pa.Table]:
        first = 0
        for shard in range(shards):
            part = pq.read_table(_part(out, shard))
            splits.update(part["split"].to_pylist())
            subjects.update(part["subject"].to_pylist())
            labels.update(pc.unique(part["labels"].combine_chunks().flatten()).to_pylist())
            report = pa.array([texts.number(text) for text in part["text"].to_pylist()], pa.int32())
            record = pa.array(np.arange(first, first := first + len(part)))
            yield part.drop_columns("text").add_column(0, "record", record).add_column(1, "report", report).cast(schema)

    schema = pa.schema([("record", pa.int64()), ("report", pa.int32()), *(f for f in PART if f.name != "text")])
    _write_parquet(joined(), out / "records.parquet", schema)
    table = pa.table({"text": list(texts.numbers), "count": pa.array(texts.counts, pa.int64())})
    table = table.add_column(0, "report", pa.array(np.arange(len(table)), pa.int32()))
    _write_parquet([table], out / "reports.parquet", table.schema)
    write_csv(out / "rejected.csv", [REJECTED, *noted])
    for shard in set(range(shards)) - {int(entry["name"][:5]) for entry in entries}:
        (out / "shards" / f"{shard:05d}.tar").unlink(missing_ok=True)  # not one record of it was good
    info = {
        "format": FORMAT, "version": VERSION, "source": options.source, "cleaning": options.cleaning,
        "seed": options.seed, "records": sum(entry["records"] for entry in entries), "reports": len(table),
        "subjects": len(subjects), "rejected": sum(row[2] == "rejected" for row in noted),
        "repaired": sum(row[2] == "repaired" for row in noted), "splits": dict(sorted(splits.items())),
        "labels": sorted(labels), **plan.facts, "shards": entries,
        "files": {name: file_digest(out / name) for name in ("records.parquet", "reports.parquet", "rejected.csv")},
    }  # fmt: skip
    write_whole(out / "corpus.json", json.dumps(info, indent=1))
    shutil.rmtree(out / BUILDING)
    return info


def _noted(out: Path, shards: int) -> list[tuple[str, ...]]:
    """The rows of rejected.csv, sorted."""
    noted = json.loads((out / BUILDING / "refused.json").read_text())
    for shard in range(shards):
        noted += json.loads(pq.read_schema(_part(out, shard)).metadata[b"noted"])
    return sorted(map(tuple, noted))


def _none_kept(options: Options, out: Path, shards: int) -> str:
    """What to say where no record is left. Of the folder only rejected.csv is, so that it can be used again."""
    noted = _noted(out, shards)
    write_csv(out / "rejected.csv", [REJECTED, *noted])
    shutil.rmtree(out / "shards")
    shutil.rmtree(out / BUILDING)
    where = f"{options.source} in {options.root}" if options.root else options.source
    if not noted:
        return f"{where}: its tables list no record; give the folder of the whole data set as ROOT"
    reason, count = Counter(row[1] for row in noted).most_common(1)[0]
    name, _, _, detail = next(row for row in noted if row[1] == reason)
    first = f"the first {len(noted):,} records (--limit)" if options.limit else f"{len(noted):,} records"
    return (
        f"{where}: {first} found and all rejected, {count:,} of them for: {reason} (such as {name}: {detail}); "
        f"see {out / 'rejected.csv'}, put the records right or give another ROOT, and repeat the command"
    )


class _Texts:
    """Unique normalised reports, numbered by first occurrence, which the seed decides."""

    def __init__(self, cleaning: str):
        from dbeta.data.reports import normalise  # here, so that worker processes do without torch

        self.normalise, self.cleaning = normalise, cleaning
        self.numbers: dict[str, int] = {}
        self.counts: list[int] = []

    def number(self, raw: str) -> int:
        number = self.numbers.setdefault(self.normalise(raw, self.cleaning), len(self.numbers))
        if number == len(self.counts):
            self.counts.append(0)
        self.counts[number] += 1
        return number


def _part(out: Path, shard: int) -> Path:
    return out / BUILDING / f"{shard:05d}.parquet"


def _write_parquet(tables: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    partial = path.with_name(f".{path.name}")
    with pq.ParquetWriter(partial, schema) as writer:
        for table in tables:
            writer.write_table(table)
    sync_file(partial)
    put_in_place(partial, path)
