"""The synthetic records do what their labels and reports say, measured from the signal."""

import re
import time

import numpy as np
import pytest
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, find_peaks, sosfiltfilt

from dbeta.data.synthetic import LABELS, PROMPTS, RHYTHMS, generate, zero_shot_prompts

I, II, III, AVR, AVL, AVF = range(6)
V1, V5 = 6, 10

# How a reader recognises each condition in a report, written apart from the sentences that make one.
ANCHORS = {
    "SR": r"sinus rhythm",
    "SBRAD": r"bradycardia",
    "STACH": r"tachycardia",
    "AFIB": r"fibrillation",
    "AFLT": r"flutter",
    "1AVB": r"(first|1st) degree|pr (interval )?prolong|prolonged pr",
    "RBBB": r"right bundle|rbbb",
    "LBBB": r"left bundle|lbbb",
    "PVC": r"premature|pvc",
    "LVH": r"hypertrophy|lvh",
    "STE": r"st (segment )?elevation|elevated st",
    "STD": r"st (segment )?depression|depressed st",
    "TINV": r"t wave inversion|inverted t|t waves inverted",
    "LVOLT": r"low (qrs )?voltage|low amplitude",
}


@pytest.fixture(scope="module")
def batch():
    return generate(1200, seed=7)


def rows_with(batch, *labels, alone=False) -> np.ndarray:
    """Rows that have all of ``labels`` (and nothing else, if ``alone``)."""
    columns = [LABELS.index(label) for label in labels]
    has = (batch.severity[:, columns] > 0).all(1)
    return np.flatnonzero(has & ((batch.severity > 0).sum(1) == len(labels)) if alone else has)


def r_peaks(adc: np.ndarray) -> np.ndarray:
    """Samples of the QRS complexes of a record [12, 5000]: peaks of the smoothed 6-30 Hz amplitude of five leads."""
    band = sosfiltfilt(butter(2, (6, 30), "band", fs=500, output="sos"), adc[[I, II, V1, V1 + 2, V5]] / 1000, axis=1)
    amplitude = uniform_filter1d(np.sqrt((band**2).sum(0)), 60)
    return find_peaks(amplitude, height=0.33 * np.quantile(amplitude, 0.985), distance=130)[0]


def qrs_width(adc: np.ndarray) -> float:
    """Seconds during which the median beat's slope, over all leads, exceeds a tenth of its largest."""
    peaks = [p for p in r_peaks(adc) if 150 < p < 4850]
    beat = np.median([adc[:, p - 100 : p + 100] for p in peaks], axis=0) / 1000
    slope = np.sqrt((np.gradient(uniform_filter1d(beat, 5, axis=1), axis=1) ** 2).sum(0))
    loud = np.flatnonzero(slope[30:170] > 0.12 * slope.max())
    return (loud[-1] - loud[0]) / 500


def test_limb_leads_obey_einthoven_and_goldberger(batch):
    adc = batch.adc[:300].astype(int)
    assert (adc[:, III] == adc[:, II] - adc[:, I]).all()
    for augmented, exact in ((AVR, -(adc[:, I] + adc[:, II]) / 2), (AVL, adc[:, I] - adc[:, II] / 2)):
        assert np.abs(adc[:, augmented] - exact).max() <= 1
    assert np.abs(adc[:, AVF] - (adc[:, II] - adc[:, I] / 2)).max() <= 1
    assert np.abs(adc[:, AVR] + adc[:, AVL] + adc[:, AVF]).max() <= 1
    assert batch.adc.dtype == np.int16 and np.abs(batch.adc[:300]).max() < 12_000  # nothing near an overflow
    assert (adc.std(2) > 5).all()  # no flat lead


def test_a_record_depends_on_seed_and_number_only():
    whole = generate(75, seed=3, start=10)
    for start, count in ((10, 1), (11, 7), (40, 33), (84, 1), (60, 25)):
        part, rows = generate(count, seed=3, start=start), slice(start - 10, start - 10 + count)
        assert (part.adc == whole.adc[rows]).all() and (part.severity == whole.severity[rows]).all()
        assert (part.reports, part.labels) == (whole.reports[rows], whole.labels[rows])
        assert part.subjects == whole.subjects[rows]
    other = generate(75, seed=4, start=10)
    assert (other.adc != whole.adc).any((1, 2)).all() and not set(other.subjects) & set(whole.subjects)
    assert len(generate(0).reports) == 0
    with pytest.raises(ValueError, match="start=-1"):
        generate(3, start=-1)


