"""What a machine would write under a synthetic record, and the held-out prompts that ask for it again.

A report never names a condition that the record has not. Three of four name every condition; the rest are brief and
name one, as a reader does who was asked one question (without them a text about one condition, which is what a prompt
is, would be unlike every report). Wording varies: several sentences per condition, options inside a sentence, degrees
that follow the severity, the order of statements. In a sentence, ``[a|b|]`` is a choice and ``{...}`` a finding.
"""

import re
from collections.abc import Iterator

from numpy import ndarray

from dbeta.data.synthetic_draws import LABELS, RHYTHMS

SENTENCES = {
    "SR": (
        "Normal sinus rhythm[, rate {rate}||]",
        "Sinus rhythm[ at a normal rate| with regular RR intervals|]",
        "Regular sinus rhythm[, normal rate|]",
        "Rhythm is [normal |regular ]sinus rhythm",
    ),
    "SBRAD": (
        "[{grade} |]sinus bradycardia[, rate {rate}||]",
        "Sinus bradycardia[, slow rate|]",
        "Slow sinus rate, bradycardia",
        "Bradycardia[, slow sinus rate| of sinus origin]",
        "Rhythm is [{grade} |]sinus bradycardia",
    ),
    "STACH": (
        "[{grade} |]sinus tachycardia[, rate {rate}||]",
        "Sinus tachycardia[, fast rate|]",
        "Fast sinus rate, tachycardia",
        "Tachycardia[, fast sinus rate| of sinus origin]",
        "Rhythm is [{grade} |]sinus tachycardia",
    ),
    "AFIB": (
        "Atrial fibrillation[ with {response} response|, rate {rate}||]",
        "[Coarse |Fine |]atrial fibrillation[, no P waves|, irregular RR intervals]",
        "Irregular rhythm[, no P waves|], atrial fibrillation",
        "Rhythm is atrial fibrillation[, irregular|]",
        "Fibrillation of the atria[ with {response} response|]",
    ),
    "AFLT": (
        "Atrial flutter[ with {conduction} conduction|, rate {rate}||]",
        "Atrial flutter, [sawtooth flutter waves|{conduction} conduction]",
        "Sawtooth flutter waves[, atrial flutter|]",
        "Rhythm is atrial flutter[ with {conduction} conduction|]",
        "Flutter of the atria[, {conduction} conduction|]",
    ),
    "1AVB": (
        "1st degree A-V block[, prolonged PR interval|]",
        "First degree AV block[ with long PR interval| with {grade} PR prolongation]",
        "[{grade} |]prolonged PR interval, first degree AV block",
        "Prolonged PR interval[, 1st degree AV block|]",
        "AV block of first degree, prolonged PR",
    ),
    "RBBB": (
        "[Complete |]right bundle branch block[, RBBB|]",
        "RBBB, right bundle branch block",
        "Right bundle branch block[, RBBB pattern| with wide QRS]",
        "[{grade} |]QRS widening, RBBB, right bundle branch block",
        "Block of right bundle branch, RBBB",
    ),
    "LBBB": (
        "[Complete |]left bundle branch block[, LBBB|]",
        "LBBB, left bundle branch block",
        "Left bundle branch block[, LBBB pattern| with wide QRS]",
        "[{grade} |]QRS widening, LBBB, left bundle branch block",
        "Block of left bundle branch, LBBB",
    ),
    "PVC": (
        "[{often} |]ventricular premature complexes[, PVCs|]",
        "[{often} |]premature ventricular complexes[, ectopy|]",
        "[{often} |]PVCs, premature complexes",
        "[{often} |]premature ventricular beats[, PVCs|]",
        "[{often} |]ectopy, premature beats",
    ),
    "LVH": (
        "[{hedge} |]left ventricular hypertrophy[, LVH|]{strain}",
        "[{hedge} |]LVH, left ventricular hypertrophy{strain}",
        "Voltage criteria for hypertrophy, LVH{strain}",
        "[{hedge} |]ventricular hypertrophy, LVH{strain}",
        "Hypertrophy of left ventricle, LVH{strain}",
    ),
    "STE": (
        "[{grade} |]{wall0} ST elevation[, acute injury|]",
        "[{grade} |]ST elevation in {wall0} leads[, injury|]",
        "ST segment elevation, acute {wall0} injury",
        "Elevated ST segment, ST elevation",
        "Acute {wall0} injury, ST elevation",
    ),
    "STD": (
        "[{grade} |]{wall1} ST depression[, ischemia|]",
        "[{grade} |]ST depression in {wall1} leads[, ischemia|]",
        "ST segment depression, {wall1} ischemia",
        "Depressed ST segment, ST depression",
        "Ischemia, {wall1} ST depression",
    ),
    "TINV": (
        "[{grade} |]{wall2} T wave inversion[, inverted T waves|]",
        "T wave inversion in {wall2} leads",
        "Inverted T waves[, T wave inversion|]",
        "T waves inverted, {wall2} T wave inversion",
        "{wall2} T wave inversion, T waves inverted",
    ),
    "LVOLT": (
        "[{grade} |]low voltage[, low amplitude QRS|]",
        "Low QRS voltage[, low amplitude in all leads|]",
        "Generalized low voltage[, low amplitude QRS|]",
        "Low voltage throughout[, low amplitude|]",
        "Low amplitude QRS, low voltage",
    ),
}
NORMAL = ("Normal ECG", "Within normal limits", "Normal ECG, no abnormality seen", "Normal tracing")
RATE_ONLY = ("Normal ECG except for rate", "Otherwise normal ECG")
BORDERLINE = ("Borderline ECG", "Otherwise normal ECG", "Borderline abnormal ECG")
ABNORMAL = ("Abnormal ECG", "ECG is abnormal", "Abnormal tracing")

