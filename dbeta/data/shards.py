"""Shards: tar archives in WebDataset's layout, with the index file of DALI's reader (``wds2idx`` v1.2).

A record is two members, ``00000042.id`` (int64) and ``00000042.adc`` (int16 or int32 [12, L], lead-major), both
little-endian. A shard's bytes depend on its records alone: no times, no owners.
"""

import os
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from dbeta.files import file_digest, write_whole

BLOCK = tarfile.BLOCKSIZE


class ShardWriter:
    """Appends records to a tar; whole records only, in order."""

    def __init__(self, path: Path):
        self.file = path.open("wb")
        self.offset = 0

    def add(self, record: int, adc: np.ndarray) -> int:
        """Append a record; returns the offset of its samples."""
        samples = np.ascontiguousarray(adc, adc.dtype.newbyteorder("<"))
        self._append(_id_member(record))
        self._append(_header(record, "adc", samples.nbytes))
        start = self.offset
        self._append(samples.reshape(-1).view(np.uint8))
        self._append(bytes(-samples.nbytes % BLOCK))
        return start

    def close(self) -> None:
        """End the archive; after this it is on the disk."""
        self._append(bytes(2 * BLOCK))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _append(self, data: bytes | np.ndarray) -> None:
        self.file.write(data)
        self.offset += len(data)


def number_shard(path: Path, first: int, offsets: np.ndarray, sizes: np.ndarray) -> dict[str, object]:
    """Give the records of a shard the ids ``first``, ``first + 1``, ... and write its index; may be repeated.

    How many records before a shard are rejected is known only when all have been read, so ids come last.

    Args:
        offsets, sizes: int64 [n], bytes, of the samples.

    Returns:
        The shard's entry in corpus.json.
    """
    lines = [f"v1.2 {len(offsets)}"]
    with path.open("r+b") as file:
        for record, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist()), start=first):
            place = offset - 3 * BLOCK  # two headers and the block of the id itself
            members = _id_member(record) + _header(record, "adc", size)
            file.seek(place)
            if file.read(len(members)) != members:
                file.seek(place)
                file.write(members)
            lines.append(f"id {place + BLOCK} 8 {record:08d}.id adc {offset} {size} {record:08d}.adc")
        file.flush()
        os.fsync(file.fileno())
    write_whole(path.with_suffix(".idx"), "\n".join(lines) + "\n")
    return {
        "name": path.name, "records": len(offsets), "bytes": path.stat().st_size, "sha256": file_digest(path)
    }  # fmt: skip


def _id_member(record: int) -> bytes:
    return _header(record, "id", 8) + record.to_bytes(8, "little").ljust(BLOCK, b"\0")


def _header(record: int, kind: str, size: int) -> bytes:
    block = bytearray(_template(kind, size))
    block[:8] = b"%08d" % record
    block[148:156] = b"%06o\0 " % sum(block)  # the checksum; the template has spaces in its place, as is the rule
    return bytes(block)


@lru_cache
def _template(kind: str, size: int) -> bytes:
    member = tarfile.TarInfo(f"{0:08d}.{kind}")
    member.size = size
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[148:156] = b" " * 8
    return bytes(block)
