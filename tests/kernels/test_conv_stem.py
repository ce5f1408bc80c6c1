"""The stem as matrix products, and what only it promises: exact statistics, less rounding than the reference."""

import pytest
import torch

from dbeta_kernels.checking import evaluate, to_float64
from dbeta_kernels.conv_stem import conv_stem, products, reference
from dbeta_kernels.registry import specs

SPEC = specs()["conv_stem"]


@pytest.mark.parametrize("case", SPEC.cases)
def test_products_equal_the_convolutions_in_float64(case):
    inputs = SPEC.make(torch.float64, "cpu", 0, **SPEC.cases[case])
    inputs = to_float64(inputs)  # the norm's parameters too
    differentiable = ("ecg", *SPEC.differentiable)
    actual, expected = (evaluate(f, inputs, differentiable) for f in (products, reference))
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["tiny model", "ragged", "large offset"])
def test_rounds_less_than_the_reference(case, interpreter):
    """The tolerance of single elements is wide for the stem; their root mean square is not."""
    inputs = SPEC.make(torch.float16, "cpu", 0, **SPEC.cases[case])
    fused, plain, truth = (
        evaluate(f, i, SPEC.differentiable)
        for f, i in ((conv_stem, inputs), (reference, inputs), (reference, to_float64(inputs)))
    )
    for name in truth:
        error, allowed = ((result[name].double() - truth[name]).square().mean() for result in (fused, plain))
        assert error <= 1.1 * allowed, name


@pytest.mark.parametrize("form", [conv_stem, products])
def test_statistics_survive_an_offset(form):
    """5 mV of offset in float32: uncentred moments would lose 7e-5 of the normalised convolution."""
    inputs = SPEC.make(torch.float32, "cpu", 0, records=1, samples=512, width=16, layers=1, offset=5.0)
    torch.testing.assert_close(form(**inputs).double(), reference(**to_float64(inputs)), rtol=0, atol=2e-5)


def test_a_gradient_of_the_ecg_takes_products():
    inputs = SPEC.make(torch.float32, "cpu", 0, **SPEC.cases["tiny model"])
    ecg = inputs.pop("ecg").requires_grad_()
    (actual,), (expected,) = (torch.autograd.grad(f(ecg, **inputs).sum(), ecg) for f in (conv_stem, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no gradient of the ECG"):
        conv_stem(ecg, **inputs, backend="fused")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_takes_its_dtype(backend):
    inputs = SPEC.make(torch.float32, "cpu", 0, **SPEC.cases["tiny model"])
    with torch.autocast("cpu", torch.bfloat16):
        out = conv_stem(**inputs, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(**inputs), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ()}, "do not fit"),
        ({"weights": (torch.zeros(8, 12, 2), torch.zeros(8, 7, 2))}, "do not fit"),
        ({"norm_bias": torch.zeros(7)}, "do not fit"),
        ({"ecg": torch.zeros(1, 12, 3)}, "3 samples are too few"),
    ],
)
def test_mistakes(change, message):
    arguments = {
        "ecg": torch.zeros(1, 12, 40), "weights": (torch.zeros(8, 12, 2), torch.zeros(8, 8, 2)),
        "norm_weight": torch.ones(8), "norm_bias": torch.zeros(8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        conv_stem(**arguments | change)
