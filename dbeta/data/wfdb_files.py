"""WFDB records (PhysioNet, WFDB Applications Guide: header(5), signal(5)) as they occur in the ECG data sets.

Headers are parsed here, because real ones stray from the definition: record lines that name the .mat file, units
``mv``, formats ``16x1+24``. Plain integer formats are read here too, any other one by the wfdb package.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbeta.data.formats import Raw, load_mat, narrowed

# What claims more is damaged or hostile.
MAX_SIGNALS, MAX_SAMPLES, MAX_HEADER_BYTES, MAX_SKEW = 64, 50_000_000, 1 << 20, 10_000
GAINS = (1e-6, 1e12)  # units per mV; beyond, float32 millivolts or their squares overflow
PLAIN = {"16": "<i2", "61": ">i2", "32": "<i4"}
# Bits of each format; the lowest value of these is "no sample". Format 8, differences, has no such value.
BITS = {"80": 8, "508": 8, "310": 10, "311": 10, "212": 12, "24": 24, "524": 24}
BITS |= dict.fromkeys(("16", "61", "160", "516"), 16)
FLAC, MAX_UNPACKED = ("508", "516", "524"), 1 << 27  # formats of any compression; samples that wfdb may hold, as int64
PER_MV = {"mv": 1.0, "uv": 1e3, "µv": 1e3, "μv": 1e3, "v": 1e-3}
MAT_V4_BYTES = 24  # header of a MATLAB 4 matrix named "val"
_RECORD = re.compile(r"(\S+)\s+(\d+)(?:\s+([\d.]+)(?:[/(]\S*)?(?:\s+(\d+)(?:\s.*)?)?)?")
_SIGNAL = re.compile(
    r"^(?P<file>\S+)\s+(?P<format>\d+)(?:x(?P<per_frame>\d+))?(?::(?P<skew>\d+))?(?:\+(?P<offset>\d+))?"
    r"(?:\s+(?P<gain>[-+.\w]+)(?:\((?P<baseline>[-+]?\d+)\))?(?:/(?P<units>\S+))?)?"
    r"(?:\s+(?P<resolution>\d+)(?:\s+(?P<zero>[-+]?\d+)(?:\s+(?P<initial>[-+]?\d+)(?:\s+(?P<checksum>[-+]?\d+)"
    r"(?:\s+(?P<block>\d+)(?:\s+(?P<description>.*))?)?)?)?)?)?\s*$"
)


@dataclass(frozen=True, kw_only=True)
class Signal:
    """One signal line of a header; ``samples``, ``checksum`` and ``gain`` are None where it does not say."""

    file: str
    format: str
    offset: int
    plain: bool  # no skew, and a format of ``PLAIN``
    gain: float | None  # units per mV
    baseline: int
    checksum: int | None
    name: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """A record's header."""

    path: Path
    name: str
    rate_hz: float
    samples: int | None
    signals: tuple[Signal, ...]
    comments: tuple[str, ...]  # without the mark

    def comment(self, key: str) -> str:
        """What follows ``key:`` in a comment (``#Dx: ...``, ``# Dx: ...``), or ""."""
        for line in self.comments:
            name, colon, value = line.partition(":")
            if colon and name.strip().lower() == key.lower():
                return value.strip()
        return ""


