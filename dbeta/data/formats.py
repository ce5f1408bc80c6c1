"""Reading one raw record of any supported form into integers as they are stored, before leads are put in order."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

MAX_SIGNALS, MAX_SAMPLES = 64, 50_000_000  # a header that claims more is damaged or hostile
FLOAT_GAIN = 1000.0  # float sources become integers of 1 uV
_SIGNAL = re.compile(
    r"^(?P<file>\S+)\s+(?P<format>\d+)(?:x(?P<per_frame>\d+))?(?::(?P<skew>\d+))?(?:\+(?P<offset>\d+))?"
    r"(?:\s+(?P<gain>[-+.\deE]+)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<units>\S+))?)?"
    r"(?:\s+(?P<resolution>\d+)(?:\s+(?P<zero>-?\d+)(?:\s+(?P<initial>-?\d+)(?:\s+(?P<checksum>-?\d+)"
    r"(?:\s+(?P<block>\d+)(?:\s+(?P<description>.*))?)?)?)?)?)?\s*$"
)
_TO_MV = {"mv": 1.0, "uv": 1e3, "µv": 1e3, "v": 1e-3}


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


def from_float(signal: np.ndarray, rate_hz: float, names: tuple[str, ...], **more) -> Raw:
    """Float millivolts [S, L] to integers of 1 uV (int32 where int16 is too small); NaN becomes the invalid code."""
    scaled = np.rint(np.asarray(signal, np.float64) * FLOAT_GAIN)
    finite = np.isfinite(scaled)
    dtype = np.int16 if np.abs(scaled[finite]).max(initial=0) < 2**15 else np.int32
    if np.abs(scaled[finite]).max(initial=0) >= 2**31:
        raise ValueError("samples above 2 MV: the units cannot be mV")
    adc = np.where(finite, scaled, np.iinfo(dtype).min).astype(dtype)
    count = len(adc)
    return Raw(
        adc=adc,
        rate_hz=rate_hz,
        gain=np.full(count, FLOAT_GAIN),
        baseline=np.zeros(count, np.int32),
        names=names,
        **more,
    )


def read_wfdb(path: Path) -> Raw:
    """A WFDB record by its path, with or without ``.hea``.

    Format 16 (``.dat`` and MATLAB v4 ``.mat``) is read here, every other one by the wfdb package.

    Raises:
        ValueError: what is wrong with the header or the signal file, with byte counts.
    """
    header = path if path.suffix == ".hea" else path.with_name(path.name + ".hea")
    try:
        text = header.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"no header: {error.strerror}") from None
    name, rate_hz, samples, signals, comments, notes = _parse_header(text)
    files = {signal["file"] for signal in signals}
    for file in files:
        if file in ("~", "-") or Path(file).name != file or "\x00" in file:
            raise ValueError(f"unreadable header: signal file {file!r} is not in the record's own folder")
        if not (header.parent / file).is_file():
            raise ValueError(f"missing signal file: {file}")
    if all(signal["format"] == "16" and signal["skew"] is None for signal in signals):
        adc = _read_format_16(header.parent, signals, samples)
    else:
        adc = _read_with_wfdb(header, name, notes)
    gain, baseline = zip(*(_calibration(signal) for signal in signals))
    return Raw(
        adc=adc, rate_hz=rate_hz, gain=np.array(gain), baseline=np.array(baseline, np.int32),
        names=tuple((signal["description"] or "").strip() for signal in signals), comments=comments, notes=notes,
    )  # fmt: skip


def _parse_header(text: str):
    """WFDB header: (name, rate, samples, signal fields, comments, notes)."""
    lines = [line.strip() for line in text.splitlines()]
    comments = tuple(line.lstrip("# ").strip() for line in lines if line.startswith("#"))
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError("unreadable header: it is empty")
    record = re.match(r"^(\S+)\s+(\d+)\s+([\d.]+)\S*(?:\s+(\d+))?", lines[0])
    if record is None or "/" in record[1]:
        raise ValueError(f"unreadable header: record line {lines[0][:60]!r}")
    name, count, rate_hz, samples = record[1], int(record[2]), float(record[3]), int(record[4] or 0)
    if not 0 < count <= MAX_SIGNALS or not 0 <= samples <= MAX_SAMPLES:
        raise ValueError(f"unreadable header: {count} signals of {samples} samples")
    if len(lines) - 1 < count:
        raise ValueError(f"unreadable header: {count} signals announced, {len(lines) - 1} described")
    signals = []
    for line in lines[1 : count + 1]:
        fields = _SIGNAL.match(line)
        if fields is None:
            raise ValueError(f"unreadable header: signal line {line[:60]!r}")
        signals.append(fields.groupdict())
    notes = (("record line names a file", lines[0]),) if name.endswith(".mat") else ()
    return name, rate_hz, samples, signals, comments, notes


def _calibration(signal: dict[str, str | None]) -> tuple[float, int]:
    try:
        gain = float(signal["gain"] or 0)
    except ValueError:
        gain = float("nan")
    if not (np.isfinite(gain) and gain > 0):
        raise ValueError(f"bad gain: {signal['gain']}")
    units = (signal["units"] or "mV").lower()
    if units not in _TO_MV:
        raise ValueError(f"bad units: {signal['units']}; accepted: mV, uV, V")
    return gain * _TO_MV[units], int(signal["baseline"] or signal["zero"] or 0)


def _read_format_16(folder: Path, signals: list[dict], samples: int) -> np.ndarray:
    """Interleaved little-endian int16; signals of one file share its frames."""
    blocks = []
    for file in dict.fromkeys(signal["file"] for signal in signals):
        members = [signal for signal in signals if signal["file"] == file]
        if any(int(signal["per_frame"] or 1) != 1 for signal in members):
            raise ValueError("several samples per frame are not supported")
        offset, size = int(members[0]["offset"] or 0), (folder / file).stat().st_size
        length = samples or (size - offset) // (2 * len(members))
        wanted = offset + 2 * len(members) * length
        if size < wanted:
            raise ValueError(f"truncated signal file: {file} has {size} bytes, the header needs {wanted}")
        content = np.fromfile(folder / file, np.uint8, 2 * len(members) * length, offset=offset)
        blocks.append(content.view("<i2").reshape(length, len(members)).T)
    if len({block.shape[1] for block in blocks}) > 1:
        raise ValueError("signal files of different lengths")
    return np.ascontiguousarray(np.concatenate(blocks), np.int16)


def _read_with_wfdb(header: Path, name: str, notes: tuple) -> np.ndarray:
    import wfdb

    if notes:
        raise ValueError(f"unreadable header: record line names the file {name}")
    try:
        record = wfdb.rdrecord(str(header.with_suffix("")), physical=False)
    except Exception as error:  # wfdb raises whatever a damaged file provokes
        raise ValueError(f"truncated or damaged signal file: {error}") from None
    digital = record.d_signal.T
    dtype = np.int16 if np.abs(digital).max(initial=0) <= 2**15 else np.int32
    return np.ascontiguousarray(digital, dtype)


def read_cpsc_mat(path: Path) -> Raw:
    """CPSC 2018: a MATLAB struct ``ECG`` with ``data`` [12, L] in mV at 500 Hz."""
    content = _loadmat(path)
    try:
        data = content["ECG"]["data"][0, 0]
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"no ECG.data in it: {', '.join(k for k in content if k[0] != '_')}") from None
    return from_float(data, 500.0, STANDARD)


def read_code15_mat(path: Path) -> Raw:
    """CODE-15 exams re-saved as .mat: ``feats`` [12, L] in mV with ``curr_sample_rate``."""
    content = _loadmat(path)
    if "feats" not in content or "curr_sample_rate" not in content:
        raise ValueError(f"no feats and curr_sample_rate in it: {', '.join(k for k in content if k[0] != '_')}")
    return from_float(content["feats"], float(content["curr_sample_rate"].item()), STANDARD)


def read_sph(path: Path) -> Raw:
    """SPH: HDF5 ``ecg`` float16 [12, L] in mV at 500 Hz."""
    import h5py

    try:
        with h5py.File(path) as file:
            return from_float(file["ecg"][:], 500.0, STANDARD)
    except (OSError, KeyError) as error:
        raise ValueError(f"not an SPH record: {error}") from None


def trim(raw: Raw) -> Raw:
    """Without the zeros that pad a shorter tracing at both ends (CODE, CODE-15)."""
    used = np.flatnonzero((raw.adc != raw.baseline[:, None]).any(0))
    if len(used) in (0, raw.adc.shape[1]):
        return raw
    return replace(raw, adc=np.ascontiguousarray(raw.adc[:, used[0] : used[-1] + 1]))


STANDARD = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def _loadmat(path: Path) -> dict:
    import scipy.io

    try:
        return scipy.io.loadmat(path)
    except Exception as error:  # scipy raises whatever a damaged file provokes
        raise ValueError(f"not a MATLAB file: {error}") from None
