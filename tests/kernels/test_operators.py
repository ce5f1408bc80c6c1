"""The operators as PyTorch sees them: opcheck, compilation without graph breaks, gradients of the references."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbeta_kernels.checking import assert_budget, evaluate, to_float64
from dbeta_kernels.launch import BACKENDS
from dbeta_kernels.registry import specs

SPECS = specs()
EACH = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def first_case(spec, dtype, device):
    return spec.make(dtype, device, 5, **next(iter(spec.cases.values())))


def tensors_of(value):
    """The tensors of an input that is one, several or none."""
    return [t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Remembers the calls of this project's own operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dbeta":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **kwargs or {})


@EACH
def test_opcheck(spec, device):
    inputs = first_case(spec, torch.float32, device)
    with Recorder() as recorder:
        evaluate(lambda **given: spec.function(**given, backend="fused"), inputs, spec.differentiable)
    assert recorder.calls, f"{spec.name} called no operator of its own"
    differentiated = {t.data_ptr() for n in spec.differentiable for t in tensors_of(inputs.get(n))}
    for function, args, kwargs in recorder.calls:
        leaves = tuple(
            a.detach().clone().requires_grad_("backward" not in str(function) and a.data_ptr() in differentiated)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        )
        torch.library.opcheck(function, leaves, kwargs)


@EACH
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(spec, device, backend):
    inputs = first_case(spec, torch.float32, device)

    def run(**given):
        return spec.function(**given, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = (evaluate(f, inputs, spec.differentiable) for f in (compiled, run))
    for name in expected:
        assert_budget(name, actual[name], expected[name], expected[name].double(), 1e-6)


@pytest.mark.parametrize(
    ("spec", "case"),
    [pytest.param(s, c, id=f"{n}-{c}") for n, s in SPECS.items() if s.differentiable for c in s.cases],
)
def test_gradients_of_the_reference(spec, case):
    inputs = to_float64(spec.make(torch.float32, "cpu", 6, **spec.cases[case]))
    tensors = {name: inputs[name] for name in spec.differentiable if tensors_of(inputs.get(name))}
    flat = [t for value in tensors.values() for t in tensors_of(value)]
    if not flat or not all(t.numel() for t in flat):
        pytest.skip("no element to differentiate by")

    def run(*given):
        given = iter(given)
        placed = {
            name: tuple(next(given) for _ in value) if isinstance(value, tuple) else next(given)
            for name, value in tensors.items()
        }
        return spec.reference(**inputs | placed)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in flat], fast_mode=True)


@EACH
def test_backends_are_named(spec):
    inputs = first_case(spec, torch.float32, "cpu")
    with pytest.raises(ValueError, match="'triton': accepted are auto, fused, reference"):
        spec.function(**inputs, backend="triton")


@EACH
def test_fused_refuses_where_the_kernel_cannot_run(spec):
    inputs = first_case(spec, torch.float32, "cpu")
    with mock.patch("dbeta_kernels.launch.INTERPRETED", False), pytest.raises(ValueError, match="need a CUDA tensor"):
        spec.function(**inputs, backend="fused")


@EACH
def test_auto_on_a_cpu_needs_no_kernel(spec):
    inputs = first_case(spec, torch.float32, "cpu")
    with mock.patch("dbeta_kernels.launch.INTERPRETED", False):
        actual = evaluate(spec.function, inputs, spec.differentiable)
    expected = evaluate(spec.reference, inputs, spec.differentiable)
    truth = evaluate(spec.reference, to_float64(inputs), spec.differentiable)
    for name in expected:
        assert_budget(name, actual[name], expected[name], truth[name], 1e-5)
