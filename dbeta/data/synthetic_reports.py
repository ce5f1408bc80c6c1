"""What a machine would write under a synthetic record, and the held-out prompts that ask for it again.

A report names every condition of the record and no other one. Wording varies: several sentences per condition, options
inside a sentence, degrees that follow the severity, the order of statements. In a sentence, ``[a|b|]`` is a choice and
``{...}`` a finding; degrees are words that the severity selects.
"""

import re
from collections.abc import Iterator

from numpy import ndarray

from dbeta.data.synthetic_draws import LABELS, RHYTHMS

SENTENCES = {
    "SR": (
        "[Normal |]sinus rhythm[ at {rate} per minute|||]",
        "Sinus rhythm[, normal rate| with regular RR intervals|]",
        "Regular sinus rhythm[, rate {rate}||]",
        "Rhythm is [normal |]sinus[, rate normal|]",
        "Rhythm: [regular |]sinus at a normal rate",
    ),
    "SBRAD": (
        "[{grade} |]sinus bradycardia[ at {rate} per minute|||]",
        "Sinus bradycardia[, slow rate| with slow ventricular rate|]",
        "Slow sinus rhythm, bradycardia",
        "Bradycardia, sinus rhythm[ with a slow rate|]",
        "Rhythm is [{grade} |]sinus bradycardia[, rate {rate}|]",
    ),
    "STACH": (
        "[{grade} |]sinus tachycardia[ at {rate} per minute|||]",
        "Sinus tachycardia[, fast rate| with rapid ventricular rate|]",
        "Fast sinus rhythm, tachycardia",
        "Tachycardia, sinus rhythm[ with a fast rate|]",
        "Rhythm is [{grade} |]sinus tachycardia[, rate {rate}|]",
    ),
    "AFIB": (
        "Atrial fibrillation[ with {response} ventricular response| at {rate} per minute||]",
        "[Coarse |Fine |]atrial fibrillation, [no P waves seen|P waves absent|irregular RR intervals]",
        "Irregularly irregular rhythm[, no P waves|], atrial fibrillation",
        "Irregular rhythm without P waves, [consistent with |suggests |]atrial fibrillation",
        "Rhythm is atrial fibrillation[, irregular {response} ventricular rate|]",
        "Fibrillation of the atria[ with {response} ventricular response|]",
    ),
    "AFLT": (
        "Atrial flutter[ with {conduction} conduction| at a ventricular rate of {rate}||]",
        "Atrial flutter, [sawtooth flutter waves|{conduction} AV conduction]",
        "Sawtooth flutter waves[ in inferior leads|], [consistent with |suggests |]atrial flutter",
        "Rhythm is atrial flutter[ with {conduction} conduction|]",
        "Flutter of the atria[, {conduction} conduction|]",
    ),
    "1AVB": (
        "1st degree A-V block",
        "First degree AV block[ with long PR interval| with {grade} PR prolongation|]",
        "[{grade} |]prolonged PR interval[, first degree AV block|]",
        "[{grade} |]PR interval prolongation",
        "First degree atrioventricular block[, prolonged PR interval|]",
    ),
    "RBBB": (
        "[Complete |]right bundle branch block",
        "RBBB[ with wide QRS|, right bundle branch block|]",
        "Right bundle branch block[ pattern| with {grade} QRS widening|, wide QRS complex]",
        "Wide QRS, right bundle branch block",
        "Conduction delay, right bundle branch block[ type|]",
    ),
    "LBBB": (
        "[Complete |]left bundle branch block",
        "LBBB[ with wide QRS|, left bundle branch block|]",
        "Left bundle branch block[ pattern| with {grade} QRS widening|, wide QRS complex]",
        "Wide QRS, left bundle branch block",
        "Conduction delay, left bundle branch block[ type|]",
    ),
    "PVC": (
        "[{often} |]ventricular premature complexes",
        "[{often} |]premature ventricular complexes[ seen|]",
        "[{often} |]PVCs[, premature ventricular complexes|]",
        "[{often} |]premature ventricular beats[, wide QRS|]",
        "[{often} |]ventricular ectopy, premature ventricular beats",
        "[{often} |]ventricular premature beats",
    ),
    "LVH": (
        "[{hedge} |]left ventricular hypertrophy{strain}",
        "[{hedge} |]LVH[ by voltage|, high QRS voltage|]{strain}",
        "Voltage criteria for left ventricular hypertrophy{strain}",
        "High QRS voltage, left ventricular hypertrophy{strain}",
        "Hypertrophy of the left ventricle[, high voltage|]{strain}",
    ),
    "STE": (
        "[{grade} |]{wall0} ST elevation",
        "[{grade} |]ST elevation in {wall0} leads[, consider acute injury|]",
        "ST segment elevation, {wall0}[, acute injury|]",
        "Elevated ST segments in {wall0} leads",
        "{wall0} injury, [{grade} |]ST segment elevation",
    ),
    "STD": (
        "[{grade} |]{wall1} ST depression",
        "[{grade} |]ST depression in {wall1} leads[, consider ischemia|]",
        "ST segment depression, {wall1}[, ischemia|]",
        "Depressed ST segments in {wall1} leads",
        "{wall1} ischemia, [{grade} |]ST segment depression",
    ),
    "TINV": (
        "[{grade} |]{wall2} T wave inversion",
        "[{grade} |]T wave inversion in {wall2} leads[, consider ischemia|]",
        "Inverted T waves[ in {wall2} leads|]",
        "T waves inverted, {wall2}[, T wave abnormality|]",
        "{wall2} T wave abnormality, inverted T waves",
    ),
    "LVOLT": (
        "[{grade} |]low voltage[ QRS|]",
        "Low QRS voltage[ in all leads| in limb and chest leads|]",
        "Generalized low voltage[, low QRS amplitude|]",
        "Low voltage[ in limb and chest leads| throughout|]",
        "Low amplitude QRS complexes, [{grade} |]low voltage",
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

PROMPTS = {
    "SR": (
        "Normal sinus rhythm with a regular normal rate",
        "Sinus rhythm: regular RR intervals, normal sinus rate",
        "Regular normal sinus rhythm seen",
    ),
    "SBRAD": (
        "Sinus bradycardia: sinus rhythm at a slow rate",
        "Bradycardia, slow sinus rate",
        "Bradycardia with slow ventricular rate, sinus",
    ),
    "STACH": (
        "Sinus tachycardia: sinus rhythm at a fast rate",
        "Tachycardia, fast sinus rate",
        "Tachycardia with rapid ventricular rate, sinus",
    ),
    "AFIB": (
        "Atrial fibrillation: irregularly irregular ventricular rate, P waves absent",
        "Fibrillation of the atria, irregular rhythm without P waves",
        "Irregular RR intervals and no P waves, fibrillation",
    ),
    "AFLT": (
        "Atrial flutter: sawtooth waves of the atria",
        "Flutter waves, sawtooth, in inferior leads",
        "Sawtooth flutter of the atria with AV conduction",
    ),
    "1AVB": (
        "First degree AV block: long PR interval",
        "Atrioventricular block, first degree, with PR prolongation",
        "Long PR interval, prolonged AV conduction of first degree",
    ),
    "RBBB": (
        "Right bundle branch block: wide QRS complex, right conduction delay",
        "Block of the right bundle branch with wide QRS complexes",
        "Conduction delay in the right bundle branch",
    ),
    "LBBB": (
        "Left bundle branch block: wide QRS complex, left conduction delay",
        "Block of the left bundle branch with wide QRS complexes",
        "Conduction delay in the left bundle branch",
    ),
    "PVC": (
        "Premature ventricular complexes: wide ventricular ectopy",
        "Ectopy: premature beats of the ventricle, wide QRS",
        "Ventricular premature complexes seen, PVCs",
    ),
    "LVH": (
        "Left ventricular hypertrophy: high voltage criteria",
        "Hypertrophy of left ventricle by high QRS voltage",
        "LVH, voltage criteria for hypertrophy",
    ),
    "STE": (
        "ST elevation: elevated ST segments, acute injury",
        "Elevation of the ST segment, injury",
        "Acute injury with elevated ST segment in leads",
    ),
    "STD": (
        "ST depression: depressed ST segments, ischemia",
        "Depression of the ST segment, ischemia",
        "Ischemia with depressed ST segment in leads",
    ),
    "TINV": (
        "T wave inversion: inverted T waves in leads",
        "Inversion of the T wave, inverted T",
        "T wave abnormality with T waves inverted",
    ),
    "LVOLT": (
        "Low voltage: low amplitude QRS complexes in limb leads",
        "Low amplitude of QRS, low voltage in chest leads",
        "Low QRS amplitude throughout, generalized",
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
        "strain": _pick(("", " with repolarization abnormality", " with strain pattern")[1:], draws) if strain else "",
    } | {f"wall{i}": wall for i, wall in enumerate(walls)}
    present = [(label, float(s)) for label, s in zip(LABELS, severity, strict=True) if s]
    statements = [_sentence(_pick(SENTENCES[label], draws), s, facts, draws) for label, s in present]
    if next(draws) < 0.45:  # a machine names the rhythm first; elsewhere any statement may lead
        statements = [statement for _, statement in sorted((next(draws), statement) for statement in statements)]
    if next(draws) < 0.6:
        statements.append(_pick(_conclusions(present), draws))
    return ". ".join(statement[0].upper() + statement[1:] for statement in statements)


def _conclusions(present: list[tuple[str, float]]) -> tuple[str, ...]:
    """What sums up these findings."""
    found = [s for label, s in present if label not in RHYTHMS]
    rhythm = present[0][0]
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
