"""Counter-based random numbers of the synthetic records, and which conditions a record has."""

import numpy as np
from numpy import ndarray

RHYTHMS = ("SR", "SBRAD", "STACH", "AFIB", "AFLT")  # exactly one per record
LABELS = (*RHYTHMS, "1AVB", "RBBB", "LBBB", "PVC", "LVH", "STE", "STD", "TINV", "LVOLT")  # codes of PTB-XL, nearly
COLUMN = {label: column for column, label in enumerate(LABELS)}

RHYTHM_SHARES = (0.36, 0.16, 0.16, 0.17, 0.15)
FINDING_SHARES = (0.17, 0.33, 0.32, 0.18)  # of 0, 1, 2, 3 conditions besides the rhythm
EXCLUSIVE = (
    ("RBBB", "LBBB"), ("LBBB", "LVH"), ("LBBB", "STE"), ("LBBB", "STD"), ("LBBB", "TINV"),  # not readable in LBBB
    ("LVH", "LVOLT"), ("STE", "STD"), ("AFIB", "1AVB"), ("AFLT", "1AVB"),
)  # fmt: skip
FAVOURED = {"1AVB": 1.7, "LBBB": 1.5, "LVH": 1.1}  # those that are excluded most often are drawn earlier


class Draws:
    """splitmix64 as a counter-based generator: row i depends on (seed, stream, ids[i]) and the order of calls alone."""

    def __init__(self, seed: int, stream: int, ids: ndarray):
        key = self._mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(stream)
        self._state = self._mix(self._mix(key) + ids.astype(np.uint64))[:, None]
        self._used = 0

    @staticmethod
    def _mix(x: ndarray) -> ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    def many(self, count: int) -> ndarray:
        """Uniform in (0,1), float64 [n, count]."""
        slots = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self._used += count
        return ((self._mix(self._state + slots) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> ndarray:
        """Uniform in (low, high), float64 [n]."""
        return low + (high - low) * self.many(1)[:, 0]

    def normal(self, count: int) -> ndarray:
        """About N(0,1), within 3.5: a sum of four uniforms. float64 [n, count]."""
        return (self.many(4 * count).reshape(-1, count, 4).sum(-1) - 2) * 3**0.5

    def factor(self, spread: float, count: int | None = None) -> ndarray:
        """Log-normal factors around 1, float64 [n] or [n, count]."""
        return np.exp(spread * (self.normal(1)[:, 0] if count is None else self.normal(count)))


def draw_conditions(draws: Draws) -> ndarray:
    """Severity float32 [n, len(LABELS)]: 0 absent, else (0,1] from mild to marked. One rhythm, 0-3 conditions."""
    rhythm = np.searchsorted(np.cumsum(RHYTHM_SHARES)[:-1], draws.uniform())
    wanted = np.searchsorted(np.cumsum(FINDING_SHARES)[:-1], draws.uniform())
    clash = np.zeros((len(LABELS), len(LABELS)), bool)
    for one, other in EXCLUSIVE:
        clash[COLUMN[one], COLUMN[other]] = clash[COLUMN[other], COLUMN[one]] = True

    others = np.arange(len(RHYTHMS), len(LABELS))
    haste = np.array([FAVOURED.get(LABELS[column], 1.0) for column in others])
    order = others[np.argsort(-np.log(draws.many(len(others))) / haste, axis=1)]  # exponential race
    rows = np.arange(len(rhythm))
    present = np.zeros((len(rows), len(LABELS)), bool)
    present[rows, rhythm] = True
    for column in order.T:
        room = present.sum(1) <= wanted
        present[rows, column] = room & ~(clash[column] & present).any(1)
    return np.where(present, 0.02 + 0.98 * draws.many(len(LABELS)), 0).astype(np.float32)
