"""The electrical model of the synthetic records: a moving dipole seen by twelve leads.

Every wave of a beat is a Gaussian pulse of a dipole (x left, y down, z back; mV), so the eight independent leads are
one product of small rank

    leads[8, t] = D[8, r] @ A[r, t]        D = lead vectors @ dipole of row r,  A = its activity over time

with a row per wave, two for the oscillating atria of fibrillation and flutter and three for baseline wander. The lead
vectors are Dower's (Dower, Machado, Osborne 1980; Frank's axes), turned and scaled from one subject to the next.
III, aVR, aVL and aVF are integer sums of the rounded I and II: Einthoven's law holds exactly, Goldberger's within one
unit.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy import ndarray

RATE_HZ = 500
SAMPLES = 5000
GAIN = 1000  # units per mV
MARGIN = 250  # samples kept on either side of the record, so that no pulse has to be clipped
NOISE_POOL = 1 << 18

# Rows: I, II, V1..V6. Columns: Frank's x, y, z.
DOWER = np.array([
    [0.632, -0.235, 0.059], [0.235, 1.066, -0.132],
    [-0.515, 0.157, -0.917], [0.044, 0.164, -1.387], [0.882, 0.098, -1.277],
    [1.213, 0.127, -0.601], [1.125, 0.127, -0.086], [0.831, 0.076, 0.230],
])  # fmt: skip


class Wave(NamedTuple):
    """One pulse per beat, for n records: exp(-z^2/2), or exp(-z^4/2) for a plateau."""

    centre: ndarray  # float [n], s after the R wave
    width: ndarray  # float [n], s, sigma of the falling flank
    dipole: ndarray  # float [n,3], mV
    reach: float  # s evaluated on either side: 3.5 times the widest sigma (2 for a plateau)
    rise: float = 1.0  # sigma of the rising flank relative to the falling one
    plateau: bool = False
    repolarisation: bool = False  # shortens with the beat's own RR interval


class Beats(NamedTuple):
    """The beats of n records, flat and ordered by record."""

    record: ndarray  # int [b], row of the batch
    time: ndarray  # float [b], s, of the R wave
    stretch: ndarray  # float [b], cube root of the preceding RR interval over the record's mean
    gain: ndarray  # float [b], amplitude, near 1 (respiration)

    def where(self, chosen: ndarray) -> "Beats":
        return Beats(*(column[chosen] for column in self))


class Atrial(NamedTuple):
    """Two oscillators per record for the atria of fibrillation and flutter."""

    frequency: ndarray  # float [n,2], Hz
    phase: ndarray  # float [n,2], rad at time 0
    swing: ndarray  # float [n,2], rad of slow phase wandering: 0 for the regular flutter
    overtone: ndarray  # float [n,2], share of the second harmonic: a sawtooth rather than a sine
    dipole: ndarray  # float [n,2,3], mV; zero while the atria beat with P waves


def lead_vectors(frontal: ndarray, horizontal: ndarray, gains: ndarray) -> ndarray:
    """Lead matrix [n,8,3] of hearts turned by two angles (rad; + turns left to down, and left to back)."""
    one, zero = np.ones_like(frontal), np.zeros_like(frontal)
    cf, sf, ch, sh = np.cos(frontal), np.sin(frontal), np.cos(horizontal), np.sin(horizontal)
    about_z = np.stack([cf, -sf, zero, sf, cf, zero, zero, zero, one], -1).reshape(-1, 3, 3)
    about_y = np.stack([ch, zero, -sh, zero, one, zero, sh, zero, ch], -1).reshape(-1, 3, 3)
    return gains[:, :, None] * (DOWER @ (about_z @ about_y))


def add_wave(activity: ndarray, row: int, wave: Wave, beats: Beats) -> None:
    """Adds the pulses of a wave to its row of ``activity`` float32 [n, rows, MARGIN + SAMPLES + MARGIN]."""
    reach = int(wave.reach * RATE_HZ)
    stretch = beats.stretch if wave.repolarisation else 1.0
    centre = (beats.time + wave.centre[beats.record] * stretch) * RATE_HZ + MARGIN
    first = np.floor(centre).astype(np.int64) - reach
    inside = (first >= 0) & (first + 2 * reach + 2 <= activity.shape[2])
    scale = 1 / (wave.width[beats.record] * stretch * RATE_HZ)
    z = np.arange(2 * reach + 2, dtype=np.float32) - (centre - first)[inside, None].astype(np.float32)
    if wave.rise != 1:
        z[:, : reach + 1] /= wave.rise  # column `reach` is the last one at or before the centre
    z *= scale[inside, None].astype(np.float32)
    np.square(z, out=z)
    if wave.plateau:
        np.square(z, out=z)
    z *= -0.5
    np.exp(z, out=z)
    z *= beats.gain[inside, None].astype(np.float32)
    start = (beats.record[inside] * activity.shape[1] + row) * activity.shape[2] + first[inside]
    np.add.at(activity.reshape(-1), (start[:, None] + np.arange(z.shape[1])).ravel(), z.ravel())


def atrial_activity(frequency: ndarray, phase: ndarray, swing: ndarray, overtone: ndarray) -> ndarray:
    """Oscillations sin(theta) + overtone sin(2 theta), float32 [n,2,SAMPLES], of columns [n,2] of ``Atrial``."""
    frequency, phase, swing, overtone = (a[..., None].astype(np.float32) for a in (frequency, phase, swing, overtone))
    t = np.arange(SAMPLES, dtype=np.float32) / RATE_HZ
    # The phase wanders in an oscillation of its own, seven times slower than the waves and never in step with them.
    theta = 2 * np.float32(np.pi) * frequency * t + phase + swing * np.sin(0.9 * frequency * t + 3 * phase)
    return np.sin(theta) * (1 + 2 * overtone * np.cos(theta))


@lru_cache(maxsize=1)
def noise_pools() -> tuple[ndarray, ndarray]:
    """(muscle and electrode noise, baseline wander): float32 of unit variance, read at random offsets.

    Made once from a constant seed: what differs between records is where they read. Noise is half white, half 1/f from
    1 Hz; wander is noise of 0.05-0.5 Hz.
    """
    rng = np.random.default_rng(500)
    frequency = np.fft.rfftfreq(NOISE_POOL, 1 / RATE_HZ)
    pools = []
    for shape in (
        np.where(frequency > 0.5, 1 / np.sqrt(np.maximum(frequency, 1)) + 0.12, 0) * (frequency < 150),
        ((frequency > 0.05) & (frequency < 0.5)) / np.sqrt(np.maximum(frequency, 0.05)),
    ):
        spectrum = shape * (rng.standard_normal(len(shape)) + 1j * rng.standard_normal(len(shape)))
        pool = np.fft.irfft(spectrum, NOISE_POOL)
        pools.append((pool / pool.std()).astype(np.float32))
    return pools[0], pools[1]


def read_pool(pool: ndarray, offsets: ndarray) -> ndarray:
    """Stretches of the pool at ``offsets`` (uniform in [0,1)), float32 [*offsets.shape, SAMPLES]."""
    windows = np.lib.stride_tricks.sliding_window_view(pool, SAMPLES)
    return windows[(offsets * len(windows)).astype(np.int64)]


def twelve_leads(eight_mv: ndarray) -> ndarray:
    """int16 [n,12,L], canonical order, from float [n,8,L] mV of I, II, V1..V6 (scaled in place)."""
    adc = np.empty((eight_mv.shape[0], 12, eight_mv.shape[2]), np.int16)
    eight_mv *= GAIN
    np.rint(eight_mv, out=eight_mv)
    adc[:, :2], adc[:, 6:] = eight_mv[:, :2], eight_mv[:, 2:]
    one, two = adc[:, 0], adc[:, 1]
    np.subtract(two, one, out=adc[:, 2])
    adc[:, 3] = -((one + two) >> 1)  # halves are rounded down: within half a unit
    adc[:, 4] = one - (two >> 1)
    adc[:, 5] = two - (one >> 1)
    return adc
