"""The challenge score against an independent computation, pair by pair in exact fractions."""

import csv
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbeta.evaluation.cinc import SINUS_RHYTHM, ChallengeWeights, challenge_score
from dbeta.evaluation.label_sets import label_set


def by_hand(path, truth: list[set[str]], predicted: list[set[str]]) -> Fraction:
    """The definition, record by record and pair by pair, straight from the file and from raw code lists."""
    with path.open() as file:
        table = list(csv.DictReader(file))
    first = next(iter(table[0]))
    reward = {(row[first], column): Fraction(row[column]) for row in table for column in row if column != first}
    classes = [row[first] for row in table]

    def merged(codes):
        return {cell for cell in classes if codes & set(cell.split("|"))}

    def total(guesses):
        score = Fraction(0)
        for codes, guess in zip(truth, guesses):
            true, said = merged(codes), merged(guess)
            size = max(len(true | said), 1)
            score += sum((reward[j, k] / size for j in true for k in said), Fraction(0))
        return score

    inactive, correct = total([{SINUS_RHYTHM}] * len(truth)), total(truth)
    return (total(predicted) - inactive) / (correct - inactive) if correct != inactive else Fraction(0)


@pytest.fixture(scope="module")
def table(shared):
    path = shared / "data/cinc2021-scoring/weights.csv"
    labels = label_set("cinc2021")
    weights = ChallengeWeights.read(path.parent).ordered_as(labels)
    scored = {code for held in labels.codes.values() for code in held}
    codes = [*sorted(scored), "164951009", "429622005"]  # the last two are not scored
    return path, labels, weights, codes


def score(table, truth, predicted):
    _, labels, weights, _ = table
    rows = [np.array([labels.targets_of(held) for held in part]) for part in (truth, predicted)]
    return challenge_score(*rows, weights, labels.labels.index("NSR"))[0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_score_equals_the_computation_by_hand(table, data):
    sets = st.sets(st.sampled_from(table[3]), max_size=5)
    pairs = data.draw(st.lists(st.tuples(sets, sets), min_size=1, max_size=12))
    truth, predicted = map(list, zip(*pairs))
    assert score(table, truth, predicted) == pytest.approx(float(by_hand(table[0], truth, predicted)), abs=1e-9)


def test_special_cases(table):
    af, rbbb, sinus, unscored = {"164889003"}, {"59118001"}, {SINUS_RHYTHM}, {"164951009"}
    truth = [af, rbbb, sinus, unscored, af | rbbb]
    assert score(table, truth, truth) == 1.0
    assert score(table, truth, [sinus] * 5) == 0.0
    assert (
        score(table, truth, [{"713427006" if code == "59118001" else code for code in held} for held in truth]) == 1.0
    )
    assert score(table, [*truth, unscored], [*truth, af]) == 1.0  # an unscored record rewards and costs nothing
    assert score(table, [unscored] * 3, [af, sinus, set()]) == 0.0  # nothing to normalise by
    assert score(table, truth, [set()] * 5) < 0


def test_interval_surrounds_the_score(table):
    _, labels, weights, _ = table
    generator = np.random.default_rng(0)
    truth = generator.random((300, 26)) < 0.08
    predicted = truth ^ (generator.random((300, 26)) < 0.03)
    found, (low, high) = challenge_score(truth, predicted, weights, labels.labels.index("NSR"), bootstrap=500)
    assert low < found < high and high - low < 0.2


def test_a_wrong_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--scoring DIR must hold"):
        ChallengeWeights.read(tmp_path)
    (tmp_path / "weights.csv").write_text(",1,2\n1,1,0\n")
    with pytest.raises(ValueError, match="not a square table"):
        ChallengeWeights.read(tmp_path)
    (tmp_path / "weights.csv").write_text(f",1|5,{SINUS_RHYTHM}\n1|5,1,0\n{SINUS_RHYTHM},0,1\n")
    with pytest.raises(ValueError, match="classes of cinc2021 are not those"):
        ChallengeWeights.read(tmp_path).ordered_as(label_set("cinc2021"))
