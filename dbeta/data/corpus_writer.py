"""Writing a corpus: in parallel, resumable, atomic, in memory that does not grow with the number of records.

Tasks are permuted once by seed and cut into shards. A worker process reads the tasks of one shard, writes its tar,
index and rows under temporary names and renames them, the rows last: a shard with its rows is whole, and a run that was
killed goes on with the shards that have none. At the end the rows are joined, and ``corpus.json`` makes the folder a
corpus.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dbeta.data.corpus import FORMAT, VERSION, file_digest
from dbeta.data.records import Record, Rejection
from dbeta.data.reports import normalise
from dbeta.runtime import progress

SHARD_RECORDS = 1000
ROW = pa.schema(
    [
        ("key", pa.int64()), ("name", pa.string()), ("subject", pa.string()), ("text", pa.string()),
        ("split", pa.string()), ("rate_hz", pa.float64()), ("samples", pa.int32()), ("dtype", pa.string()),
        ("gain", pa.list_(pa.float64())), ("baseline", pa.list_(pa.int32())), ("present", pa.list_(pa.bool_())),
        ("flat", pa.list_(pa.bool_())), ("shard", pa.int32()), ("offset", pa.int64()),
        ("labels", pa.list_(pa.string())), ("sha256", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a corpus is made of; a resumed preparation must have the same.

    Attributes:
        source: name of the data set.
        tasks: what ``read`` understands, one entry per record.
        read: tasks of a shard to one ``Record`` or ``Rejection`` each, in order; runs in worker processes.
        shuffle: permute the tasks (synthetic records need none).
        validation: share of subjects held out where a record does not say its split.
    """

    source: str
    tasks: Sequence[Any]
    read: Callable[[Sequence[Any]], Any]
    seed: int = 0
    cleaning: str = "paper"
    shuffle: bool = True
    validation: float = 0.05
    facts: dict[str, Any] | None = None


def write_corpus(plan: Plan, out: Path, *, workers: int = 2, rejected: Sequence["Rejection"] = ()) -> dict[str, Any]:
    """Write the corpus of ``plan``; returns the content of corpus.json.

    Args:
        rejected: records refused before they became tasks (no file, a duplicate in a table).

    Raises:
        ValueError: ``out`` holds something else, or an unfinished corpus of another plan.
    """
    parts = _begin(plan, out)
    order = (
        np.random.default_rng(plan.seed).permutation(len(plan.tasks)) if plan.shuffle else np.arange(len(plan.tasks))
    )
    shards = [order[low : low + SHARD_RECORDS] for low in range(0, len(order), SHARD_RECORDS)]
    missing = [i for i in range(len(shards)) if not (parts / f"{i:05d}.parquet").is_file()]
    with progress(f"prepare {plan.source}", len(order)) as advance:
        advance(sum(len(shards[i]) for i in set(range(len(shards))) - set(missing)))
        jobs = ((plan.read, [plan.tasks[i] for i in shards[s]], s, out, plan.cleaning) for s in missing)
        for done in _run(jobs, workers):
            advance(done)
    return _finish(plan, out, parts, len(shards), rejected)


def _run(jobs: Any, workers: int) -> Any:
    if workers == 1:
        yield from (_write_shard(*job) for job in jobs)
        return
    # Workers are spawned: a process with torch's threads must not be forked. Few jobs are handed out at a time, since
    # each carries its tasks.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = set()
        for job in jobs:
            running.add(pool.submit(_write_shard, *job))
            while len(running) > 2 * workers:
                first = next(as_completed(running))
                running.remove(first)
                yield first.result()
        yield from (future.result() for future in as_completed(running))


def _begin(plan: Plan, out: Path) -> Path:
    if (out / "corpus.json").exists():
        raise ValueError(f"--out {out} is already a corpus; choose another folder or delete it first")
    parts = out / "parts"
    digest = hashlib.sha256(repr((plan.source, plan.seed, plan.cleaning, len(plan.tasks))).encode())
    for task in plan.tasks:
        digest.update(repr(task).encode())
    mark = parts / "plan"
    if out.is_dir() and any(out.iterdir()):
        if not mark.is_file():
            raise ValueError(f"--out {out} is not empty and not an unfinished corpus; choose another folder")
        if mark.read_text() != digest.hexdigest():
            raise ValueError(f"--out {out} holds an unfinished corpus of other records or options; delete it first")
        return parts
    try:
        parts.mkdir(parents=True)
        (out / "shards").mkdir()
        mark.write_text(digest.hexdigest())
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error}") from None
    return parts