def read_wfdb(path: Path) -> Raw:
    """A WFDB record by its path, with or without ``.hea``.

    Raises:
        ValueError: "reason: detail": what is wrong with the header or a signal file, with byte counts.
    """
    header = read_header(path)
    folder = header.path.parent
    for signal in header.signals:
        if not (folder / signal.file).is_file():
            raise ValueError(f"missing signal file: {signal.file}")
        if (folder / signal.file).resolve().parent != header.path.resolve().parent:
            raise ValueError(f"link out of the record's folder: {signal.file}; link its header there too, or copy it")
        if signal.gain is None:
            raise ValueError(f"bad gain: signal {signal.name or signal.file} has none above 0 that could be")
    if all(signal.plain for signal in header.signals):
        files = dict.fromkeys(signal.file for signal in header.signals)
        blocks = [_read_plain(folder / file, [s for s in header.signals if s.file == file], header) for file in files]
        if len({block.shape[1] for block in blocks}) > 1:
            raise ValueError(f"signal files of different lengths: {[block.shape[1] for block in blocks]} samples")
        order = [i for file in files for i, signal in enumerate(header.signals) if signal.file == file]
        codes = np.concatenate(blocks)[np.argsort(order)] if len(blocks) > 1 else blocks[0]
    else:
        codes = _read_with_wfdb(header)
    codes = np.ascontiguousarray(codes)
    for signal, total in zip(header.signals, codes.sum(1, dtype=np.int64).tolist()):
        if signal.checksum is not None and (total - signal.checksum) % 2**16:
            raise ValueError(f"checksum: signal {signal.name} of {signal.file} is not what its header was written for")
    notes = ()
    if header.name != header.path.stem:
        notes = (("record line", f"names {header.name}, the header file is {header.path.name}"),)
    none = np.array([-(2 ** (BITS.get(signal.format, 32) - 1)) for signal in header.signals])[:, None]
    invalid = codes == (none.astype(codes.dtype) if codes.dtype.itemsize == 2 else none)
    return Raw(
        adc=narrowed(codes, invalid), rate_hz=header.rate_hz, gain=np.array([s.gain for s in header.signals]),
        baseline=np.array([s.baseline for s in header.signals], np.int32),
        names=tuple(s.name for s in header.signals), comments=header.comments, notes=notes,
    )  # fmt: skip


def read_header(path: Path) -> Header:
    """The header of a WFDB record by its path, with or without ``.hea``.

    Raises:
        ValueError: "reason: detail".
    """
    path = path if path.suffix == ".hea" else path.with_name(path.name + ".hea")
    if path.exists() and not path.is_file():
        raise ValueError(f"no header: {path.name} is no file")  # a pipe would keep us waiting
    try:
        with path.open("rb") as file:
            content = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise ValueError(f"no header: {error.strerror}") from None
    if len(content) > MAX_HEADER_BYTES:
        raise ValueError(f"unreadable header: longer than {MAX_HEADER_BYTES:,} bytes")
    text = content.decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    comments = tuple(line.lstrip("# ").strip() for line in lines if line.startswith("#"))
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError("unreadable header: it is empty")
    record = _RECORD.fullmatch(lines[0])
    if record is None:
        raise ValueError(f"unreadable header: record line {lines[0][:60]!r}")
    if "/" in record[1]:
        raise ValueError(f"multi-segment record: {lines[0][:60]!r}; give its segments")
    try:
        count, rate_hz, samples = int(record[2]), float(record[3] or 250), int(record[4] or 0)  # 250 Hz: WFDB's default
    except ValueError:
        raise ValueError(f"unreadable header: record line {lines[0][:60]!r}") from None
    if not (0 < count <= MAX_SIGNALS and samples <= MAX_SAMPLES and 0 < rate_hz < 1e6):
        raise ValueError(f"unreadable header: {count} signals of {samples} samples at {rate_hz:g} Hz")
    if len(lines) - 1 < count:
        raise ValueError(f"unreadable header: {count} signals announced, {len(lines) - 1} described")
    signals = tuple(_signal(line) for line in lines[1 : count + 1])
    return Header(
        path=path, name=record[1], rate_hz=rate_hz, samples=samples or None, signals=signals, comments=comments
    )  # fmt: skip


