"""Files that are whole or absent: written aside, synced, renamed; and what tells a damaged one."""

import codecs
import contextlib
import csv
import hashlib
import io
import os
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path

# What a file of other data starts with.
KINDS = {b"\x1f\x8b": "a gzip archive", b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"%PDF": "a PDF"}


def file_digest(path: Path) -> str:
    """sha256 of a file, or ``missing``."""
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def foreign(path: Path) -> str:
    """What lies in place of a downloaded file of weights, in words, or "" where nothing is known to be wrong."""
    if not path.is_file():
        return ""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile:
            return "is a damaged archive; download it again"
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):  # it may unpack to anything
            return "is a compressed archive, which torch.save never writes; save its tensors again"
    with path.open("rb") as file:
        start = file.read(1024)
    head = start.lstrip().lower()
    if not head:
        return "is an empty file; download it again"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint: the download met a login or an error page; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it stands for; fetch it with git lfs pull"
    kind = next((kind for mark, kind in KINDS.items() if start.startswith(mark)), "")
    if not kind and _is_text(start) and not pickled(start):
        kind = "a text file"
    return f"is {kind}, not a checkpoint; give the file of its tensors" if kind else ""


def pickled(start: bytes) -> bool:
    """Whether a file that starts so can be a pickle, or an archive of torch with one in it."""
    if start.startswith((b"\x80", b"PK")):
        return True
    with contextlib.suppress(ValueError):  # the oldest pickles are text; this takes them apart and runs nothing
        return all(pickletools.genops(start))
    return False


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c.isspace() for c in text)


def must_be_writable(out: Path, kinds: tuple[str, ...] = (), option: str = "--out") -> None:
    """Refuse a file to write before the work, not after it; its folder may still have to be made.

    Raises:
        ValueError: another ending than one of ``kinds``, a folder, or no place to write to.
    """
    if kinds and out.suffix not in kinds:
        raise ValueError(f"{option} {out}; accepted endings: {', '.join(kinds)}")
    if out.is_dir():
        raise ValueError(f"{option} {out} is a folder; give the name of a file in it")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"{option} {out} cannot be written: {folder} {what}; choose another place")


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the whole of it or what was there before, even after a power cut."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(partial, path)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """A CSV file, the same way; the first row names the columns."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    write_whole(path, table.getvalue())


def sync_file(path: Path) -> None:
    """Make the content of a finished file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished file or folder, durably."""
    os.replace(partial, path)
    sync_file(path.parent)
