"""Raw records of the float data sets as integers, and what every reader returns before leads are put in order."""

import io
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAX_BYTES = 1 << 30  # a record that unpacks to more is damaged or hostile: a day of 12 leads at 500 Hz fits
MAX_ELEMENTS = 4000  # of a MATLAB file: an array has four or more, a record a few arrays
MATRIX, COMPRESSED = 14, 15  # of MATLAB's kinds of elements
MAX_EXAMS = 1 << 22  # in one file; all of CODE are 2.3 million
STANDARD = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
FLOAT_GAIN = 1000.0  # float sources become integers of 1 uV
ROUNDING_UV = 0.5  # the most that this errs by


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A record as stored: S signals of L samples.

    Attributes:
        adc: int16 or int32 [S, L]; the lowest integer of the type marks an invalid sample.
        gain: float64 [S], units per mV.
        baseline: int32 [S].
        names: S lead names as the source writes them.
        comments: header comments, without the mark.
        notes: (reason, detail) of repairs made while reading.
    """

    adc: np.ndarray
    rate_hz: float
    gain: np.ndarray
    baseline: np.ndarray
    names: tuple[str, ...]
    comments: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


def narrowed(codes: np.ndarray, invalid: np.ndarray) -> np.ndarray:
    """Integers as int16 where they fit beside its lowest value, else as int32; ``invalid`` ones become the lowest."""
    invalid = invalid if invalid.any() else None
    valid = codes if invalid is None else codes[~invalid]
    small = codes.dtype.itemsize <= 2 or not valid.size or (valid.min() > -(2**15) and valid.max() < 2**15)
    adc = np.ascontiguousarray(codes, np.int16 if small else np.int32)
    if invalid is not None:
        adc = adc if adc is not codes else adc.copy()
        adc[invalid] = np.iinfo(adc.dtype).min
    return adc


def from_float(signal: np.ndarray, rate_hz: float, names: tuple[str, ...] = STANDARD, **more) -> Raw:
    """Float millivolts [S, L] to integers of 1 uV (int32 where int16 is too small); NaN becomes the invalid code.

    Raises:
        ValueError: "reason: detail", for another shape or impossible values.
    """
    if signal.ndim != 2 or len(signal) != len(names):
        raise ValueError(f"missing leads: shape {list(signal.shape)}, expected [{len(names)}, samples]")
    scaled = np.rint(np.asarray(signal, np.float64) * FLOAT_GAIN)
    missing = np.isnan(scaled)
    scaled[missing] = 0
    if (np.abs(scaled) >= 2**31).any():
        raise ValueError("amplitude: a sample is infinite or above 2 MV, so the units cannot be mV")
    count = len(scaled)
    return Raw(
        adc=narrowed(scaled.astype(np.int32), missing), rate_hz=rate_hz, gain=np.full(count, FLOAT_GAIN),
        baseline=np.zeros(count, np.int32), names=names, **more,
    )  # fmt: skip


def from_cpsc(content: dict) -> Raw:
    """CPSC 2018: a MATLAB struct ``ECG`` with ``data`` [12, L] in mV at 500 Hz."""
    try:
        data = content["ECG"]["data"][0, 0]
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"no ECG.data: it holds {', '.join(k for k in content if k[0] != '_')}") from None
    return from_float(data, 500.0)


def from_code15(content: dict) -> Raw:
    """CODE-15 exams re-saved as .mat: ``feats`` [12, L] in mV with ``curr_sample_rate``."""
    if "feats" not in content or "curr_sample_rate" not in content:
        raise ValueError(f"no feats, curr_sample_rate: it holds {', '.join(k for k in content if k[0] != '_')}")
    return from_float(content["feats"], float(content["curr_sample_rate"].item()))


def read_sph(path: Path) -> Raw:
    """SPH: HDF5 ``ecg`` float16 [12, L] in mV at 500 Hz."""
    import h5py

    _must_exist(path)
    try:
        with h5py.File(path) as file:
            return from_float(bounded(file, "ecg")[:], 500.0)
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"not an SPH record: {error}") from None


def bounded(file: Any, name: str, rows: int | None = None) -> Any:
    """A data set of an HDF5 file, not one in another file, of a size that can be a recording.

    Args:
        rows: how many of its rows are going to be read at once; None: all.

    Raises:
        ValueError: "reason: detail".
    """
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"not in the file: {name} is missing, or a link to somewhere else")
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "fiu" or not data.shape:
        raise ValueError(f"not numbers: {name} is no array of numbers")
    if data.external or data.is_virtual:
        raise ValueError(f"not in the file: {name} lies in another one")
    count = math.prod(data.shape) * (1 if rows is None else rows / max(data.shape[0], 1))
    if data.dtype.itemsize * max(count, math.prod(data.chunks or (0,))) > MAX_BYTES:  # a chunk is unpacked as a whole
        raise ValueError(f"too large: {name} is {list(data.shape)}, more than a recording can be")
    return data


def read_tracings(path: Path, rows: Iterable[int], *, units_per_mv: float) -> Iterator[np.ndarray]:
    """Exams of a CODE file, HDF5 ``tracings`` [N, 4096, 12] at 400 Hz, as float [12, 4096] mV.

    Args:
        rows: which exams, in any order.
        units_per_mv: 1 for CODE-15, which is in mV; 10 for CODE-test, in 1e-4 V.
    """
    import h5py

    with h5py.File(path) as file:
        tracings = bounded(file, "tracings", rows=1)
        if tracings.ndim != 3:
            raise ValueError(f"missing leads: tracings {list(tracings.shape)}, expected [exams, samples, leads]")
        for row in rows:
            yield tracings[row].T / units_per_mv


def count_exams(path: Path) -> int | None:
    """How many exams a CODE file holds; None where the HDF5 file is of another kind."""
    import h5py

    _must_exist(path)
    try:
        with h5py.File(path) as file:
            if file.get("tracings", getlink=True) is None:
                return None
            exams = len(bounded(file, "tracings", rows=1))
    except OSError as error:
        raise ValueError(f"not an HDF5 file: {error}") from None
    if exams > MAX_EXAMS:
        raise ValueError(f"too large: {exams:,} exams in one file")
    return exams


def trim(raw: Raw) -> Raw:
    """Without the zeros that pad a shorter tracing at both ends (CODE, CODE-15)."""
    used = np.flatnonzero((raw.adc != raw.baseline[:, None]).any(0))
    if len(used) in (0, raw.adc.shape[1]):
        return raw
    return replace(raw, adc=np.ascontiguousarray(raw.adc[:, used[0] : used[-1] + 1]))


def load_mat(path: Path) -> dict:
    """Arrays of a MATLAB file.

    Raises:
        ValueError: it is not one, or it is damaged.
    """
    import scipy.io

    _must_exist(path)
    source = _unpacked_file(path)
    try:
        return scipy.io.loadmat(source)
    except Exception as error:  # scipy raises whatever a damaged file provokes
        raise ValueError(f"not a MATLAB file: {type(error).__name__} {error}") from None


def _unpacked_file(path: Path) -> Path | BinaryIO:
    """A MATLAB 5 file as scipy gets it, unpacked; any other file as it is.

    Refused is what scipy would not survive: a file that unpacks to more than ``MAX_BYTES``, or whose cells lie in one
    another by the thousand, which it reads by recursion. Nothing more than that is unpacked, and nothing twice.
    """
    with path.open("rb") as file:
        header = file.read(128)
        order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
        if not order:
            return path
        whole = io.BytesIO()
        whole.write(header)
        total = elements = skip = 0
        pending = bytearray()
        for piece in _unpacked(file, order):
            total += len(piece)
            if total > MAX_BYTES:
                raise ValueError(f"too large: {path.name} unpacks to more than {MAX_BYTES:,} bytes")
            whole.write(piece)
            pending += piece[skip:]
            skip, at = max(0, skip - len(piece)), 0
            while at + 8 <= len(pending):
                kind, size = struct.unpack_from(f"{order}II", pending, at)
                at += 8 if kind == MATRIX or kind >> 16 else 8 + size + -size % 8  # a matrix is entered, others are not
                elements += 1
            if elements > MAX_ELEMENTS:
                raise ValueError(f"too large: {path.name} has more than {MAX_ELEMENTS:,} elements")
            skip += max(0, at - len(pending))
            del pending[:at]
    whole.seek(0)
    return whole


def _unpacked(file: BinaryIO, order: str) -> Iterator[bytes]:
    """The elements that follow a MATLAB 5 header as one stream, in pieces, with those unpacked that are compressed.

    One that is compressed has to be exactly one matrix: scipy would take what follows it for further elements, packed
    ones among them, which nobody has measured.
    """
    while len(tag := file.read(8)) == 8:
        kind, left = struct.unpack(f"{order}II", tag)
        unpacker = zlib.decompressobj() if kind == COMPRESSED else None
        if not unpacker:
            yield tag
        size, inner = 0, b""
        while left > 0 and (piece := file.read(min(left, 1 << 16))):
            left -= len(piece)
            try:
                piece = unpacker.decompress(piece) if unpacker else piece
            except zlib.error as error:
                raise ValueError(f"not a MATLAB file: {error}") from None
            size, inner = size + len(piece), (inner + piece[:8])[:8]
            yield piece
        if not unpacker:
            continue
        if not unpacker.eof or len(inner) < 8 or struct.unpack(f"{order}II", inner) != (MATRIX, size - 8):
            raise ValueError("not a MATLAB file: a compressed element is cut, or is no matrix")


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"missing signal file: {path.name}")