def _signal(line: str) -> Signal:
    fields = _SIGNAL.match(line)
    if fields is None:
        raise ValueError(f"unreadable header: signal line {line[:60]!r}")
    file, units = fields["file"], (fields["units"] or "mV").lower()
    if len(file.encode()) > 200:
        raise ValueError(f"unreadable header: signal file {file[:60]!r}... has a name too long to be one")
    if file in ("~", "-", ".", "..") or "/" in file or "\\" in file or "\0" in file:
        raise ValueError(f"unreadable header: signal file {file[:60]!r} is not in the record's own folder")
    if units not in PER_MV:
        raise ValueError(f"bad units: {fields['units']}; accepted: mV, uV, V")
    try:
        gain = float(fields["gain"] or 0) * PER_MV[units]
    except ValueError:
        gain = math.nan
    baseline = int(fields["baseline"] or fields["zero"] or 0)
    if abs(baseline) >= 2**31:
        raise ValueError(f"unreadable header: baseline of {line[:60]!r}")
    if int(fields["skew"] or 0) > MAX_SKEW:
        raise ValueError(f"unreadable header: skew of {line[:60]!r}")
    if int(fields["per_frame"] or 1) != 1:
        raise ValueError(f"several samples per frame: {line[:60]!r} is not supported")
    skewed = bool(int(fields["skew"] or 0))  # wfdb shifts such a signal, so its checksum is not that of what we get
    return Signal(
        file=file, format=fields["format"], offset=int(fields["offset"] or 0),
        plain=not skewed and fields["format"] in PLAIN, gain=gain if GAINS[0] < gain < GAINS[1] else None,
        baseline=baseline,
        checksum=None if skewed or fields["checksum"] is None else int(fields["checksum"]),
        name=(fields["description"] or "").strip(),
    )  # fmt: skip


def _read_plain(path: Path, signals: list[Signal], header: Header) -> np.ndarray:
    """Frames of interleaved integers: [S, L]."""
    kind, offset = np.dtype(PLAIN[signals[0].format]), signals[0].offset
    if any((signal.format, signal.offset) != (signals[0].format, offset) for signal in signals):
        raise ValueError(f"unreadable header: signals of {path.name} differ in format or offset")
    frame, size = kind.itemsize * len(signals), path.stat().st_size
    if path.suffix == ".mat" and offset == MAT_V4_BYTES:
        with path.open("rb") as file:
            if file.read(6) == b"MATLAB":  # a MATLAB 5 file under the header of a MATLAB 4 one
                return _read_mat_v5(path, len(signals), header.samples)
    length = header.samples or max(size - offset, 0) // frame
    wanted = offset + frame * length
    if size < wanted:
        raise ValueError(f"truncated signal file: {path.name} has {size} bytes, its header needs {wanted}")
    if size > wanted:
        raise ValueError(f"signal file does not fit: {path.name} has {size} bytes, its header describes {wanted}")
    return np.fromfile(path, kind, offset=offset).reshape(length, len(signals)).T


def _read_mat_v5(path: Path, signals: int, samples: int | None) -> np.ndarray:
    codes = load_mat(path).get("val")
    if codes is None or codes.dtype.kind != "i" or codes.shape != (signals, samples or codes.shape[-1]):
        raise ValueError(f"signal file does not fit: {path.name} holds no integers val [{signals}, {samples}]")
    return codes


def _check_claim(header: Header) -> None:
    """Refuse what wfdb would make room for although the files cannot hold it."""
    values = len(header.signals) * (header.samples or 0)
    if values > MAX_UNPACKED:
        raise ValueError(f"too large: {values:,} samples in a packed format, more than {MAX_UNPACKED:,}")
    for file in {signal.file for signal in header.signals}:
        bits = sum(BITS.get(signal.format, 8) for signal in header.signals if signal.file == file)
        packed = any(signal.format in FLAC for signal in header.signals if signal.file == file)
        size, least = (header.path.parent / file).stat().st_size, bits * (header.samples or 0) // 8
        if size < least and not packed:
            raise ValueError(f"truncated signal file: {file} has {size} bytes, its header needs at least {least}")


def _read_with_wfdb(header: Header) -> np.ndarray:
    import wfdb

    _check_claim(header)
    try:
        record = wfdb.rdrecord(str(header.path.with_suffix("")), physical=False)
    except Exception as error:  # wfdb raises whatever a damaged file provokes
        raise ValueError(f"truncated or damaged signal file: {type(error).__name__} {error}") from None
    codes = record.d_signal.T.astype(np.int64)
    if codes.shape != (len(header.signals), header.samples or codes.shape[1]):
        raise ValueError(f"truncated or damaged signal file: {codes.shape} samples, its header says {header.samples}")
    return codes
