"""From conditions to a heart: when it beats, and the waves of a beat.

Textbook values for an adult at rest. A subject's anatomy (axis, amplitudes, intervals) is drawn once and shared by the
subject's records; conditions change it in proportion to their severity.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray

from dbeta.data.synthetic_draws import COLUMN, Draws
from dbeta.data.synthetic_waves import Atrial, Beats, Wave, lead_vectors

MAX_BEATS = 40
WALLS = ("anterior", "inferior", "lateral")
# Dipole (left, down, back) of each wall of the left ventricle: where injury, depression or inversion points.
WALL_DIPOLES = np.array([(0.45, 0.05, -0.85), (-0.1, 1.0, 0.05), (0.95, 0.1, 0.15)])


class Rhythm(NamedTuple):
    """When n hearts beat, and what their atria do."""

    beats: Beats
    kind: ndarray  # int8 [b]: 0 conducted without P wave, 1 conducted after a P wave, 2 ventricular extrasystole
    interval: ndarray  # float [n], s, mean RR without extrasystoles
    conduction: ndarray  # int [n]: flutter waves per beat, 0 if variable or no flutter
    atrial: Atrial


class Anatomy(NamedTuple):
    """A subject's heart and thorax, with the small differences from one recording to the next."""

    frontal: ndarray  # rad [n], turn of the heart about the back-to-front axis
    horizontal: ndarray  # rad [n], turn about the vertical axis
    leads: ndarray  # [n,8], lead gains
    voltage: ndarray  # [n], of the QRS complex
    p_wave: ndarray  # [n], amplitude
    t_wave: ndarray  # [n], amplitude
    septal: ndarray  # [n], size of the first vector
    basal: ndarray  # [n], size of the last vector
    qrs: ndarray  # [n], duration factor
    pr: ndarray  # [n], s
    qt: ndarray  # [n], duration factor


def draw_anatomy(subject: Draws, record: Draws) -> Anatomy:
    """Anatomy of n records, subject draws first."""
    return Anatomy(
        frontal=np.radians(16 * subject.normal(1)[:, 0] + 3 * record.normal(1)[:, 0]),
        horizontal=np.radians(11 * subject.normal(1)[:, 0] + 3 * record.normal(1)[:, 0]),
        leads=subject.factor(0.10, 8) * record.factor(0.03, 8),
        voltage=subject.factor(0.14) * record.factor(0.04),
        p_wave=0.75 * subject.factor(0.18) * record.factor(0.05),
        t_wave=subject.factor(0.22) * record.factor(0.08),
        septal=subject.factor(0.35),
        basal=subject.factor(0.25),
        qrs=subject.factor(0.06),
        pr=subject.uniform(0.125, 0.175),
        qt=subject.factor(0.04),
    )


def draw_rhythm(severity: ndarray, draws: Draws) -> Rhythm:
    """Beats from 1.5 s before the record to past its end."""
    n = len(severity)
    bradycardia, tachycardia, fibrillation, flutter, pvc = (
        severity[:, COLUMN[name]].astype(np.float64) for name in ("SBRAD", "STACH", "AFIB", "AFLT", "PVC")
    )
    sinus = (fibrillation == 0) & (flutter == 0)

    # Sinus rates follow from the severity; fibrillation is conducted at any rate; flutter at a fraction of its own.
    rate = np.where(tachycardia > 0, 102 + 50 * tachycardia, draws.uniform(62, 97))
    rate = np.where(bradycardia > 0, 58 - 20 * bradycardia, rate)
    rate = np.where(fibrillation > 0, 55 * 3 ** draws.uniform(), rate)
    flutter_hz = draws.uniform(4.2, 5.5)
    conduction = np.searchsorted((0.4, 0.65), draws.uniform()) + 2
    variable = draws.uniform() < 0.35
    ratio = np.where(variable[:, None], 2 + np.floor(3 * draws.many(MAX_BEATS)), conduction[:, None])

    beat = np.arange(MAX_BEATS)
    breathing = np.sin(2 * np.pi * (draws.uniform(0.15, 0.35)[:, None] * beat + draws.uniform()[:, None]))
    noise = draws.normal(MAX_BEATS)
    rr = (60 / rate)[:, None] * (1 + draws.uniform(0.004, 0.045)[:, None] * breathing + 0.008 * noise)
    irregular = (60 / rate)[:, None] * np.exp((0.17 + 0.13 * fibrillation)[:, None] * noise)
    rr = np.where(fibrillation[:, None] > 0, np.maximum(irregular, 0.30), rr)
    rr = np.where(flutter[:, None] > 0, ratio / flutter_hz[:, None] * (1 + 0.004 * noise), rr)
    interval = rr.mean(1)

    # Extrasystoles come early and are followed by a pause; the one nearest a time within the record is certain.
    first = -1.5 + draws.uniform() * interval
    certain = np.abs(first[:, None] + np.cumsum(rr, 1) - draws.uniform(2, 8)[:, None]).argmin(1)
    early = draws.many(MAX_BEATS) < (0.10 + 0.28 * pvc)[:, None]
    early[:, 1:] &= ~early[:, :-1]
    early[np.arange(n), certain] = True
    early[np.arange(n), certain + 1] = early[np.arange(n), certain - 1] = False
    early &= pvc[:, None] > 0
    coupled = np.maximum(rr * draws.uniform(0.55, 0.78)[:, None], 0.34)
    pause = np.where(sinus, 1.0, 0.5)[:, None] * np.maximum(rr - coupled, 0)
    after = np.zeros_like(early)
    after[:, 1:] = early[:, :-1]
    before = np.where(early, coupled, rr + np.where(after, np.roll(pause, 1, 1), 0))
    time = first[:, None] + np.cumsum(before, 1)

    amplitude = 1 + draws.uniform(0.0, 0.06)[:, None] * np.roll(breathing, 1, 1)
    record, column = np.nonzero(time < 10.8)
    chosen = (record, column)
    stretch = np.cbrt(np.clip(before / interval[:, None], 0.55, 1.6))
    return Rhythm(
        beats=Beats(record, time[chosen], stretch[chosen], amplitude[chosen]),
        kind=np.where(early, 2, sinus[:, None])[chosen].astype(np.int8),
        interval=interval,
        conduction=np.where((flutter > 0) & ~variable, conduction, 0),
        atrial=_draw_atrial(fibrillation, flutter, flutter_hz, first, draws),
    )


