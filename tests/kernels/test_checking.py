"""The rule that judges kernels can itself fail."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from dbeta_kernels.checking import assert_budget, check, guarded, poisoned_empty, strided
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


@triton.jit
def _copy(x, out, n, read, written, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < read)
    tl.store(out + i, tl.where(i < n, value, 0.0), mask=i < written)


def test_memory_of_others_is_not_touched(interpreter):
    """A read one beyond the end changes nothing of the result, and the memory there is another tensor's."""
    memory = torch.arange(40.0)
    x, out = memory[:7], memory[20:27]

    def copy(read, written):
        with guarded():
            _copy[(1,)](x, out, 7, read, written, BLOCK=16)

    copy(7, 7)
    assert torch.equal(x, out)
    with pytest.raises(AssertionError, match="a load"):
        copy(8, 7)
    with pytest.raises(AssertionError, match="a store"):
        copy(7, 8)
    copy(6, 7)  # masked, and no value given for it
    assert out[6].isnan()
    assert memory[27] == 27


def test_strided_keeps_values_and_no_dimension_is_contiguous():
    inputs = strided({"x": torch.arange(6.0).view(2, 3), "n": 3, "pair": (torch.ones(2), torch.tensor(1.0))})
    assert torch.equal(inputs["x"], torch.arange(6.0).view(2, 3))
    assert all(step > 1 for step in inputs["x"].stride())
    assert inputs["pair"][0].stride() == (2,)
    assert inputs["n"] == 3