# By severity, in thirds.
GRADES = (("mild", "slight", "minor"), ("moderate", "definite"), ("marked", "severe", "pronounced"))
FREQUENCIES = (("occasional", "isolated"), ("intermittent", "several"), ("frequent", "multiple"))
HEDGES = (("possible", "probable", "consider"), ("probable", "moderate"), ("definite", "marked"))

BRIEF_SHARE = 0.25  # of reports that name one finding only
ORDERED_SHARE = 0.55  # of reports that name the rhythm first
CONCLUDED_SHARE = 0.4  # of the other reports that end with a conclusion

PROMPTS = {
    "SR": (
        "Sinus rhythm: regular RR intervals, normal rate",
        "Normal sinus rhythm, regular rhythm",
        "Regular normal sinus rhythm",
    ),
    "SBRAD": (
        "Sinus bradycardia: bradycardia with a slow rate",
        "Bradycardia with slow rate",
        "Slow rhythm, marked bradycardia",
    ),
    "STACH": (
        "Sinus tachycardia: tachycardia with a fast rate",
        "Tachycardia with fast rate",
        "Fast rhythm, marked tachycardia",
    ),
    "AFIB": (
        "Atrial fibrillation: irregular RR intervals, fibrillation of the atria",
        "Fibrillation, irregular RR intervals, no P waves",
        "Irregular atrial fibrillation",
    ),
    "AFLT": (
        "Atrial flutter: sawtooth flutter of the atria",
        "Flutter waves, sawtooth flutter",
        "Sawtooth atrial flutter with conduction",
    ),
    "1AVB": (
        "First degree AV block: PR interval prolonged",
        "AV block with PR prolongation, first degree",
        "Long PR interval, AV block of 1st degree",
    ),
    "RBBB": (
        "Right bundle branch block (RBBB) with wide QRS, complete",
        "Block in the right bundle branch, right bundle block",
        "RBBB: wide QRS, right bundle",
    ),
    "LBBB": (
        "Left bundle branch block (LBBB) with wide QRS, complete",
        "Block in the left bundle branch, left bundle block",
        "LBBB: wide QRS, left bundle",
    ),
    "PVC": (
        "Premature ventricular complexes (PVCs), ectopy",
        "Ectopy with premature beats, PVCs",
        "PVCs: ventricular premature beats",
    ),
    "LVH": (
        "Left ventricular hypertrophy (LVH), voltage criteria",
        "Hypertrophy of the left ventricle",
        "LVH: ventricular hypertrophy",
    ),
    "STE": (
        "ST elevation: elevated ST segment with acute injury",
        "Elevation of ST segment, ST elevation",
        "Injury with ST elevation",
    ),
    "STD": (
        "ST depression: depressed ST segment with ischemia",
        "Depression of ST segment, ST depression",
        "Ischemia with ST depression",
    ),
    "TINV": (
        "T wave inversion: inverted T waves in leads",
        "Inversion of T waves, T waves inverted",
        "T wave inversion in all leads",
    ),
    "LVOLT": (
        "Low voltage: low amplitude QRS in all leads",
        "Low amplitude, generalized low QRS voltage",
        "QRS of low voltage, low amplitude",
    ),
}


