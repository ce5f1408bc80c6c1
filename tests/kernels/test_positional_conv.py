"""The form of the positional convolution for the CPU: the dense convolution exactly, at the positions that are kept."""

import pytest
import torch

from dbeta_kernels.checking import evaluate
from dbeta_kernels.positional_conv import positional_conv, reference
from dbeta_kernels.registry import specs

SPEC = specs()["positional_conv"]


@pytest.mark.parametrize("case", SPEC.cases)
def test_equals_the_dense_convolution_in_float64(case):
    inputs = SPEC.make(torch.float64, "cpu", 0, **SPEC.cases[case])
    actual, expected = (evaluate(f, inputs, SPEC.differentiable) for f in (positional_conv, reference))
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_are_taken_in_blocks(monkeypatch):
    inputs = SPEC.make(torch.float64, "cpu", 0, **SPEC.cases["ragged"])
    whole = evaluate(positional_conv, inputs, SPEC.differentiable)
    monkeypatch.setattr("dbeta_kernels.positional_conv.CPU_ROWS", 50)  # 129 rows: 50, 50, 29
    blocks = evaluate(positional_conv, inputs, SPEC.differentiable)
    for name in whole:
        torch.testing.assert_close(blocks[name], whole[name])


def test_a_token_outside_every_window_gets_no_gradient():
    x = torch.randn(1, 40, 8, requires_grad=True)
    keep = torch.tensor([[3]])
    positional_conv(x, torch.randn(8, 4, 6), torch.zeros(8), keep, groups=2).sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]  # 3 - 3 .. 3 + 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_takes_its_dtype(backend):
    inputs = SPEC.make(torch.float32, "cpu", 0, **SPEC.cases["ragged"])
    leaves = [inputs[name].requires_grad_() for name in SPEC.differentiable]
    with torch.autocast("cpu", torch.bfloat16):
        out = positional_conv(**inputs, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(**inputs), rtol=0.02, atol=0.05)
    out.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 3}, "do not fit"),
        ({"bias": torch.zeros(7)}, "do not fit"),
        ({"weight": torch.zeros(8, 2, 4)}, "do not fit"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "one dtype"),
        ({"keep": torch.zeros(3, 2, dtype=torch.int64)}, "keep"),
    ],
)
def test_mistakes(change, message):
    arguments = {"x": torch.zeros(2, 5, 8), "weight": torch.zeros(8, 4, 4), "bias": torch.zeros(8), "groups": 2}
    with pytest.raises(ValueError, match=message):
        positional_conv(**arguments | change)
