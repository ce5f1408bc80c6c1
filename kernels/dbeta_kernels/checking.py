"""The error-budget rule: what it means that a kernel is right (KERNELS section 3).

With t the truth in float64, e_ref = |reference in the same dtype - t| and e = |kernel - t|, elementwise
``e <= e_ref + tol * max(|t|, rms(t))`` for every output and every gradient. The magnitude is each element's own, or the
tensor's root mean square where an element is smaller (rounding of a sum is relative to its terms), or the dtype's
smallest normal number.
"""

import contextlib
import functools
import inspect
import linecache
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from dbeta_kernels.registry import Inputs, KernelSpec, Mutant


def to_float64(inputs: Inputs) -> Inputs:
    """The same values in float64; an argument that is a dtype becomes float64 too, integers stay."""

    def cast(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return torch.float64 if isinstance(value, torch.dtype) else value

    return {name: cast(value) for name, value in inputs.items()}


def evaluate(function: Callable, inputs: Inputs, differentiable: tuple[str, ...] = (), seed: int = 1) -> Inputs:
    """Outputs ``out0, out1, ...`` and gradients ``grad NAME`` of ``function(**inputs)``, detached.

    The cotangents are random (a scalar's too, so that a lost factor shows) and the same values for every dtype.
    """
    leaves: dict[str, torch.Tensor] = {}

    def leaf(name, value):
        if isinstance(value, tuple):
            return tuple(leaf(f"{name}[{i}]", v) for i, v in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return value  # an optional tensor given as a number or None
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    outputs = function(**{k: leaf(k, v) if k in differentiable else v for k, v in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    traced = [o for o in outputs if o.requires_grad]
    if leaves and not traced:
        raise AssertionError(f"no output depends on {', '.join(leaves)}")
    if leaves:
        generator = torch.Generator().manual_seed(seed)
        # representable in bfloat16, so that the float64 truth is not judged by other cotangents than the kernel
        drawn = [torch.randn(o.shape, generator=generator).to(torch.bfloat16) for o in traced]
        cotangents = [d.to(o) for d, o in zip(drawn, traced)]
        grads = torch.autograd.grad(traced, list(leaves.values()), cotangents, allow_unused=True)
        results |= {f"grad {k}": torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), grads)}
    return results


def check(spec: KernelSpec, inputs: Inputs, dtype: torch.dtype, *, backend: str = "fused", **options) -> None:
    """Hold ``spec.function`` to the budget on ``inputs`` of dtype ``dtype``; options and errors of ``judge``."""
    judge(spec, inputs, dtype, **options)(functools.partial(spec.function, backend=backend))


def judge(
    spec: KernelSpec, inputs: Inputs, dtype: torch.dtype, *, paper: bool = False, slack: float = 0.0
) -> Callable[[Callable], None]:
    """A function that holds any implementation, called as ``implementation(**inputs)``, to the budget of ``spec``.

    Args:
        paper: the truth is ``spec.truth``, where there is one.
        slack: added to an output's budget, in units of its movement (root mean square) when the inputs move by a
            rounding of ``dtype``. Among hundreds of drawn inputs are some whose terms cancel, and there the reference
            is right by luck.

    Raises:
        AssertionError: (the returned function) naming the output, the element and by how much the budget is exceeded.
    """
    reference = evaluate(spec.reference, inputs, spec.differentiable)
    truth = evaluate((paper and spec.truth) or spec.reference, to_float64(inputs), spec.differentiable)
    moves = 3 if slack else 0
    nearby = [evaluate(spec.reference, _nearby(inputs, dtype, seed), spec.differentiable) for seed in range(moves)]

    def hold(implementation: Callable) -> None:
        actual = evaluate(implementation, inputs, spec.differentiable)
        for name in truth:
            moved = [(near[name] - truth[name]).nan_to_num(posinf=0).square().mean() for near in nearby]
            extra = slack * float(torch.stack(moved).mean().sqrt()) if moved and truth[name].numel() else 0.0
            assert_budget(name, actual[name], reference[name], truth[name], spec.tolerance[dtype], extra)

    return hold


def _nearby(inputs: Inputs, dtype: torch.dtype, seed: int) -> Inputs:
    """``inputs`` in float64, each value moved by about half a unit in the last place of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        return value * (1 + torch.finfo(dtype).eps / 2 * noise)

    return {name: move(value) for name, value in to_float64(inputs).items()}


def assert_budget(name: str, actual, reference, truth, tolerance: float, extra: float = 0.0) -> None:
    """``|actual - truth| <= |reference - truth| + tolerance * max(|truth|, rms) + extra`` elementwise; NaN = NaN."""
    if actual.shape != reference.shape or actual.dtype != reference.dtype:
        got, want = ((tuple(x.shape), x.dtype) for x in (actual, reference))
        raise AssertionError(f"{name}: {got}, the reference gives {want}")
    if not truth.numel():
        return
    smallest = torch.finfo(actual.dtype).smallest_normal if actual.is_floating_point() else 0.0
    actual, reference, truth = actual.double(), reference.double(), truth.double()
    same = (actual == truth) | (actual.isnan() & truth.isnan())  # also equal infinities
    magnitude = torch.maximum(truth.abs(), truth.square().mean().sqrt()).clamp(min=smallest)
    budget = (reference - truth).abs() + tolerance * magnitude + extra
    error = (actual - truth).abs()
    wrong = ~same & ~(error <= budget)  # a NaN on either side is wrong
    if wrong.any():
        worst = int((error / budget).masked_fill(~wrong, -1).nan_to_num(nan=torch.inf).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"{name}{list(index)}: {actual.flatten()[worst]:.9g}, truth {truth.flatten()[worst]:.9g}, "
            f"error {error.flatten()[worst]:.3g} > budget {budget.flatten()[worst]:.3g}; "
            f"{int(wrong.sum())} of {wrong.numel()} elements wrong"
        )


def assert_deterministic(spec: KernelSpec, inputs: Inputs, *, backend: str = "fused") -> None:
    """Two runs give the same bits, outputs and gradients."""
    first, second = (
        evaluate(lambda **given: spec.function(**given, backend=backend), inputs, spec.differentiable) for _ in range(2)
    )
    for name in first:
        if not torch.equal(first[name].nan_to_num(nan=12345.0), second[name].nan_to_num(nan=12345.0)):
            raise AssertionError(f"{name}: two runs differ")


def strided(inputs: Inputs) -> Inputs:
    """The same values in memory that is contiguous in no dimension; what lies between them is NaN or garbage."""

    def spread(value):
        if isinstance(value, tuple):
            return tuple(map(spread, value))
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        wide = torch.full(
            [2 * n + 1 for n in value.shape], _poison(value.dtype), dtype=value.dtype, device=value.device
        )
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in value.shape)]
        view.copy_(value)
        return view

    return {name: spread(value) for name, value in inputs.items()}


def _poison(dtype: torch.dtype):
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Uninitialised tensors hold NaN (integers their maximum): an element that no kernel writes shows."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(_poison(tensor.dtype)) if tensor.device.type != "meta" else tensor

        return allocated

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """In the interpreter, a load or store outside the tensors that a kernel was given fails, whatever becomes of it.

    Without a mask a kernel reads its neighbour's memory; what it read there is often masked later or multiplied by 0,
    and on a GPU it still ends in an illegal access one day. A masked load without ``other`` gives NaN.

    Raises:
        AssertionError: all pointers of one access have to lie in one tensor, and these do not.
    """
    given: list[tuple[int, int]] = []
    run = GridExecutor.__call__
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def running(self, *args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.numel()]
        given[:] = [(t.data_ptr(), t.data_ptr() + _extent(t) * t.itemsize) for t in tensors]
        return run(self, *args, **kwargs)

    def accessed(ptrs, mask, what):
        read = ptrs.data[mask.data.astype(bool)]
        if read.size:
            first, last = int(read.min()), int(read.max())
            if not any(start <= first and last < end for start, end in given):
                raise AssertionError(f"outside of every tensor given: a {what}")

    def loading(ptrs, mask, other, *options, **named):
        accessed(ptrs, mask, "load")
        result = load(ptrs, mask, other, *options, **named)
        if other is None and result.data.dtype.kind == "f":
            result.data[~mask.data.astype(bool)] = float("nan")
        return result

    def storing(ptrs, value, mask, *options, **named):
        accessed(ptrs, mask, "store")
        return store(ptrs, value, mask, *options, **named)

    with (
        mock.patch.object(GridExecutor, "__call__", running),
        mock.patch.object(interpreter_builder, "create_masked_load", loading),
        mock.patch.object(interpreter_builder, "create_masked_store", storing),
    ):
        try:
            yield
        except InterpreterError as error:  # one for each function that called another
            cause = error
            while isinstance(cause, InterpreterError) and cause.__cause__:
                cause = cause.__cause__
            raise cause from None


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))


@contextlib.contextmanager
def mutated(spec: KernelSpec, mutant: Mutant) -> Iterator[None]:
    """Within the context the operator's module holds ``mutant.function`` with its source changed."""
    module, name = spec.locate(mutant.function)
    original = getattr(module, name)
    source = inspect.getsource(getattr(original, "fn", original))
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{spec.name}: a mutant's text must occur once in {mutant.function}, and {mutant.old!r} occurs "
            f"{source.count(mutant.old)} times; change the mutant with the kernel"
        )
    filename = f"<mutant {spec.name}.{mutant.function}>"
    changed = source.replace(mutant.old, mutant.new)
    # Triton reads a kernel's source back through inspect, which asks linecache for files that are not on disk.
    linecache.cache[filename] = (len(changed), None, changed.splitlines(keepends=True), filename)
    try:
        exec(compile(changed, filename, "exec"), module.__dict__)  # our own source, edited
        yield
    finally:
        setattr(module, name, original)
        linecache.cache.pop(filename, None)
