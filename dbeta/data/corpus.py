"""A corpus: WebDataset shards of native integer samples with Parquet tables, the one form in which training reads ECGs.

    CORPUS/corpus.json       format, version, counts, checksums; written last: a folder without it is not a corpus yet
           shards/00000.tar  per record `KEY.id` (int64) and `KEY.adc` (int16 or int32 [12, L], lead-major, native rate)
           shards/00000.idx  the index of DALI's webdataset reader
           records.parquet   row i is record i: name, subject, report, split, rate, gain, baseline, place in the shards
           reports.parquet   unique normalised reports with counts
           rejected.csv      every record that was rejected or repaired, with its reason

Millivolts are (adc - baseline) / gain; the lowest integer of the type marks an invalid sample.
"""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT, VERSION = "dbeta-corpus", 1
SPLITS = ("train", "validation", "test")
_MAKE = "make one with: dbeta prepare SOURCE ROOT --out CORPUS"


class Corpus:
    """Read access to a corpus folder.

    Attributes:
        path: the folder.
        info: the content of corpus.json.
        table: records.parquet.
        reports: unique normalised reports, indexed by the ``report`` column.
    """

    def __init__(self, path: Path, info: dict[str, Any], table: pa.Table, reports: list[str]):
        self.path, self.info, self.table, self.reports = path, info, table, reports
        self._files: dict[int, int] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a corpus.

        Raises:
            ValueError: the folder is missing, not a corpus, of a newer format, empty or damaged.
        """
        path = Path(path)
        if not (path / "corpus.json").is_file():
            what = "is no corpus (no corpus.json: interrupted?)" if path.is_dir() else "is missing"
            raise ValueError(f"corpus {path} {what}; {_MAKE}")
        try:
            info = json.loads((path / "corpus.json").read_text())
            if info.get("format") != FORMAT:
                raise ValueError(f"{path} is not a dbeta corpus (format {info.get('format')!r}); {_MAKE}")
            if info["version"] > VERSION:
                raise ValueError(
                    f"corpus {path} has format version {info['version']}, dbeta reads up to {VERSION}; upgrade it"
                )
            if not info["records"]:
                raise ValueError(f"corpus {path} is empty: every record was rejected, see {path / 'rejected.csv'}")
            table = pq.read_table(path / "records.parquet")
            reports = pq.read_table(path / "reports.parquet", columns=["text"])["text"].to_pylist()
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError, pa.ArrowException) as error:
            raise ValueError(f"corpus {path} is damaged ({error}); prepare it again") from None
        if table.num_rows != info["records"]:
            raise ValueError(f"corpus {path} is damaged: {table.num_rows} records, corpus.json says {info['records']}")
        return cls(path, info, table, reports)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def source(self) -> str:
        """The data set it was made from, as named to ``dbeta prepare``."""
        return self.info["source"]

    @property
    def labels(self) -> list[str]:
        """All labels that occur."""
        return self.info["labels"]

    def column(self, name: str, ids: np.ndarray | None = None) -> Any:
        """One column of records.parquet, of some records: an array of numbers, or a list of anything else."""
        column = self.table[name] if ids is None else self.table[name].take(pa.array(np.asarray(ids)))
        if pa.types.is_list(column.type) and not pa.types.is_string(column.type.value_type):
            flat = column.combine_chunks().flatten()
            return flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
        if pa.types.is_list(column.type) or pa.types.is_string(column.type):
            return column.to_pylist()
        return column.to_numpy()

    def split_ids(self, split: str) -> np.ndarray:
        """Record ids of ``train``, ``validation`` or ``test``, int64 ascending."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r}; accepted: {', '.join(SPLITS)}")
        return np.flatnonzero(np.asarray(self.table["split"].to_pylist()) == split)

    @cached_property
    def uniform(self) -> bool:
        """Whether every record is int16 at 500 Hz, so that a batch can stay integer until it is on the device."""
        return bool((self.column("rate_hz") == 500).all()) and set(self.table["dtype"].unique().to_pylist()) == {
            "int16"
        }

    @cached_property
    def _places(self) -> tuple[np.ndarray, ...]:
        return self.column("shard"), self.column("offset"), self.column("samples"), np.asarray(self.column("dtype"))

    def read_adc(self, record: int) -> np.ndarray:
        """Samples of one record, int16 or int32 [12, L] at its native rate; thread-safe.

        Raises:
            ValueError: the shard is shorter than the table says.
        """
        shard, offset, samples, dtype = (part[record] for part in self._places)
        size = 12 * int(samples) * np.dtype(dtype).itemsize
        payload = os.pread(self._descriptor(int(shard)), size, int(offset))
        if len(payload) != size:
            raise ValueError(
                f"record {record} of {self.path}: {len(payload)} of {size} bytes in {self.shard_path(shard).name}; "
                "check it with: dbeta doctor CORPUS --checksums"
            )
        return np.frombuffer(payload, np.dtype(dtype).newbyteorder("<")).reshape(12, -1)

    def shard_path(self, shard: int) -> Path:
        """The tar of a shard."""
        return self.path / "shards" / f"{int(shard):05d}.tar"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.shard_path(shard), os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def damaged_shards(self) -> list[str]:
        """Names of the shards whose checksum does not match; reads every byte."""
        return [s["name"] for s in self.info["shards"] if file_digest(self.path / "shards" / s["name"]) != s["sha256"]]


def file_digest(path: Path) -> str:
    """sha256 of a file, or ``missing``."""
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
