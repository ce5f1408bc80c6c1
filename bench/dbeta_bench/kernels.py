"""Every operator of the registry, forward and backward: kernel, eager, compiled and peers, against the roofline."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dbeta_bench import roofline, timing
from dbeta_kernels.checking import judge
from dbeta_kernels.launch import INTERPRETED
from dbeta_kernels.registry import KernelSpec, specs


def run(
    *,
    device: str = "cpu",
    operators: tuple[str, ...] = (),
    repeats: int = 20,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row per operator, case and provider; no time for an operator that fails its error budget, nor for a peer.

    On a GPU the paper's sizes in bf16. On a CPU small sizes in float32 and no kernel: the interpreter is not timed,
    and ``auto``, the operator's form for the CPU, takes its place.

    Args:
        operators: names of the registry; none means all.

    Raises:
        ValueError: an operator that is not in the registry.
        AssertionError: an operator outside its error budget.
    """
    where, known = torch.device(device), specs()
    unknown = set(operators) - set(known)
    if unknown:
        raise ValueError(f"no operator {', '.join(sorted(unknown))}; accepted are {', '.join(known)}")
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    ceiling = roofline.measure(where)
    say(
        f"roofline: {ceiling.bytes_per_s / 1e9:.1f} GB/s copied, {ceiling.flops_per_s[dtype] / 1e9:.1f} GFLOP/s {dtype}"
    )
    rows = []
    for name in operators or known:
        spec = known[name]
        cases = spec.paper if where.type == "cuda" else spec.cpu
        for case, options in cases.items():
            rows += _case(spec, case, options, dtype, where, ceiling, repeats, say)
    return rows


def _case(spec: KernelSpec, case, options, dtype, where, ceiling, repeats, say) -> list[dict[str, Any]]:
    def make(seed):
        return spec.make(dtype, where, seed, **options)

    inputs = make(0)
    backend = "fused" if where.type == "cuda" and not INTERPRETED else "reference" if INTERPRETED else "auto"
    hold = judge(spec, inputs, dtype, paper=True, slack=spec.slack)
    hold(partial(spec.function, backend=backend))
    least = ceiling.seconds(spec.flops(inputs), spec.bytes(inputs), dtype)
    providers = {
        "kernel" if backend == "fused" else "auto": partial(spec.function, backend=backend),
        spec.eager if where.type == "cuda" else "eager": spec.reference,
        "compiled": torch.compile(spec.reference),
        **spec.peers,
    }
    if INTERPRETED:
        say(f"{spec.name}: the interpreter is not timed")
        del providers["auto"]
    calls, rows = {}, []
    torch.compiler.reset()
    for name, function in providers.items():
        try:
            if name == "compiled" or name in spec.peers:
                hold(function)
            calls[name] = _step(spec, function, timing.rotation(make, where))
            calls[name]()
        except AssertionError as error:
            say(f"{spec.name} {case}: {name} is not timed, it is wrong: {error}")
        except torch.cuda.OutOfMemoryError:
            say(f"{spec.name} {case}: {name} does not fit in memory")
            calls.pop(name, None)
            torch.cuda.empty_cache()
    memory = {name: _peak_mb(call, where) for name, call in calls.items()}
    for name, taken in timing.interleave(calls, device=where, repeats=repeats).items():
        identity = {"operator": spec.name, "case": case, "provider": name, "dtype": str(dtype).removeprefix("torch.")}
        rows.append(
            identity
            | taken
            | {"ms": taken["median"] * 1e3, "roofline": least / taken["median"], "peak_mb": memory[name]}
        )
        say(
            f"{spec.name:16} {case:12} {name:15} {taken['median'] * 1e3:10.4f} ms  "
            f"{least / taken['median']:6.1%} of roofline"
        )
    return rows


def _step(spec: KernelSpec, function, source) -> Callable[[], Any]:
    """Forward and, where there is one, backward, on the next inputs of ``source``."""

    def leaves(value):
        if isinstance(value, tuple):
            return [leaf for part in value for leaf in leaves(part)]
        return [value] if isinstance(value, torch.Tensor) else []

    def call():
        inputs = source()
        wanted = [leaf for name in spec.differentiable for leaf in leaves(inputs.get(name))]
        for leaf in wanted:
            leaf.requires_grad_()
        outputs = function(**inputs)
        traced = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        if traced:
            return torch.autograd.grad(traced, wanted, [torch.ones_like(o) for o in traced], allow_unused=True)
        return outputs

    return call


def _peak_mb(call: Callable[[], Any], where: torch.device) -> float | None:
    """Memory of one call beyond what is held already, in MB; None on a CPU, where torch does not count it."""
    if where.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
