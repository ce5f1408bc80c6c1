"""A corpus: WebDataset shards of native integer samples with Parquet tables, the one form in which training reads ECGs.

    CORPUS/corpus.json       format, version, counts, checksums; written last: a folder without it is not a corpus yet
           shards/00000.tar  per record `ID.id` (int64) and `ID.adc` (int16 or int32 [12, L], lead-major, native rate)
           shards/00000.idx  the index of DALI's webdataset reader
           records.parquet   row i is record i: name, subject, report, split, rate, gain, baseline, place in the shards
           reports.parquet   unique normalised reports with counts
           rejected.csv      every record that was rejected or repaired, with its reason

Millivolts are (adc - baseline) / gain; the lowest integer of the type marks an invalid sample.
"""

import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dbeta.files import file_digest

FORMAT, VERSION = "dbeta-corpus", 1
SPLITS = ("train", "validation", "test")
INFO = {"source": str, "version": int, "records": int, "reports": int, "labels": list, "shards": list, "files": dict}
TYPES = {
    **dict.fromkeys(("name", "subject", "split", "dtype", "sha256", "text"), "string"), "labels": "list<string>",
    **dict.fromkeys(("report", "samples", "shard"), "int32"), "record": "int64", "offset": "int64", "count": "int64",
    "rate_hz": "double", "gain": "list<double>", "baseline": "list<int32>", "present": "list<bool>",
    "flat": "list<bool>",
}  # fmt: skip
RECORD_BYTES = 4 * 512  # in a shard, at least: two headers, the id, samples
COLUMN_BYTES = 1 << 30  # of one column, unpacked; the reports of MIMIC-IV-ECG are 0.02 of it
BUILDING = "parts"  # folder of an unfinished preparation
_MAKE = "make one with: dbeta prepare SOURCE ROOT --out CORPUS"


