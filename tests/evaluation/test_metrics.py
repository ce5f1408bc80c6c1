"""Macro AUC, its intervals and retrieval, against independent computations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dbeta.evaluation.metrics import bootstrap_interval, macro_auc, retrieval
from dbeta.evaluation.zero_shot import auc_table


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.sampled_from([2, 5, 1000]))
def test_auc_equals_sklearn_with_ties(seed, records, levels):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (records, 3)).astype(float)
    targets = generator.random((records, 3)) < 0.4
    targets[0], targets[1] = True, False
    table = macro_auc(scores, targets, "abc", bootstrap=0)
    expected = [roc_auc_score(targets[:, c], scores[:, c]) for c in range(3)]
    assert list(table.per_class.values()) == pytest.approx(expected, abs=1e-12)
    assert table.macro == pytest.approx(np.mean(expected), abs=1e-12)


def test_classes_that_cannot_be_measured_are_named_and_left_out():
    targets = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]], bool)
    table = macro_auc(np.arange(12.0).reshape(4, 3), targets, ["some", "none", "all"])
    assert table.left_out == {"none": "no positives", "all": "no negatives"}
    assert set(table.per_class) == {"some"} and table.macro == table.per_class["some"]
    assert table.positives == {"some": 2, "none": 0, "all": 4}
    assert "none (no positives)" in str(table)
    assert np.isnan(macro_auc(np.zeros((4, 1)), np.zeros((4, 1)), ["none"]).macro)


def test_bootstrap_interval_agrees_with_resampling_by_hand():
    generator = np.random.default_rng(1)
    targets = generator.random((400, 1)) < 0.3
    scores = generator.normal(size=(400, 1)) + targets
    low, high = macro_auc(scores, targets, ["x"], bootstrap=2000).interval
    by_hand = []
    for _ in range(500):
        rows = generator.integers(0, 400, 400)
        by_hand.append(roc_auc_score(targets[rows, 0], scores[rows, 0]))
    assert (low, high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])), abs=0.012)


def test_records_of_one_patient_are_resampled_together():
    generator = np.random.default_rng(2)
    targets = generator.random((100, 1)) < 0.5
    scores = generator.normal(size=(100, 1)) + targets
    repeated = macro_auc(np.repeat(scores, 4, 0), np.repeat(targets, 4, 0), ["x"], groups=np.repeat(np.arange(100), 4))
    single, naive = (
        macro_auc(s, t, ["x"]) for s, t in ((scores, targets), (np.repeat(scores, 4, 0), targets.repeat(4, 0)))
    )
    width = {k: t.interval[1] - t.interval[0] for k, t in (("four", repeated), ("one", single), ("naive", naive))}
    assert width["four"] == pytest.approx(width["one"], rel=0.15) and width["naive"] < 0.6 * width["four"]


def test_random_scores_stay_within_the_interval_of_one_half():
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(40):
        table = macro_auc(generator.normal(size=(200, 5)), generator.random((200, 5)) < 0.3, "abcde", bootstrap=300)
        inside += table.interval[0] <= 0.5 <= table.interval[1]
    assert inside >= 34  # 38 expected


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        macro_auc(np.array([[np.nan], [1.0]]), np.array([[0], [1]]), ["x"])
    with pytest.raises(ValueError, match="must agree"):
        macro_auc(np.zeros((4, 2)), np.zeros((4, 2)), ["x"])


def test_interval_of_a_mean():
    low, high = bootstrap_interval(np.repeat([0.0, 1.0], 500))
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(1000), rel=0.15)


def test_zero_shot_table_scores_by_dot_product():
    features, prompts = torch.eye(4), torch.eye(4)[:2]
    targets = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], bool)
    assert auc_table(features, prompts, targets, ["a", "b"]).macro == 1.0


def test_retrieval_counts_identical_reports_as_correct_and_ties_as_failures():
    features = torch.eye(4)
    assert retrieval(features, features, [0, 1, 2, 3], ks=(1,)) == {"recall_at_1": 1.0}
    # Records 0 and 1 carry the same report: its one candidate serves both, whichever record it was taken from.
    same = torch.stack((features[0], features[0], features[2], features[3]))
    assert retrieval(same, same, [7, 7, 8, 9], ks=(1,)) == {"recall_at_1": 1.0}
    assert retrieval(torch.ones(4, 2), torch.ones(4, 2), [0, 1, 2, 3], ks=(1, 4)) == {
        "recall_at_1": 0.0,
        "recall_at_4": 1.0,
    }
    shifted = retrieval(features, features.roll(1, 0) * 2 + features, [0, 1, 2, 3], ks=(1, 2))
    assert shifted == {"recall_at_1": 0.0, "recall_at_2": 1.0}