def _write_shard(read: Callable, tasks: Sequence[Any], shard: int, out: Path, cleaning: str) -> int:
    """One shard: tar and index, then its rejections, then its rows, each whole or absent."""
    rows, refused = [], []
    name = f"{shard:05d}"
    tar_path, index_path = out / "shards" / f".{name}.tar", out / "shards" / f".{name}.idx"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar, index_path.open("w") as index:
        entries = []
        for position, record in enumerate(read(tasks)):
            if isinstance(record, Rejection):
                refused.append((record.name, record.reason, "rejected", record.detail))
                continue
            refused += [(record.name, note, "repaired", detail) for note, detail in record.notes]
            key = shard * SHARD_RECORDS + position
            members = []
            payload = np.ascontiguousarray(record.adc).astype(record.adc.dtype.newbyteorder("<"), copy=False).tobytes()
            for kind, content in (("id", np.int64(key).tobytes()), ("adc", payload)):
                member = tarfile.TarInfo(f"{key:08d}.{kind}")
                member.size = len(content)
                start = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(member, io.BytesIO(content))
                members.append(f"{kind} {start} {len(content)} {member.name}")
            entries.append(" ".join(members))
            rows.append(_row(record, key, shard, start, payload, cleaning))
        index.write(f"v1.2 {len(entries)}\n" + "".join(f"{entry}\n" for entry in entries))
    os.replace(tar_path, out / "shards" / f"{name}.tar")
    os.replace(index_path, out / "shards" / f"{name}.idx")
    with (out / "parts" / f"{name}.json").open("w") as file:
        json.dump(refused, file)
    _sync(out / "shards" / f"{name}.tar")
    partial = out / "parts" / f".{name}.parquet"
    digest = {"sha256": file_digest(out / "shards" / f"{name}.tar")}
    pq.write_table(pa.Table.from_pylist(rows, ROW.with_metadata(digest)), partial)
    _sync(partial)
    os.replace(partial, out / "parts" / f"{name}.parquet")
    return len(tasks)


def _row(record: Record, key: int, shard: int, offset: int, payload: bytes, cleaning: str) -> dict[str, Any]:
    return {
        "key": key, "name": record.name, "subject": record.subject, "text": normalise(record.report, cleaning),
        "split": record.split, "rate_hz": float(record.rate_hz), "samples": record.adc.shape[1],
        "dtype": record.adc.dtype.name, "gain": np.asarray(record.gain, float).tolist(),
        "baseline": np.asarray(record.baseline).tolist(), "present": np.asarray(record.present).tolist(),
        "flat": np.asarray(record.flat).tolist(), "shard": shard, "offset": offset, "labels": list(record.labels),
        "sha256": hashlib.sha256(payload).hexdigest()[:16],
    }  # fmt: skip


def _finish(plan: Plan, out: Path, parts: Path, count: int, rejected: Sequence[Rejection]) -> dict[str, Any]:
    paths = [parts / f"{i:05d}.parquet" for i in range(count)]
    table = pa.concat_tables([pq.read_table(path, schema=ROW) for path in paths]) if paths else ROW.empty_table()
    counts = Counter(table["text"].to_pylist())
    texts = list(counts)  # in order of first occurrence, which the seed decides
    number = {text: i for i, text in enumerate(texts)}
    report = pa.array([number[text] for text in table["text"].to_pylist()], pa.int32())
    split = pa.array(_splits(table, plan))
    table = table.drop_columns(["text", "split"])
    table = table.add_column(0, "record", pa.array(np.arange(table.num_rows)))
    table = table.append_column("report", report).append_column("split", split)
    _write_parquet(table, out / "records.parquet")
    _write_parquet(
        pa.table(
            {"report": pa.array(np.arange(len(texts)), pa.int32()), "text": texts, "count": list(counts.values())}
        ),
        out / "reports.parquet",
    )
    refused = [(r.name, r.reason, "rejected", r.detail) for r in rejected]
    for i in range(count):
        refused += json.loads((parts / f"{i:05d}.json").read_text())
    with (out / "rejected.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("name", "reason", "action", "detail"), *sorted(map(tuple, refused))])
    info = {
        "format": FORMAT, "version": VERSION, "source": plan.source, "cleaning": plan.cleaning, "seed": plan.seed,
        "records": table.num_rows, "reports": len(texts), "subjects": len(set(table["subject"].to_pylist())),
        "rejected": sum(row[2] == "rejected" for row in refused),
        "repaired": sum(row[2] == "repaired" for row in refused),
        "splits": dict(Counter(split.to_pylist())),
        "labels": sorted({label for labels in table["labels"].to_pylist() for label in labels}),
        "shards": [_shard_entry(out, parts, i) for i in range(count)], **(plan.facts or {}),
    }  # fmt: skip
    partial = out / ".corpus.json"
    partial.write_text(json.dumps(info, indent=1))
    _sync(partial)
    os.replace(partial, out / "corpus.json")
    shutil.rmtree(parts)
    return info


def _shard_entry(out: Path, parts: Path, index: int) -> dict[str, Any]:
    metadata = pq.read_metadata(parts / f"{index:05d}.parquet")
    path = out / "shards" / f"{index:05d}.tar"
    digest = metadata.schema.to_arrow_schema().metadata[b"sha256"].decode()
    return {"name": path.name, "records": metadata.num_rows, "bytes": path.stat().st_size, "sha256": digest}


def _splits(table: pa.Table, plan: Plan) -> list[str]:
    """A record's own split, or by a seeded hash of its subject, so that no subject is on both sides."""

    def drawn(subject: str) -> str:
        word = hashlib.sha256(f"{plan.seed}:{subject}".encode()).digest()[:8]
        return "validation" if int.from_bytes(word) < plan.validation * 2**64 else "train"

    return [own or drawn(s) for own, s in zip(table["split"].to_pylist(), table["subject"].to_pylist())]


def _write_parquet(table: pa.Table, path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    pq.write_table(table, partial)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