class Corpus:
    """Read access to a corpus folder; columns are read when they are asked for and kept.

    Attributes:
        path: the folder.
        info: the content of corpus.json.
    """

    def __init__(self, path: Path, info: dict[str, Any]):
        self.path, self.info = path, info
        self._columns: dict[str, pa.Array] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a corpus; checks that every file is there and as long as it was (``damage`` reads every byte).

        Raises:
            ValueError: the folder is missing, not a corpus, unfinished, of a newer format, empty or damaged.
        """
        path = Path(path)
        if not (path / "corpus.json").is_file():
            if (path / BUILDING).is_dir():
                raise ValueError(f"corpus {path} is unfinished; give the same dbeta prepare command again to finish it")
            what = "is no corpus (it has no corpus.json)" if path.is_dir() else "is missing"
            raise ValueError(f"corpus {path} {what}; {_MAKE}")
        try:
            info = json.loads((path / "corpus.json").read_text())
            if not isinstance(info, dict) or info.get("format") != FORMAT:
                raise ValueError(f"{path} is not a dbeta corpus (its corpus.json is another program's); {_MAKE}")
            if wrong := [name for name, kind in INFO.items() if not isinstance(info.get(name), kind)]:
                raise ValueError(f"corpus {path} is damaged (corpus.json: no {', '.join(wrong)}); prepare it again")
            if info["version"] > VERSION:
                raise ValueError(
                    f"corpus {path} has format version {info['version']}, dbeta reads up to {VERSION}; upgrade dbeta"
                )
            if not info["records"]:
                raise ValueError(f"corpus {path} is empty: every record was rejected, see {path / 'rejected.csv'}")
            rows = {name: pq.read_metadata(path / f"{name}.parquet").num_rows for name in ("records", "reports")}
            sizes = {str(shard["name"]): shard["bytes"] for shard in info["shards"]}
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, OSError) as error:
            raise ValueError(f"corpus {path} is damaged ({error}); prepare it again") from None
        except pa.ArrowException as error:
            raise ValueError(f"corpus {path} is damaged ({error}); prepare it again") from None
        for name, count in rows.items():
            if count != info[name]:
                raise ValueError(f"corpus {path} is damaged: {count} {name}, corpus.json says {info[name]}")
        for name, size in sizes.items():
            file = path / "shards" / name
            if not re.fullmatch(r"\d{5,9}\.tar", name) or not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"corpus {path} is damaged: shards/{name} is not there with {size} bytes")
        if info["records"] * RECORD_BYTES > sum(sizes.values()) or info["reports"] > info["records"]:
            raise ValueError(f"corpus {path} is damaged: its shards cannot hold {info['records']} records")
        inside = path.resolve()
        for name in ("corpus.json", "records.parquet", "reports.parquet", "shards", *(f"shards/{n}" for n in sizes)):
            if not (path / name).resolve().is_relative_to(inside):
                raise ValueError(f"corpus {path}: {name} is a link out of the corpus; copy what it points to")
        return cls(path, info)

    def __len__(self) -> int:
        return self.info["records"]

    @property
    def source(self) -> str:
        """The data set it was made from, as named to ``dbeta prepare``."""
        return self.info["source"]

    @property
    def labels(self) -> list[str]:
        """All labels that occur."""
        return self.info["labels"]

    @cached_property
    def reports(self) -> list[str]:
        """Unique normalised reports, indexed by the ``report`` column."""
        return self._read("reports.parquet", "text").to_pylist()

    def column(self, name: str, ids: np.ndarray | None = None) -> Any:
        """One column of records.parquet, of some records: an array of numbers, or a list of anything else."""
        if name not in self._columns:
            self._columns[name] = self._read("records.parquet", name)
        column = self._columns[name]
        column = column if ids is None else column.take(pa.array(np.asarray(ids, np.int64)))
        if pa.types.is_list(column.type) and not pa.types.is_string(column.type.value_type):
            return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        if pa.types.is_list(column.type) or pa.types.is_string(column.type):
            return column.to_pylist()
        return column.to_numpy()

    def split_ids(self, split: str) -> np.ndarray:
        """Record ids of ``train``, ``validation``, ``test`` or ``all``, int64 ascending."""
        if split == "all":
            return np.arange(len(self))
        if split not in SPLITS:
            raise ValueError(f"split {split!r}; accepted: {', '.join(SPLITS)}, all")
        return np.flatnonzero(self._is("split", split))

    @cached_property
    def uniform(self) -> bool:
        """Whether every record is int16 at 500 Hz, so that a batch can stay integer until it is on the device."""
        return bool((self.column("rate_hz") == 500).all() and self._is("dtype", "int16").all())

    def read_adc(self, record: int, samples: int | None = None) -> np.ndarray:
        """Samples of one record, or its first ``samples``: int16 or int32 [12, L] at its native rate; thread-safe.

        Raises:
            ValueError: the shard is not there, unreadable, or shorter than the table says.
        """
        _, _, length, narrow = self._place(record)
        length = length if samples is None else min(length, samples)
        return self.read_into(record, np.empty((12, length), "<i2" if narrow else "<i4"))

    def read_into(self, record: int, out: np.ndarray) -> np.ndarray:
        """Fill ``out`` [12, n], rows contiguous, of the record's type, with its first n samples; returns ``out``."""
        shard, offset, length, _ = self._place(record)
        whole = out.shape[1] == length and out.flags.c_contiguous
        # Opening anew costs microseconds and leaves nothing open: a big corpus has more shards than a process may open.
        problem = "ends inside it"
        try:
            descriptor = os.open(self.shard_path(shard), os.O_RDONLY)
            try:
                if whole:
                    done = os.preadv(descriptor, [out], offset) == out.nbytes
                else:
                    step = length * out.itemsize
                    done = all(
                        os.preadv(descriptor, [row], offset + i * step) == row.nbytes for i, row in enumerate(out)
                    )
            finally:
                os.close(descriptor)
        except OSError as error:
            done, problem = False, f"cannot be read ({error.strerror})"
        if not done:
            raise ValueError(
                f"record {record} of {self.path}: {self.shard_path(shard).name} {problem}; "
                "check the corpus with: dbeta doctor CORPUS --checksums"
            )
        return out

    def shard_path(self, shard: int) -> Path:
        """The tar of a shard."""
        return self.path / "shards" / f"{int(shard):05d}.tar"

    def damage(self) -> list[str]:
        """Names of the files whose checksum does not match (none: the corpus is whole); reads every byte."""
        files = {f"shards/{shard['name']}": shard["sha256"] for shard in self.info["shards"]} | self.info["files"]
        return [name for name, digest in files.items() if file_digest(self.path / name) != digest]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {shard["name"]: shard["bytes"] for shard in self.info["shards"]}

    @cached_property
    def _places(self) -> tuple[np.ndarray, ...]:
        return self.column("shard"), self.column("offset"), self.column("samples"), self._is("dtype", "int16")

    def _place(self, record: int) -> tuple[int, int, int, bool]:
        shard, offset, samples, narrow = (part[record].item() for part in self._places)
        size = self._sizes.get(self.shard_path(shard).name, 0)
        if offset < 0 or samples < 0 or offset + 12 * samples * (2 if narrow else 4) > size:
            raise ValueError(
                f"record {record} of {self.path}: {self.shard_path(shard).name} ends inside it; "
                "check the corpus with: dbeta doctor CORPUS --checksums"
            )
        return shard, offset, samples, narrow

    def _is(self, name: str, value: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._read("records.parquet", name)
        return pc.equal(self._columns[name], value).to_numpy(zero_copy_only=False)

    def _read(self, file: str, column: str) -> pa.Array:
        try:
            values = _bounded_column(self.path / file, column)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{self.path / file} is damaged ({error}); prepare the corpus again") from None
        kind, count = re.sub(r"<\w+: ", "<", str(values.type)), len(values)
        if count != self.info[file.removesuffix(".parquet")] or kind != TYPES[column] or values.null_count:
            raise ValueError(f"{self.path / file} is damaged ({column}: {count} of {kind}); prepare the corpus again")
        return values


def _bounded_column(path: Path, column: str) -> pa.Array:
    """A column of a Parquet file, which may unpack to a million times its size: refused beyond ``COLUMN_BYTES``."""
    parts, size = [], 0
    with pq.ParquetFile(path) as file:
        kind = file.schema_arrow.field(column).type
        for batch in file.iter_batches(1000, columns=[column]):
            parts.append(batch.column(0))
            size += parts[-1].nbytes
            if size > COLUMN_BYTES:
                raise pa.ArrowInvalid(f"{column} unpacks to more than {COLUMN_BYTES:,} bytes")
    return pa.chunked_array(parts, kind).combine_chunks()
