"""Synthetic 12-lead ECGs with reports and labels: the built-in corpus, made on the spot.

A *subject* has an anatomy; a *record* adds a rhythm and up to three conditions of continuous severity
(``synthetic_draws``), which shape the beats (``synthetic_heart``); these become millivolts (``synthetic_waves``) and
words (``synthetic_reports``). Everything is a function of (seed, record number), so any slice can be made alone.

Plausible, not diagnostic.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from dbeta.data.synthetic_draws import COLUMN, LABELS, RHYTHMS, Draws, draw_conditions
from dbeta.data.synthetic_heart import WALLS, beat_waves, draw_anatomy, draw_rhythm, heart_leads
from dbeta.data.synthetic_reports import PROMPTS, write_report, zero_shot_prompts
from dbeta.data.synthetic_waves import (
    GAIN,
    MARGIN,
    RATE_HZ,
    SAMPLES,
    add_wave,
    atrial_activity,
    noise_pools,
    read_pool,
    twelve_leads,
)

__all__ = ["LABELS", "PROMPTS", "RHYTHMS", "SyntheticBatch", "generate", "zero_shot_prompts"]

RECORDS_PER_SUBJECT = 2
BLOCK = 32  # records made at once; their activity is 11 MB
ATRIAL, WANDER, ROWS = 11, 13, 16  # rows of the activity: eleven waves, two oscillators, three of wander


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticBatch:
    """n records of 10 s at 500 Hz, leads I II III aVR aVL aVF V1..V6."""

    adc: ndarray  # int16 [n,12,5000]; mV = (adc - baseline) / gain
    gain: int  # units per mV
    baseline: int
    rate: int  # Hz
    reports: list[str]
    labels: list[tuple[str, ...]]  # in the order of LABELS; exactly one is of RHYTHMS
    subjects: list[str]
    severity: ndarray  # float32 [n, len(LABELS)]: 0 absent, else (0,1] from mild to marked


def generate(count: int, *, seed: int = 0, start: int = 0) -> SyntheticBatch:
    """Makes records ``start .. start + count`` of the corpus of ``seed``.

    Args:
        count: number of records.
        seed: of the corpus; another seed has other subjects.
        start: number of the first record. Record i is the same whatever ``count`` and ``start`` it is made with.

    Raises:
        ValueError: ``count`` or ``start`` is negative.
    """
    if count < 0 or start < 0:
        raise ValueError(f"count and start must be 0 or more, got count={count}, start={start}")
    ids = np.arange(start, start + count)
    adc = np.empty((count, 12, SAMPLES), np.int16)
    severity = np.empty((count, len(LABELS)), np.float32)
    reports: list[str] = []
    for low in range(0, count, BLOCK):
        block = slice(low, low + BLOCK)
        adc[block], severity[block], written = _make(seed, ids[block])  # one pass: memory is touched in order
        reports += written
    return SyntheticBatch(
        adc=adc, gain=GAIN, baseline=0, rate=RATE_HZ, reports=reports, severity=severity,
        labels=[tuple(LABELS[column] for column in np.flatnonzero(row)) for row in severity],
        subjects=[f"synthetic-{seed}-{subject:07d}" for subject in ids // RECORDS_PER_SUBJECT],
    )  # fmt: skip


def _make(seed: int, ids: ndarray) -> tuple[ndarray, ndarray, list[str]]:
    """(adc [n,12,5000], severity [n, labels], reports) of a block of records."""
    draws = Draws(seed, 1, ids)
    severity = draw_conditions(draws)
    anatomy = draw_anatomy(Draws(seed, 0, ids // RECORDS_PER_SUBJECT), draws)
    rhythm = draw_rhythm(severity, draws)
    walls = np.floor(len(WALLS) * draws.many(3)).astype(np.int64)
    # Most hypertrophied hearts show strain; not where it would be read as another label's ST or T change.
    repolarisation = severity[:, [COLUMN["STE"], COLUMN["STD"], COLUMN["TINV"]]].any(1)
    strain = np.where(repolarisation | (draws.uniform() < 0.35), 0, severity[:, COLUMN["LVH"]].astype(np.float64))

    groups = beat_waves(severity, anatomy, rhythm, walls, strain, draws)
    beats = [rhythm.beats.where(which) for which in (rhythm.kind == 1, rhythm.kind < 2, rhythm.kind == 2)]
    activity = np.zeros((len(ids), ROWS, MARGIN + SAMPLES + MARGIN), np.float32)
    dipoles = np.zeros((len(ids), 3, ATRIAL + 2))
    row = 0
    for waves, those in zip(groups, beats, strict=True):
        for wave in waves:
            add_wave(activity, row, wave, those)
            dipoles[:, :, row] = wave.dipole
            row += 1
    inside = slice(MARGIN, MARGIN + SAMPLES)
    restless = np.flatnonzero(rhythm.atrial.dipole.any((1, 2)))
    activity[restless, ATRIAL : ATRIAL + 2, inside] = atrial_activity(*(part[restless] for part in rhythm.atrial[:4]))
    dipoles[:, :, ATRIAL:] = rhythm.atrial.dipole.transpose(0, 2, 1)

    noise, wander = noise_pools()
    activity[:, WANDER:, inside] = read_pool(wander, draws.many(ROWS - WANDER))
    drift = 0.022 * draws.factor(0.6)[:, None, None] * draws.normal(8 * 3).reshape(-1, 8, 3)
    weights = np.concatenate([heart_leads(severity, anatomy) @ dipoles, drift], 2).astype(np.float32)
    leads = weights @ activity[:, :, inside]
    hiss = read_pool(noise, draws.many(8))
    hiss *= (0.013 * draws.factor(0.3)[:, None] * draws.factor(0.3, 8))[..., None].astype(np.float32)
    leads += hiss

    words, rate = draws.many(48), np.rint(60 / rhythm.interval).astype(int)
    reports = [
        write_report(severity[i], rate[i], [WALLS[k] for k in walls[i]], strain[i], rhythm.conduction[i], words[i])
        for i in range(len(ids))
    ]
    return twelve_leads(leads), severity, reports
