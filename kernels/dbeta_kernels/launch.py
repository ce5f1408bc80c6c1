"""How a kernel is chosen and launched: the interpreter, the back-end of a call, and the arithmetic of grids."""

import os

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

# Contracting multiply-adds is what the budgets were measured with; Triton 3.9 asks for the choice to be spelt out.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

BACKENDS = ("auto", "fused", "reference")


@triton.jit
def _probe():
    pass


# TRITON_INTERPRET=1 counts only if it was set before triton was first imported, so ask triton, not the environment.
INTERPRETED = isinstance(_probe, InterpretedFunction)


def use_kernel(backend: str, tensor: torch.Tensor, *, matmul: bool = True) -> bool:
    """Whether a call on ``tensor`` runs the fused kernel (else the operator's CPU form or reference).

    Args:
        backend: ``auto`` takes the kernel on CUDA and under ``TRITON_INTERPRET=1``; ``fused`` insists; ``reference``
            never does.
        tensor: the tensor that decides device and dtype.
        matmul: the kernel uses ``tl.dot``, which the interpreter computes wrongly in bfloat16.

    Raises:
        ValueError: an unknown back-end, or ``fused`` where the kernel cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: accepted are {', '.join(BACKENDS)}")
    if backend == "reference":
        return False
    refusal = _refusal(tensor, matmul)
    if refusal and backend == "fused":
        raise ValueError(f"backend 'fused': {refusal}; use 'auto' or 'reference'")
    return not refusal


def _refusal(tensor: torch.Tensor, matmul: bool) -> str:
    if tensor.dtype == torch.float64:
        return "the kernels compute in float32, and this input is float64"
    if INTERPRETED:
        wrong = matmul and tensor.dtype == torch.bfloat16
        return "the Triton interpreter multiplies bfloat16 matrices wrongly" if wrong else ""
    if not tensor.is_cuda:
        return f"the kernels need a CUDA tensor (this one is on {tensor.device}) or TRITON_INTERPRET=1"
    return ""


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def power_of_2(n: int, low: int = 16) -> int:
    """The smallest power of two >= max(n, low); 16 is the least dimension ``tl.dot`` takes."""
    return max(low, 1 << (n - 1).bit_length())


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` if its last dimension has stride 1, else a contiguous copy; kernels are given the other strides."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()
