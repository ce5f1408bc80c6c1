"""The registry of operators: what an operator declares once, so that tests and benchmarks can iterate over it.

An operator is one file (reference, device code, operators, public function) that ends in ``register(KernelSpec(...))``.
Nothing is tested or timed by name: ``specs()`` imports every operator and hands out what they registered.
"""

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]  # keyword arguments of an operator

OPERATORS = ("ets_loss", "lead_mask", "mem_loss", "positional_conv", "conv_stem")

# KERNELS section 3: how far a kernel may be beyond what the reference itself loses in the same dtype.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Mutant:
    """A deliberately wrong kernel: ``function``'s source with ``old`` (once in it) replaced by ``new``.

    The budget test of case ``case`` must fail with it, or that test proves nothing about the line.
    """

    function: str  # a kernel, device helper or host function of the operator's module, or "module.name"
    old: str
    new: str
    case: str


@dataclass(frozen=True, kw_only=True)
class AotConfig:
    """One tuned configuration, compiled ahead of time for sm_90 and held to its budget.

    ``signature`` gives each run-time argument its Triton type ("*bf16", "i32", "fp32"); ``constants`` the constexprs.
    Pointers and the arguments named in ``divisible`` are taken as multiples of 16, as the launcher will find them.
    """

    kernel: str  # as a mutant's function
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    slow: bool = False  # not a configuration of the paper's sizes: compiled in the slow tests only
    wgmma: bool = False  # matrix work that must use Hopper's warpgroup instructions
    spill_reason: str = ""  # why a spill is accepted; empty: none is


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """All that tests and benchmarks need to know of an operator.

    Attributes:
        function: the public function; called as ``function(**inputs, backend="fused")``.
        reference: the same in plain eager PyTorch, without ``backend``; float64 in gives float64 out.
        make: ``make(dtype, device, seed, **options) -> inputs``; cases differ only in the options.
        cases: options of the cases every test run checks (small enough for the interpreter).
        paper: options of the paper-sized cases, for GPU tests and benchmarks.
        cpu: options of the benchmark cases of a machine without a GPU.
        ranges: option -> (low, high) inclusive, for shapes drawn at random.
        differentiable: inputs that get a gradient (a tuple of tensors counts as many).
        interpreted: the dtypes the Triton interpreter computes rightly (its bfloat16 ``tl.dot`` returns garbage).
        slack: of ``checking.judge``, at the paper's sizes: for several roundings in a row, where for one of so many
            elements the reference is right by luck.
        truth: replaces ``reference`` for the float64 truth of paper-sized cases, where that would not fit in memory.
        flops, bytes: of one call (forward + backward where there is one), the minimum that must be done and moved.
        peers: other implementations worth a row in the benchmark, called as ``peer(**inputs)``.
        eager: name of the reference's row on a GPU, where a library does all of its work.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., Inputs]
    cases: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, Mapping[str, Any]]
    cpu: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    interpreted: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    mutants: Mapping[str, Mutant] = field(default_factory=dict)
    deterministic: bool = True
    aot: Mapping[str, AotConfig] = field(default_factory=dict)
    slack: float = 0.0
    truth: Callable[..., Any] | None = None
    flops: Callable[[Inputs], float]
    bytes: Callable[[Inputs], float]
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    eager: str = "eager"

    def locate(self, function: str) -> tuple[types.ModuleType, str]:
        """The module and the name in it of one of the operator's functions."""
        module, _, name = function.rpartition(".")
        return sys.modules[f"dbeta_kernels.{module}" if module else self.function.__module__], name


_SPECS: dict[str, KernelSpec] = {}


def register(spec: KernelSpec) -> KernelSpec:
    """Enter an operator. A second one of the same name is a mistake."""
    if spec.name in _SPECS:
        raise ValueError(f"operator {spec.name!r} is registered twice")
    _SPECS[spec.name] = spec
    return spec


def specs() -> dict[str, KernelSpec]:
    """Every operator by name; imports their files."""
    for name in OPERATORS:
        importlib.import_module(f"dbeta_kernels.{name}")
    return {name: _SPECS[name] for name in OPERATORS}