def test_subjects_have_two_records_alike_in_anatomy():
    made = generate(400, seed=1)
    assert made.subjects[0] == made.subjects[1] != made.subjects[2] and len(set(made.subjects)) == 200
    plain = [i for i in range(0, 400, 2) if all(set(made.labels[j]) <= {*RHYTHMS, "1AVB"} for j in (i, i + 1))]
    axis = np.array([[np.ptp(made.adc[j, lead]) for lead in (I, AVF, V1, V5)] for i in plain for j in (i, i + 1)])
    shape = np.log(axis / axis.mean(1, keepdims=True))
    own = np.linalg.norm(shape[0::2] - shape[1::2], axis=1)
    others = np.linalg.norm(shape[0::2] - np.roll(shape[1::2], 2, axis=0), axis=1)
    assert len(plain) > 8 and np.median(own) < 0.5 * np.median(others)


def test_rates_follow_the_rhythm(batch):
    limits = {"SR": (57, 103), "SBRAD": (34, 60), "STACH": (99, 158)}
    for label, (low, high) in limits.items():
        rows = [i for i in rows_with(batch, label) if not {"PVC", "LVOLT"} & set(batch.labels[i])]
        rates = np.array([60 * 500 / np.median(np.diff(r_peaks(batch.adc[i]))) for i in rows])
        assert ((rates > low) & (rates < high)).mean() > 0.97, (label, np.sort(rates))
        assert rates.std() > 5  # graded, not one rate


def test_fibrillation_is_irregular_and_without_p_waves(batch):
    def variation(i: int) -> float:
        rr = np.diff(r_peaks(batch.adc[i]))
        return rr.std() / rr.mean()

    def before_qrs(i: int) -> float:  # how much of the 300 ms before QRS repeats from beat to beat
        beats = np.array([batch.adc[i, II, p - 150 : p - 30] for p in r_peaks(batch.adc[i]) if p > 150], float)
        beats -= beats.mean(1, keepdims=True)
        return beats.mean(0).var() / beats.var(1).mean()

    irregular = [variation(i) for i in rows_with(batch, "AFIB", alone=True)]
    sinus = [variation(i) for i in rows_with(batch, "SR", alone=True)]
    assert np.quantile(irregular, 0.1) > 0.10 and np.quantile(sinus, 0.9) < 0.06
    slow = [i for i in rows_with(batch, "AFIB", alone=True) if np.median(np.diff(r_peaks(batch.adc[i]))) > 300]
    assert np.median([before_qrs(i) for i in slow]) < 0.5
    assert np.median([before_qrs(i) for i in rows_with(batch, "SR", alone=True)]) > 0.8


def test_flutter_waves_have_one_rate_of_240_to_340_per_minute(batch):
    frequency = np.fft.rfftfreq(4 * 5000, 1 / 500)
    band = (frequency > 3.8) & (frequency < 6.2)

    def peak(i: int) -> float:  # height of the spectral line of the flutter over the median of its band
        power = np.abs(np.fft.rfft(batch.adc[i, [II, III, AVF]] * np.hanning(5000), 4 * 5000)).sum(0)[band]
        return power.max() / np.median(power)

    flutter = [peak(i) for i in rows_with(batch, "AFLT", alone=True)]
    assert np.median(flutter) > 2 * np.median([peak(i) for i in rows_with(batch, "AFIB", alone=True)])


