"""Files that are whole or absent: written aside, synced, renamed; and what tells a damaged one."""

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path


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
        head = file.read(1024).lstrip().lower()
    if not head:
        return "is an empty file; download it again"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint: the download met a login or an error page; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it stands for; fetch it with git lfs pull"
    return ""


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
