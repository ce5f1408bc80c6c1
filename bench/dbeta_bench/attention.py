"""Attention back-ends on the shapes of the network: forward and backward, behind a check against the formula."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbeta.models.attention import BACKENDS, Rows, attend, resolve_backend
from dbeta_bench.timing import interleave

HEADS, WIDTH = 12, 64
# name -> (queries, keys, whether the keys are padded text)
SHAPES = {
    "ecg 79": (79, 79, False),
    "ecg 313": (313, 313, False),
    "ecg 79 x text 40": (79, 40, True),
    "text 40 x ecg 79": (40, 79, False),
    **{f"text {length}": (length, length, True) for length in (40, 64, 128, 256)},
}
DROPOUTS = (0.0, 0.1)  # evaluation and the MEM decoder; training
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value


def run(
    *, device: str = "cpu", batch: int | None = None, repeats: int = 20, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Rows of median milliseconds per shape, back-end and dropout; a back-end this machine lacks is named and left out.

    The check in front of the times is without dropout: each back-end draws its own.

    Args:
        batch: records; None: 128 on a GPU, 8 on a CPU.
    """
    where = torch.device(device)
    batch = batch or (128 if where.type == "cuda" else 8)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    backends = []
    for name in BACKENDS:
        try:
            backends.append(resolve_backend(name, device))
        except ValueError as error:
            say(f"{name}: not run ({error})")
    rows = []
    for shape, (queries, keys, padded) in SHAPES.items():
        inputs = _inputs(batch, queries, keys, padded, dtype, where)
        truth = _step(inputs, "reference")
        for name in backends:
            error = _error(_step(inputs, name), truth)
            if error > TOLERANCE[dtype]:
                raise ArithmeticError(f"attention back-end {name} on {shape}: off by {error:.1e}; no time is given")
        flops = 14 * batch * HEADS * queries * keys * WIDTH  # 2 products forward, 5 backward
        calls = {(name, p): partial(_step, inputs, name, p) for name in backends for p in DROPOUTS}
        for (name, p), times in interleave(calls, device=where, repeats=repeats).items():
            row = {"shape": shape, "backend": name, "dropout": str(p), "batch": batch}  # what names a row is no float
            row |= {"dtype": str(dtype).removeprefix("torch."), "ms": times["median"] * 1e3}
            rows.append(row | {"tflops": flops / times["median"] / 1e12} | times)
            say(f"{shape:18} {name:12} dropout {p:<4}{times['median'] * 1e3:8.3f} ms forward + backward")
    return rows


def _inputs(batch: int, queries: int, keys: int, padded: bool, dtype: torch.dtype, device: torch.device):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, HEADS, WIDTH), *[(batch, keys, HEADS, WIDTH)] * 2)
    qkv = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    lengths = torch.randint(1, keys + 1, (batch, 1), generator=generator)
    layout = Rows((torch.arange(keys) < lengths).to(device)) if padded else None
    return *qkv, layout, torch.randn(shapes[0], generator=generator).to(device, dtype)


def _step(inputs: tuple, backend: str, dropout: float = 0.0) -> tuple[Tensor, ...]:
    q, k, v, layout, upstream = inputs
    out = attend(q, k, v, key_rows=layout, dropout=dropout, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)


def _error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Of output and gradients, the largest difference as a share of the largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth))
