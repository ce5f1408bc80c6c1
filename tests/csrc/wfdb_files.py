"""WFDB signal files made byte by byte, in every format, with their headers: the inputs of the decoder's tests.

Written from the format definitions (PhysioNet, signal(5)), not from the decoder: bits are laid out in integers here and
taken from bytes there.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMATS = (8, 16, 24, 32, 61, 80, 160, 212, 310, 311)
BITS = {8: 8, 16: 16, 24: 24, 32: 32, 61: 16, 80: 8, 160: 16, 212: 12, 310: 10, 311: 10}


def pack(codes: np.ndarray, fmt: int) -> bytes:
    """The bytes of ``codes`` int64 [samples, leads] (format 8: differences) as frames."""
    flat = codes.reshape(-1).astype(np.int64)
    if fmt == 8:
        return flat.astype("<i1").tobytes()
    if fmt in (16, 32):
        return flat.astype(f"<i{fmt // 8}").tobytes()
    if fmt == 61:
        return flat.astype(">i2").tobytes()
    if fmt == 80:
        return (flat + 128).astype("<u1").tobytes()
    if fmt == 160:
        return (flat + 32768).astype("<u2").tobytes()
    if fmt == 24:
        return flat.astype("<i4").view("<u1").reshape(-1, 4)[:, :3].tobytes()
    group, width = {212: (2, 3), 310: (3, 4), 311: (3, 4)}[fmt]
    count = len(flat)
    rows = np.pad(flat, (0, -count % group)).reshape(-1, group) & ((1 << BITS[fmt]) - 1)
    if fmt == 212:  # low byte | high nibble of both | low byte
        words = rows[:, 0] | (rows[:, 1] >> 8) << 12 | (rows[:, 1] & 0xFF) << 16
    elif fmt == 310:  # bits 1-10, 17-26, and the third sample split over 11-15 and 27-31
        words = rows[:, 0] << 1 | (rows[:, 2] & 31) << 11 | rows[:, 1] << 17 | (rows[:, 2] >> 5) << 27
    else:  # bits 0-9, 10-19, 20-29
        words = rows[:, 0] | rows[:, 1] << 10 | rows[:, 2] << 20
    data = words.astype("<u8").view("<u1").reshape(-1, 8)[:, :width].tobytes()
    rest = count % group
    cut = {212: {0: 0, 1: 1}, 310: {0: 0, 1: 2, 2: 0}, 311: {0: 0, 1: 2, 2: 1}}[fmt][rest]
    return data[: len(data) - cut]


@dataclass
class File:
    """One record of one signal file. ``codes``: what is stored, int64 [samples, leads] (format 8: differences)."""

    fmt: int
    codes: np.ndarray
    gain: np.ndarray
    baseline: np.ndarray
    skew: np.ndarray
    initial: np.ndarray
    offset: int

    @property
    def data(self) -> bytes:
        return bytes(range(7, 7 + self.offset)) + pack(self.codes, self.fmt)

    def write(self, folder: Path) -> str:
        """Write rec.hea and rec.dat for wfdb to read; returns the record's path without its extension."""
        samples, leads = self.codes.shape
        lines = [f"rec {leads} 500 {samples}"]
        for c in range(leads):
            lines.append(
                f"rec.dat {self.fmt}:{self.skew[c]}+{self.offset} {float(self.gain[c])!r}({self.baseline[c]})/mV"
                f" {BITS[self.fmt]} 0 {self.initial[c]} 0 0 lead{c}"
            )
        (folder / "rec.hea").write_text("\n".join(lines) + "\n")
        (folder / "rec.dat").write_bytes(self.data)
        return str(folder / "rec")


def random_file(rng: np.random.Generator, fmt: int, leads: int, samples: int, *, offset=0, skewed=False) -> File:
    """Codes over the whole range with some of the format's "no sample" code; gains and baselines of both signs."""
    low, high = -(1 << (BITS[fmt] - 1)), (1 << (BITS[fmt] - 1)) - 1
    codes = rng.integers(low, high, (samples, leads), endpoint=True)
    if fmt == 8:
        codes //= 8  # differences
    else:
        codes[rng.random(codes.shape) < 0.05] = low
    return File(
        fmt=fmt,
        codes=codes,
        gain=np.exp(rng.uniform(-3, 9, leads)) * rng.choice([1, 1, 1, -1], leads),
        baseline=rng.integers(-40000, 40000, leads),
        skew=rng.integers(0, min(samples, 9) + 1) * rng.integers(0, 2, leads) * skewed,  # wfdb reads 0 and one more
        initial=rng.integers(-500, 500, leads) * (fmt == 8),
        offset=offset,
    )
