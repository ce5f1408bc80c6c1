"""One record in canonical form: twelve leads in a fixed order, native integers, and how they become millivolts."""

import os
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Literal

import numpy as np

from dbeta.data.formats import STANDARD, Raw, count_exams, from_code15, from_cpsc, load_mat, read_sph, trim
from dbeta.data.wfdb_files import read_wfdb

LEADS = STANDARD
_PLACE = {name.upper(): index for index, name in enumerate(LEADS)}
_PLACE |= {"D" + name: _PLACE[name] for name in ("I", "II", "III")}  # CODE's names
# Limb leads follow from I and II: III = II - I, aVR = -(I + II) / 2, aVL = I - II / 2, aVF = II - I / 2.
DERIVED = np.array([[-1.0, 1.0], [-0.5, -0.5], [1.0, -0.5], [-0.5, 1.0]])
# Residual over signal, both root mean square. Of 403 real WFDB records the largest is 0.09; with aVL and aVF exchanged,
# the least visible slip, the smallest is 0.30 and the median 1.04. Above the first value an order that fits much better
# decides, above the second nothing has to.
EINTHOVEN_DOUBT, EINTHOVEN_LIMIT = 0.15, 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A record of L samples.

    Attributes:
        adc: int16 or int32 [12, L], leads as in ``LEADS``; the lowest integer marks an invalid sample. mV is
            (adc - baseline) / gain.
        gain: float64 [12], units per mV.
        baseline: int32 [12].
        present, flat: bool [12], leads the source has, and leads that never change.
        report: as in the source, before cleaning.
        split: where the data set itself assigns one.
        notes: (reason, detail) of every repair.
    """

    name: str
    adc: np.ndarray
    rate_hz: float
    gain: np.ndarray
    baseline: np.ndarray
    subject: str
    report: str = ""
    labels: tuple[str, ...] = ()
    split: str | None = None
    present: np.ndarray = field(default_factory=lambda: np.ones(12, bool))
    flat: np.ndarray = field(default_factory=lambda: np.zeros(12, bool))
    notes: tuple[tuple[str, str], ...] = ()

    def to_mv(self) -> np.ndarray:
        """Float32 [12, L] mV; an invalid sample is 0."""
        return to_mv(self.adc, self.gain, self.baseline)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A record that is not used, and why."""

    name: str
    reason: str
    detail: str = ""


def canonical(
    raw: Raw,
    *,
    name: str,
    subject: str,
    all_leads: bool = False,
    invalid: bool = True,
    limb_leads: Literal["reject", "note"] = "note",
    rate_hz: float | None = None,
    **more,
) -> Record:
    """Put the leads of ``raw`` in order by name and check them.

    Args:
        all_leads: refuse a record without all twelve; else missing ones hold the invalid code.
        invalid: accept invalid samples (they are 0 mV), noted; else refuse them, as the paper drops records with NaN.
        limb_leads: what to do with limb leads that contradict Einthoven's and Goldberger's equations.
        rate_hz: the only rate accepted.
        more: report, labels, split of the ``Record``.

    Raises:
        ValueError: "reason: detail", as it goes into rejected.csv.
    """
    if rate_hz is not None and raw.rate_hz != rate_hz:
        raise ValueError(f"wrong rate: {raw.rate_hz:g} Hz, expected {rate_hz:g}")
    if raw.rate_hz <= 0 or raw.adc.shape[1] == 0:
        raise ValueError(f"empty record: {raw.adc.shape[1]} samples at {raw.rate_hz:g} Hz")
    names = [lead.strip().upper() for lead in raw.names]
    known = [lead for lead in names if lead in _PLACE]
    if len(set(known)) != len(known):
        raise ValueError(f"duplicate lead: {' '.join(raw.names)}")
    present = np.isin(np.arange(12), [_PLACE[lead] for lead in known])
    if not present.any() or (all_leads and not present.all()):
        missing = " ".join(lead for lead, here in zip(LEADS, present) if not here)
        raise ValueError(f"missing leads: {missing}; the record has {' '.join(raw.names)}"[:200])
    code = np.iinfo(raw.adc.dtype).min
    adc = np.full((12, raw.adc.shape[1]), code, raw.adc.dtype)
    gain, baseline = np.ones(12), np.zeros(12, np.int32)
    for index, lead in enumerate(names):
        if lead in _PLACE:
            place = _PLACE[lead]
            adc[place], gain[place], baseline[place] = raw.adc[index], raw.gain[index], raw.baseline[index]
    flat = adc.max(1) == adc.min(1)
    if flat[present].all():
        raise ValueError("flat: no lead ever changes")
    notes = raw.notes
    if (adc.min(1) == code)[present].any():
        count = f"{int((adc[present] == code).sum()):,} (NaN)"
        if not invalid:
            raise ValueError(f"invalid samples: {count}")
        notes = (*notes, ("invalid samples", f"{count} are 0 mV"))
    record = Record(
        name=name, adc=adc, rate_hz=raw.rate_hz, gain=gain, baseline=baseline, subject=subject, present=present,
        flat=flat, notes=notes, **more,
    )  # fmt: skip
    problem = limb_problem(record)
    if problem and limb_leads == "reject":
        raise ValueError(f"limb leads contradict each other: {problem}")
    return replace(record, notes=(*record.notes, ("limb leads contradict each other", problem))) if problem else record


