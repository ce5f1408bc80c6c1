"""The rule that judges kernels can itself fail."""

import dataclasses

import pytest
import torch

from dbeta_kernels.checking import assert_budget, check, poisoned_empty, strided
from dbeta_kernels.registry import specs

TRUTH = torch.tensor([1.0, -2.0, 0.0, 4.0], dtype=torch.float64)


def judge(actual, reference=TRUTH, truth=TRUTH, tolerance=1e-3):
    assert_budget("out0", actual.float(), reference.float(), truth, tolerance)


def test_rounding_passes_and_more_fails():
    judge(TRUTH * (1 + 0.9e-3))
    with pytest.raises(AssertionError, match=r"out0\[3\].* 3 of 4"):
        judge(TRUTH * (1 + 3e-3))


def test_each_element_is_judged():
    """A small element may be as far off as the tensor's root mean square allows, no further."""
    wrong = TRUTH.clone()
    wrong[2] = 2e-3
    judge(wrong)
    wrong[2] = 3e-3
    with pytest.raises(AssertionError, match=r"out0\[2\].* 1 of 4"):
        judge(wrong)


def test_the_references_own_error_is_allowed():
    judge(TRUTH + 0.1, reference=TRUTH + 0.1)
    judge(TRUTH - 0.1, reference=TRUTH + 0.1)
    with pytest.raises(AssertionError, match="4 of 4"):
        judge(TRUTH + 0.1)


def test_slack_follows_the_condition():
    """Where large terms cancel, rounding the inputs moves the output; where none do, slack allows next to nothing."""
    spec = specs()["ets_loss"]
    inputs = spec.make(torch.float16, "cpu", 52, rows=55, columns=2, width=2)
    exact = spec.function

    def off_by(error):
        return dataclasses.replace(spec, function=lambda ecg, **given: exact(ecg, **given) + error * ecg.float().sum())

    with pytest.raises(AssertionError, match="grad ecg"):
        check(off_by(5e-6), inputs, torch.float16, backend="reference")
    check(off_by(5e-6), inputs, torch.float16, backend="reference", slack=3.0)
    with pytest.raises(AssertionError, match="grad ecg"):
        check(off_by(1e-4), inputs, torch.float16, backend="reference", slack=3.0)


def test_nan_has_to_match():
    nan = TRUTH.clone()
    nan[1] = torch.nan
    judge(nan, reference=nan, truth=nan)
    for actual, truth in ((nan, TRUTH), (TRUTH, nan)):
        with pytest.raises(AssertionError, match="1 of 4"):
            judge(actual, truth=truth, reference=truth)


def test_shape_and_dtype_have_to_match():
    with pytest.raises(AssertionError, match="the reference gives"):
        assert_budget("out0", torch.ones(2), torch.ones(1, 2), torch.ones(1, 2), 1.0)
    with pytest.raises(AssertionError, match="the reference gives"):
        assert_budget("out0", torch.ones(2).half(), torch.ones(2), torch.ones(2), 1.0)


def test_poison_shows_unwritten_elements():
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty.__name__ == "empty"


def test_strided_keeps_values_and_no_dimension_is_contiguous():
    inputs = strided({"x": torch.arange(6.0).view(2, 3), "n": 3, "pair": (torch.ones(2), torch.tensor(1.0))})
    assert torch.equal(inputs["x"], torch.arange(6.0).view(2, 3))
    assert all(step > 1 for step in inputs["x"].stride())
    assert inputs["pair"][0].stride() == (2,)
    assert inputs["n"] == 3
