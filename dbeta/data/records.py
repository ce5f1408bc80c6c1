"""One raw record in canonical form: twelve leads in a fixed order, native integers, and how they become millivolts."""

from dataclasses import dataclass, field

import numpy as np

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A record that is not used, and why."""

    name: str
    reason: str
    detail: str = ""