def test_pr_interval_of_first_degree_block(batch):
    def pr(i: int) -> float:  # s from the steepest rise of the P wave to the R wave
        p = [q for q in r_peaks(batch.adc[i]) if q > 260]
        beat = np.median([batch.adc[i, II, q - 220 : q - 30] for q in p], axis=0)
        return (220 - np.argmax(np.gradient(uniform_filter1d(beat, 9)))) / 500

    slow = ("SR", "SBRAD")
    normal = [pr(i) for label in slow for i in rows_with(batch, label, alone=True)]
    blocked = [pr(i) for label in slow for i in rows_with(batch, label, "1AVB", alone=True)]
    assert np.quantile(normal, 0.9) < np.quantile(blocked, 0.1) and np.std(blocked) > 0.015


def test_blocked_bundles_widen_the_qrs(batch):
    narrow = [qrs_width(batch.adc[i]) for i in rows_with(batch, "SR", alone=True)]
    assert np.quantile(narrow, 0.95) < 0.115
    late = {"SR": [], "RBBB": [], "LBBB": []}  # V1, 15-80 ms after the middle of the QRS, mV over what precedes it
    for label in late:
        rows = [i for r in ("SR", "SBRAD", "AFIB") for i in rows_with(batch, *{r, label}, alone=True)]
        widths = [qrs_width(batch.adc[i]) for i in rows]
        if label != "SR":
            assert np.quantile(widths, 0.1) > 0.110 and np.median(widths) > 0.120 and np.std(widths) > 0.005, label
        for i in rows:
            beat = np.median([batch.adc[i, V1, p - 85 : p + 60] for p in r_peaks(batch.adc[i])[1:-1]], axis=0) / 1000
            late[label].append(beat[93:125] - beat[:10].mean())
    assert np.mean(np.max(late["RBBB"], axis=1) > 0.2) > 0.9  # R'
    assert np.mean(np.max(late["SR"], axis=1) > 0.2) < 0.1
    assert np.mean(np.min(late["LBBB"], axis=1) < -0.2) > 0.8  # a broad S


def test_extrasystoles_are_early_wide_and_inside_the_record(batch):
    def prematurity(i: int) -> float:
        rr = np.diff(r_peaks(batch.adc[i]))
        return rr.min() / np.median(rr)

    ectopic = [prematurity(i) for label in ("SR", "SBRAD") for i in rows_with(batch, label, "PVC", alone=True)]
    assert np.mean(np.array(ectopic) < 0.85) > 0.85
    assert np.quantile([prematurity(i) for i in rows_with(batch, "SR", alone=True)], 0.1) > 0.9


def test_amplitudes_of_hypertrophy_and_low_voltage(batch):
    def sokolow(rows: np.ndarray) -> np.ndarray:  # S in V1 + R in V5, mV
        return (batch.adc[rows, V5].max(1) - batch.adc[rows, V1].min(1)) / 1000

    def limb(rows: np.ndarray) -> np.ndarray:  # mean peak-to-peak of I, II, III, mV
        return np.ptp(batch.adc[rows][:, [I, II, III]], axis=2).mean(1) / 1000

    normal = rows_with(batch, "SR", alone=True)
    tall, low = rows_with(batch, "SR", "LVH", alone=True), rows_with(batch, "SR", "LVOLT", alone=True)
    assert np.median(sokolow(tall)) > 1.4 * np.median(sokolow(normal)) and np.median(sokolow(tall)) > 3.5
    assert np.median(limb(low)) < 0.55 * np.median(limb(normal)) and np.median(limb(low)) < 0.6
    assert np.quantile(sokolow(normal), 0.95) > np.quantile(sokolow(tall), 0.05)  # graded: they overlap


def test_st_and_t_changes_reach_the_leads(batch):
    def level(i: int, low: int, high: int) -> np.ndarray:  # mV of every lead around the beat, PR segment = 0
        beats = [batch.adc[i, :, p - 60 : p + 260] for p in r_peaks(batch.adc[i]) if 60 < p < 4740]
        beat = np.median(beats, axis=0) / 1000
        return beat[:, 60 + low : 60 + high].mean(1) - beat[:, 30:38].mean(1)

    def size(label: str | None, function) -> np.ndarray:
        rows = rows_with(batch, "SR", *([label] if label else []), alone=True)
        return np.array([function(i) for i in rows])

    def shift(i: int) -> float:
        return np.abs(level(i, 40, 55)[[II, *range(V1 + 1, 12)]]).max()

    def t_height(i: int) -> float:
        return level(i, 105, 150)[[I, II, *range(V1 + 2, 12)]].min()

    for label in ("STE", "STD"):
        assert np.median(size(label, shift)) > 2 * np.median(size(None, shift)), label
        assert np.std(size(label, shift)) > 0.03  # continuous severity
    assert np.median(size("TINV", t_height)) < -0.1 < 0 < np.median(size(None, t_height))