def limb_problem(record: Record) -> str:
    """What is wrong between the six limb leads, in words, or "". Swapped electrodes keep all equations: not seen."""
    limb = _limb_mv(record)
    residual = limb_residual(limb)
    if residual <= EINTHOVEN_DOUBT:
        return ""
    best = min(LIMB_ORDERS, key=lambda order: limb_residual(limb[order]))
    if limb_residual(limb[best]) < residual / 2:
        return f"residual {residual:.2f} of the signal; {' '.join(LEADS[i] for i in best)} would fit"
    return f"residual {residual:.2f} of the signal, in any order" if residual > EINTHOVEN_LIMIT else ""


# Orders that occur by slips of the pen: any within I II III, any within aVR aVL aVF.
LIMB_ORDERS = [[*a, *(3 + i for i in b)] for a in permutations(range(3)) for b in permutations(range(3))]


def to_mv(adc: np.ndarray, gain: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(adc - baseline) / gain of [C, L] integers, in float64, rounded once to float32; an invalid sample is 0."""
    mv = ((adc - baseline[:, None].astype(np.float64)) / gain[:, None]).astype(np.float32)
    mv[adc == np.iinfo(adc.dtype).min] = 0
    return mv


def einthoven_residual(record: Record) -> float:
    """How far limb leads are from Einthoven's and Goldberger's equations: rms residual over rms; 0 without all six."""
    return limb_residual(_limb_mv(record))


def _limb_mv(record: Record) -> np.ndarray:
    """The limb leads of the first 30 s less their means, float32 [6, n]; zeros where one is missing or flat."""
    if not record.present[:6].all() or record.flat[:6].any():
        return np.zeros((6, 1), np.float32)
    adc = record.adc[:6, : int(30 * record.rate_hz) + 1]
    limb = to_mv(adc, record.gain[:6], record.baseline[:6])
    return limb - limb.mean(1, keepdims=True, dtype=np.float64).astype(np.float32)


def limb_residual(limb: np.ndarray) -> float:
    """The same of six limb leads float [6, L] without their means; 0 where nothing is recorded."""
    off = limb[2:] - DERIVED @ limb[:2]
    scale = np.sqrt((limb**2).mean())
    return float(np.sqrt((off**2).mean()) / scale) if scale else 0.0


ACCEPTED = "WFDB (.hea with .dat or .mat), CPSC .mat, CODE-15 .mat, CODE .hdf5 (FILE#ROW), SPH .h5"
HDF5 = (".h5", ".hdf5")


def read_record(path: str | Path) -> Record:
    """Any supported record by its path.

    Args:
        path: WFDB: the ``.hea``, a signal file beside it, or the path without ending; CPSC ``.mat``; CODE-15 ``.mat``;
            one exam of a CODE ``.hdf5`` as ``FILE#ROW``; SPH ``.h5``.

    Raises:
        ValueError: what is wrong with it, and its path.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"{path!r} is no path of a record; accepted: {ACCEPTED}")
    path = Path(path)
    try:
        return canonical(read_raw(path)[1], name=path.stem, subject=path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_raw(path: Path) -> tuple[str, Raw]:
    """(format, record as stored) of any supported record; errors as ``canonical``."""
    file, mark, row = str(path).rpartition("#")
    exam = mark and row.isdigit() and file.endswith(HDF5)
    _must_be_there(Path(file) if exam else path)
    if exam:
        from dbeta.data.sources_code import read_exam

        return "CODE .hdf5", read_exam(Path(file), int(row))
    if path.suffix in HDF5:
        exams = count_exams(path)
        if exams is None:
            return "SPH .h5", read_sph(path)
        raise ValueError(f"several exams: it holds {exams:,}; name one, {path.name}#0 to {path.name}#{exams - 1}")
    if path.suffix == ".hea" or not path.is_file():
        return "WFDB", read_wfdb(path if path.suffix != ".dat" else path.with_suffix(""))
    if path.with_suffix(".hea").is_file():
        return "WFDB", read_wfdb(path.with_suffix(".hea"))
    if path.suffix == ".mat":
        content = load_mat(path)
        if "ECG" in content:
            return "CPSC .mat", from_cpsc(content)
        if "feats" in content:
            return "CODE-15 .mat", trim(from_code15(content))
        held = ", ".join(name for name in content if name[0] != "_")
        raise ValueError(f"unknown format: it holds {held}, and no .hea is beside it; accepted: {ACCEPTED}")
    raise ValueError(f"unknown format: {path.suffix or 'no ending'} without a .hea; accepted: {ACCEPTED}")


def _must_be_there(path: Path) -> None:
    header = Path(f"{path.with_suffix('') if path.suffix in ('.hea', '.dat') else path}.hea")
    if path.is_file() or header.exists():
        return
    found = "a folder; give one record in it" if path.is_dir() else "no such file, nor a header of that name"
    raise ValueError(f"no record: {found}; accepted: {ACCEPTED}")


def read_ecg(path: str | Path) -> np.ndarray:
    """Any supported record as an ECG.

    Args:
        path: see ``read_record``.

    Returns:
        Float32 [12, L], mV, 500 Hz, leads I II III aVR aVL aVF V1-V6 put in order by their names; leads that the record
        does not have, and invalid samples, are 0.

    Raises:
        ValueError: what is wrong with it, and its path.
    """
    from dbeta.data.resample import resample

    record = read_record(path)
    return resample(record.to_mv(), record.rate_hz)
