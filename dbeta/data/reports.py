"""Reports: joined, normalised and tokenised once per unique text; training only gathers token ids from a table.

MIMIC-IV-ECG has about 180,000 distinct reports for 800,035 records (RECIPE 2), so the whole token table is some 11 MB
and lies on the device.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from dbeta.data.tables import load_arrays, save_arrays
from dbeta.data.tokenizer import Tokenizer
from dbeta.runtime import announce

_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def join(cells: Iterable[object]) -> str:
    """One report from the report columns of a record, in order, with one space between (RECIPE 2).

    Cells that are not text (None, NaN) or are blank are skipped.
    """
    return " ".join(cell.strip() for cell in cells if isinstance(cell, str) and cell.strip())


def normalise(text: str, mode: Literal["paper", "released"] = "paper") -> str:
    """Clean a joined report.

    ``paper`` (section 4.1): lower case, stripped, "ekg" -> "ecg", punctuation removed. Punctuation is every character
    that is neither letter, digit nor space (so also ``*``, ``=``, ``<``, ``_``) and becomes a space, so that words
    written together stay apart: "v4,5,6" -> "v4 5 6", "st-t" -> "st t", "contraction(s)" -> "contraction s". The one
    exception is a point between two digits, which belongs to a number: "0.24" stays. A comma does not, because
    lead lists ("v2,3") far outnumber decimal commas in the 10,720 PTB-XL reports.

    ``released`` (MODEL section 11): lower case, stripped, "ekg" -> "ecg", then ``*`` and space, then ``=`` and ``-``
    stripped from both ends only.

    Both keep letters of any language (ä, ø, ß), compose accents (NFC) so that equal texts are equal, and collapse
    white space. The result may be empty.

    Raises:
        ValueError: unknown mode.
    """
    text = unicodedata.normalize("NFC", text).lower().strip().replace("ekg", "ecg")
    if mode == "paper":
        parts = _DECIMAL_POINT.split(text)
        text = ".".join(_PUNCTUATION.sub(" ", part) for part in parts)
    elif mode == "released":
        text = text.strip("* ").strip("=-")
    else:
        raise ValueError(f"data.report_cleaning = {mode!r}; accepted: paper, released")
    return " ".join(text.split())


class Reports(Protocol):
    """What this module needs of a corpus."""

    path: Path
    reports: Sequence[str]


def digest(texts: Iterable[str]) -> str:
    """Fingerprint of the unique reports in their order; tables made for other reports are recognised by it."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class TokenTable:
    """Token ids of every unique report in compressed sparse rows.

    Args:
        ids: int32 [total], the rows one after the other.
        offsets: int64 [reports + 1], row r is ``ids[offsets[r]:offsets[r + 1]]``.
        pad: id that fills a gathered row.
    """

    def __init__(self, ids: Tensor, offsets: Tensor, pad: int = 0):
        self.ids, self.offsets, self.pad = ids, offsets, pad
        self.lengths = offsets.diff()  # int64 [reports], tokens of each report

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def build(cls, texts: Sequence[str], tokenizer: Tokenizer, chunk: int = 8192) -> Self:
        """Tokenise ``texts`` (unique, normalised), a bounded number at a time."""
        lengths, pieces = [], []
        for start in range(0, len(texts), chunk):
            rows = tokenizer.encode_batch(texts[start : start + chunk])
            lengths += map(len, rows)
            pieces.append(np.fromiter((token for row in rows for token in row), np.int32))
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        return cls(torch.from_numpy(ids), torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64)), tokenizer.pad)

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return type(self)(self.ids.to(device), self.offsets.to(device), self.pad)

    def gather(self, reports: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Padded token rows, without a host synchronisation.

        Args:
            reports: int64 [B], report ids.
            length: T, a Python int; a longer report is cut there.

        Returns:
            (int64 [B,T] ids, bool [B,T] True at real tokens).
        """
        column = torch.arange(length, device=self.ids.device)
        mask = column < self.lengths[reports, None]
        place = torch.where(mask, self.offsets[reports, None] + column, 0)
        return torch.where(mask, self.ids[place].long(), self.pad), mask


def _sound(arrays: dict[str, np.ndarray], reports: int, vocabulary: int) -> bool:
    """Whether a stored table has a row for each report and only ids of the tokenizer; else it is made again."""
    ids, offsets = arrays["ids"], arrays["offsets"]
    return (
        (ids.dtype, offsets.dtype, offsets.shape) == (np.int32, np.int64, (reports + 1,))
        and ids.ndim == 1 and offsets[0] == 0 and offsets[-1] == len(ids)
        and bool((np.diff(offsets) >= 0).all() and (ids >= 0).all() and (ids < vocabulary).all())
    )  # fmt: skip


def token_table(corpus: Reports, tokenizer: Tokenizer) -> TokenTable:
    """The token table of a corpus: read from its folder, or made and kept there (``tokens-<tokenizer>.npz``)."""
    path = Path(corpus.path) / f"tokens-{tokenizer.fingerprint}.npz"
    made_of = {"reports": digest(corpus.reports)}
    if path.exists():
        arrays, metadata = load_arrays(path, ("ids", "offsets"))
        if metadata == made_of and _sound(arrays, len(corpus.reports), tokenizer.vocab_size):
            return TokenTable(torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["offsets"]), tokenizer.pad)
    table = TokenTable.build(corpus.reports, tokenizer)
    try:
        save_arrays(path, {"ids": table.ids.numpy(), "offsets": table.offsets.numpy()}, made_of)
    except OSError as error:
        announce(f"the token table is not kept in {path.parent} ({error.strerror}); it is made again in every run")
    return table