def _draw_atrial(fibrillation: ndarray, flutter: ndarray, flutter_hz: ndarray, first: ndarray, draws: Draws) -> Atrial:
    """Fibrillation: two wandering oscillators, best seen in V1. Flutter: one regular sawtooth, in II III aVF."""
    coarse, saw = (fibrillation > 0)[:, None], (flutter > 0)[:, None]
    frequency = np.stack([draws.uniform(5.5, 8.0), draws.uniform(4.3, 6.5)], 1)
    frequency[:, 0] = np.where(flutter > 0, flutter_hz, frequency[:, 0])
    phase = 2 * np.pi * draws.many(2)
    phase[:, 0] = np.where(flutter > 0, phase[:, 0] - 2 * np.pi * flutter_hz * first, phase[:, 0])  # beats keep step
    direction = np.array([(-0.2, 0.7, -0.7), (0.35, 0.45, -0.6)]) + 0.25 * draws.normal(6).reshape(-1, 2, 3)
    sawtooth = np.array([(0.05, 0.9, -0.2), (0, 0, 0)]) + np.array([[[0.2], [0]]]) * draws.normal(6).reshape(-1, 2, 3)
    size = np.where(coarse, 0.03 + 0.055 * fibrillation[:, None], 0.08 + 0.12 * flutter[:, None])
    dipole = np.where(coarse[..., None], direction, sawtooth) * (size * (coarse | saw))[..., None]
    return Atrial(
        frequency=frequency,
        phase=phase,
        swing=np.where(coarse, 1.5 + 2.0 * draws.many(2), 0),
        overtone=np.where(coarse, 0.2, -0.4),
        dipole=dipole,
    )