def test_prevalence_and_mixture_are_balanced(batch):
    share = dict(zip(LABELS, (batch.severity > 0).mean(0), strict=True))
    assert all(0.08 < share[label] < 0.23 for label in LABELS if label != "SR") and 0.3 < share["SR"] < 0.42
    assert all(len(set(labels) & set(RHYTHMS)) == 1 for labels in batch.labels)
    assert set(np.bincount([len(labels) for labels in batch.labels]) > 50) == {False, True}
    assert batch.labels == [tuple(LABELS[c] for c in np.flatnonzero(row)) for row in batch.severity]
    for column in range(len(LABELS)):  # severities fill (0, 1]
        s = batch.severity[:, column][batch.severity[:, column] > 0]
        assert s.min() < 0.1 and s.max() > 0.9 and 0.4 < s.mean() < 0.65


def test_no_label_is_one_fixed_cue(batch):
    """Two records of the same label and rate differ everywhere: no template is shared."""
    for label in LABELS:
        rows = rows_with(batch, label)[:30]
        beats = []
        for i in rows:
            middle = r_peaks(batch.adc[i])[2]
            beats.append(batch.adc[i, :, max(middle - 50, 0) :][:, :150].astype(float).ravel())
        alike = np.corrcoef(beats)[np.triu_indices(len(beats), 1)]
        assert np.quantile(alike, 0.9) < 0.97 and np.std(alike) > 0.05, label


def test_reports_are_true_and_three_of_four_complete(batch):
    complete = []
    for report, labels in zip(batch.reports, batch.labels, strict=True):
        sentences = [re.sub(r"[^a-z0-9 ]", "", sentence.lower()) for sentence in report.split(". ")]
        named = {label for label, anchor in ANCHORS.items() if any(re.search(anchor, s) for s in sentences)}
        assert named <= set(labels), (report, labels)
        if len(labels) > 1:
            complete.append(named == set(labels))
            assert complete[-1] or (len(named) == len(sentences) == 1), (report, labels)
        normal = any(s.startswith(("normal ecg", "within normal", "normal tracing")) for s in sentences)
        assert not (normal and set(labels) - {"SR", "SBRAD", "STACH"}), report
    assert 0.70 < np.mean(complete) < 0.80
    assert len(set(batch.reports)) > 0.7 * len(batch.reports)
    assert max(len(report.split()) for report in batch.reports) < 60


def test_prompts_are_held_out_but_in_the_vocabulary(batch):
    def normalise(text: str) -> str:
        return " ".join(re.sub(r"[^a-z0-9 ]", " ", text.lower()).split())

    reports = [*batch.reports, *generate(1000, seed=0).reports]
    statements = {normalise(s) for report in reports for s in report.split(". ")} | {normalise(r) for r in reports}
    everything = " | ".join(statements)
    vocabulary = {word for statement in statements for word in statement.split()}
    assert set(PROMPTS) == set(LABELS) == set(zero_shot_prompts())
    for label, prompts in PROMPTS.items():
        assert len(set(prompts)) >= 3 and zero_shot_prompts()[label] in prompts
        for prompt in map(normalise, prompts):
            assert prompt not in everything, prompt
            assert set(prompt.split()) <= vocabulary, set(prompt.split()) - vocabulary


def test_throughput_is_of_the_order_of_a_thousand_per_second(record_property):
    generate(64)
    began = time.process_time()
    generate(256)
    rate = 256 / (time.process_time() - began)
    record_property("records_per_cpu_second", rate)
    print(f"synthetic: {rate:,.0f} records/s of one core")
    assert rate > 300  # quiet machine: thousands; the bound only catches a lost vectorisation