def zero_shot_prompts() -> dict[str, str]:
    """One held-out description per label."""
    return {label: prompts[0] for label, prompts in PROMPTS.items()}


def write_report(severity: ndarray, rate: int, walls: list[str], strain: float, conduction: int, words: ndarray) -> str:
    """The report of one record.

    Args:
        severity: float [len(LABELS)], 0 where a condition is absent.
        rate: beats per minute.
        walls: of ST elevation, ST depression, T inversion.
        strain: repolarisation change of hypertrophy, 0 for none.
        conduction: flutter waves per beat, 0 if variable.
        words: float [48], uniform draws that choose the wording.
    """
    draws = iter(words)
    facts = {
        "rate": rate,
        "response": "rapid" if rate > 110 else "slow" if rate < 70 else "controlled",
        "conduction": f"{conduction} to 1" if conduction else "variable",
        "strain": _pick((" with repolarization abnormality", " with strain pattern"), draws) if strain else "",
    } | {f"wall{i}": wall for i, wall in enumerate(walls)}
    present = [(label, float(s)) for label, s in zip(LABELS, severity, strict=True) if s]
    if next(draws) > ORDERED_SHARE:  # a machine names the rhythm first, but any finding may lead
        present = [finding for _, finding in sorted((next(draws), finding) for finding in present)]
    statements = [_sentence(_pick(SENTENCES[label], draws), s, facts, draws) for label, s in present]
    if next(draws) < BRIEF_SHARE:
        statements = [_pick(statements, draws)]
    elif next(draws) < CONCLUDED_SHARE:
        statements.append(_pick(_conclusions(present), draws))
    return ". ".join(statement[0].upper() + statement[1:] for statement in statements)


def _conclusions(present: list[tuple[str, float]]) -> tuple[str, ...]:
    """What sums up these findings."""
    found = [s for label, s in present if label not in RHYTHMS]
    rhythm = next(label for label, _ in present if label in RHYTHMS)
    if not found and rhythm in ("SR", "SBRAD", "STACH"):
        return NORMAL if rhythm == "SR" else RATE_ONLY
    return BORDERLINE if rhythm == "SR" and sum(found) < 0.4 else ABNORMAL


def _pick(options: tuple[str, ...] | list[str], draws: Iterator[float]) -> str:
    return options[int(next(draws) * len(options))]


def _sentence(template: str, severity: float, facts: dict, draws: Iterator[float]) -> str:
    """A sentence with its choices made and its slots filled."""
    third = min(int(3 * severity), 2)
    degrees = {name: words[third] for name, words in (("grade", GRADES), ("often", FREQUENCIES), ("hedge", HEDGES))}
    text = re.sub(r"\[([^]]*)\]", lambda choice: _pick(choice[1].split("|"), draws), template)
    slot = lambda name: _pick(degrees[name[1]], draws) if name[1] in degrees else str(facts[name[1]])  # noqa: E731
    return re.sub(r"\{(\w+)\}", slot, text)