def beat_waves(
    severity: ndarray, anatomy: Anatomy, rhythm: Rhythm, walls: ndarray, strain: ndarray, draws: Draws
) -> tuple[list[Wave], list[Wave], list[Wave]]:
    """The waves of an atrial beat, a conducted ventricular beat and a ventricular extrasystole.

    Args:
        severity: float [n, len(LABELS)].
        walls: int [n,3], index into WALLS of ST elevation, ST depression and T inversion.
        strain: float [n], repolarisation change of hypertrophy, 0 to 1.
    """
    of = {name: severity[:, column].astype(np.float64) for name, column in COLUMN.items()}
    right, left, hypertrophy = of["RBBB"], of["LBBB"], of["LVH"]
    is_right, is_left, is_inverted = (right > 0) * 1.0, (left > 0) * 1.0, (of["TINV"] > 0) * 1.0
    slow = np.cbrt(rhythm.interval / 0.8)  # Fridericia
    low = np.where(of["LVOLT"] > 0, 0.46 - 0.22 * of["LVOLT"], 1.0)
    tall = np.where(hypertrophy > 0, 1.6 + 0.9 * hypertrophy, 1.0)
    # P and T shrink less than QRS: the encoder normalises each channel, so only ratios tell low voltage apart.
    qrs, soft = anatomy.voltage * low * tall, low**0.25

    def point(*xyz: float | ndarray) -> ndarray:
        return np.stack([np.broadcast_to(axis, slow.shape) for axis in xyz], 1)

    def mix(share: ndarray, one: tuple, other: tuple) -> ndarray:
        return point(*one) + share[:, None] * (point(*other) - point(*one))

    # P: right atrium, then left.
    pr = np.minimum(anatomy.pr * slow**0.7, 0.185)
    pr = np.where(of["1AVB"] > 0, np.clip(0.235 + 0.14 * of["1AVB"], 0.225, 0.68 * rhythm.interval), pr)
    p_wave = (anatomy.p_wave * soft)[:, None]
    onset = -0.042 * anatomy.qrs - pr
    atria = [
        Wave(onset + 0.036, 0.016 * np.ones_like(slow), p_wave * point(0.04, 0.14, -0.09), 0.056),
        Wave(onset + 0.066, 0.018 * np.ones_like(slow), p_wave * point(0.10, 0.08, 0.08), 0.063),
    ]

    # QRS: septum, free wall, base, and what a blocked bundle leaves for last.
    w = anatomy.qrs * (1 + 0.10 * hypertrophy)
    septum = mix(is_left, (-0.12, -0.04, -0.25), (0.12, 0.02, 0.15)) * anatomy.septal[:, None]
    wall = mix(is_left, (0.95, 0.70, 0.10), (0.70, 0.40, 0.35)) + hypertrophy[:, None] * point(0.25, -0.15, 0.2)
    base = mix(is_left, (0.25, -0.05, 0.75), (0.55, 0.15, 0.50)) * (anatomy.basal * (1 - 0.5 * is_right))[:, None]
    late = mix(is_left, (-0.45, 0.02, -0.60), (0.90, 0.10, 0.50)) * (is_left + is_right * (0.75 + 0.5 * right))[:, None]
    ventricles = [
        Wave(-0.024 * w, 0.0075 * w, qrs[:, None] * septum, 0.034),
        Wave(0.006 * is_left, 0.010 * w * (1 + 0.8 * is_left), qrs[:, None] * wall, 0.085),
        Wave(w * (0.020 + 0.018 * is_left), 0.010 * w * (1 + is_left), qrs[:, None] * base, 0.090),
        Wave(
            np.where(left > 0, 0.062 + 0.026 * left, 0.056 + 0.026 * right), 0.017 + 0.005 * (left + right),
            (anatomy.voltage * low * tall**0.5)[:, None] * late, 0.080,
        ),
    ]  # fmt: skip

    # ST and T: injury points at its wall, ischaemia away from it; a wide QRS is followed by an opposite T.
    to_wall = WALL_DIPOLES[walls]
    junction = np.maximum(0.045 * w, (is_left + is_right) * 0.095 + 0.03 * (left + right))
    injury = (of["STE"] > 0) * (0.17 + 0.33 * of["STE"])
    ischaemia = (of["STD"] > 0) * (0.13 + 0.22 * of["STD"])
    st = injury[:, None] * to_wall[:, 0] - ischaemia[:, None] * to_wall[:, 1] + 0.015 * draws.normal(3)
    st -= (is_left * qrs)[:, None] * point(0.12, 0.03, 0.09) + strain[:, None] * point(0.12, 0.05, -0.03)
    t = (anatomy.t_wave * soft)[:, None] * (point(0.35, 0.25, -0.15) + 0.04 * draws.normal(3))
    t = t * (1 - 1.3 * strain)[:, None] + (0.6 * injury)[:, None] * to_wall[:, 0]
    t -= (is_left * qrs)[:, None] * point(0.62, 0.32, 0.10) - (is_right * (0.5 + right))[:, None] * point(0.06, 0, 0.12)
    turned = -(0.6 * to_wall[:, 2] + 0.4 * point(0.8, 0.55, -0.25)) * (soft * (0.18 + 0.36 * of["TINV"]))[:, None]
    t = np.where(is_inverted[:, None] > 0, turned, t)
    peak = (0.225 * anatomy.qt + 0.025) * slow + 0.6 * (junction - 0.045)
    ventricles += [
        Wave(junction + 0.062 * slow, 0.075 * slow, st, 0.19, plateau=True),
        Wave(peak, 0.034 * slow * anatomy.qt, t, 0.23, rise=1.6, repolarisation=True),
    ]

    # An extrasystole starts in one ventricle and runs to the other: wide, large, with an opposite T.
    origin = np.where(draws.uniform() < 0.5, 1.0, -1.0)[:, None]
    course = origin * point(0.85, 0.0, 0.75) + point(0, 1, 0) * (1.6 * draws.uniform() - 0.8)[:, None]
    course = (course + 0.15 * draws.normal(3)) * (draws.uniform(0.85, 1.5) * anatomy.voltage * low**0.8)[:, None]
    second = 0.55 * course + 0.25 * draws.normal(3)
    width = draws.uniform(0.019, 0.027)
    extrasystole = [
        Wave(np.zeros_like(slow), width, course, 0.115),
        Wave(0.055 + width * 0.3, width, second, 0.115),
        Wave(0.31 * slow, 0.055 * slow, -0.42 * course, 0.25, rise=1.4),
    ]
    return atria, ventricles, extrasystole


def heart_leads(severity: ndarray, anatomy: Anatomy) -> ndarray:
    """Lead matrix [n,8,3]; hypertrophy and left bundle branch block turn the axis to the left and back."""
    turn = 18 * severity[:, COLUMN["LVH"]] + 14 * severity[:, COLUMN["LBBB"]]
    return lead_vectors(anatomy.frontal - np.radians(turn), anatomy.horizontal, anatomy.leads)
