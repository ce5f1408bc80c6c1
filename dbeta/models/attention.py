"""Attention: one facade over four back-ends, and the layout of packed text.

    out = softmax(scale q k^T + bias, over the real keys only) v        MODEL sections 4-7

Back-ends (``runtime.attention``):

* ``flash-attn``   the flash-attn package: FlashAttention-2 with dropout, packed text through its varlen functions
* ``sdpa-flash``   PyTorch's own FlashAttention-2, pinned; it takes no mask, so masked keys go through ``sdpa``
* ``sdpa``         ``scaled_dot_product_attention`` with a mask or bias, whatever kernel PyTorch picks but cuDNN's
* ``reference``    the formula written out, one softmax in the dtype of its input

``auto`` takes the first that this machine has. Flash kernels need bf16 or fp16 on CUDA and know no additive bias, so
T5's learned bias, and every call in float32, goes through ``sdpa`` under all but ``reference``.
"""

import contextlib
import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dbeta.runtime import announce

BACKENDS = ("flash-attn", "sdpa-flash", "sdpa", "reference")


class Rows(NamedTuple):
    """Which cells of a padded grid [B, T] a tensor of tokens holds, one row per cell.

    A packed tensor [N, ...] leaves the padding out, so that linear layers and norms do no work on it; attention unpacks
    it to the grid. ``index`` None means that the tensor is the grid itself, [B, T, ...].
    """

    mask: Tensor  # bool [B, T], True where there is a token: only these are attended
    index: Tensor | None = None  # int64 [N], the cell b*T + t of each row
    inverse: Tensor | None = None  # int64 [B*T], a row for each cell (an arbitrary one where the cell has none)
    ordered: bool = False  # the rows are the tokens of the grid one after the other, then filler

    @classmethod
    def packed(cls, mask: Tensor, capacity: int) -> "Rows":
        """The tokens of ``mask`` in order, then padding cells up to ``capacity`` rows (all static shapes).

        ``capacity`` must be at least the number of tokens, which the caller knows. Where it is not, indices run out of
        the grid: an IndexError on a CPU, a device-side assertion on a GPU, without a read by the host.
        """
        flat = mask.flatten()
        real = flat.cumsum(0)
        place = torch.where(flat, real - 1, real[-1] + (~flat).cumsum(0) - 1)
        index = torch.empty_like(place).scatter_(0, place, torch.arange(len(flat), device=flat.device))
        index = index[:capacity] + len(flat) * (real[-1] > capacity)
        return cls(mask, index, place.clamp(max=capacity - 1), ordered=True)

    def select(self, cells: Tensor) -> "Rows":
        """The layout of the rows at ``cells`` (int64 [S], repeats allowed)."""
        inverse = cells.new_zeros(self.mask.numel())
        return Rows(self.mask, cells, inverse.scatter_(0, cells, torch.arange(len(cells), device=cells.device)))

    def pack(self, grid: Tensor) -> Tensor:
        """[B, T, ...] -> rows."""
        if self.index is None:
            return grid
        return take_rows(grid.flatten(0, 1), self.index, repeats=not self.ordered)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows -> [B, T, ...]; cells without a row hold arbitrary finite values."""
        if self.index is None:
            return rows
        if self.ordered and rows.requires_grad:
            cells = _Spread.apply(rows, self.inverse, self.index)
        else:
            cells = rows.index_select(0, self.inverse)
        return cells.unflatten(0, self.mask.shape)

    def take(self, rows: Tensor, cells: Tensor) -> Tensor:
        """The rows at ``cells`` [S] -> [S, ...]."""
        flat, at = (rows.flatten(0, 1), cells) if self.index is None else (rows, self.inverse[cells])
        return flat.index_select(0, at)


def take_rows(x: Tensor, index: Tensor, *, repeats: bool = False) -> Tensor:
    """x[index] along the first dimension. Without repeats the gradient is a copy, not a sum."""
    return x.index_select(0, index) if repeats or not x.requires_grad else _TakeRows.apply(x, index)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


class _Spread(torch.autograd.Function):
    """rows[inverse]. Cells without a row of their own are never read, so no gradient is taken from there."""

    @staticmethod
    def forward(ctx, rows, inverse, index):
        ctx.save_for_backward(index)
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of ``x`` in a matrix product; for what is not on its lists (custom operators, biases)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def resolve_backend(name: str, device: str = "auto") -> str:
    """The back-end that ``runtime.attention`` stands for on this machine, announced once.

    Raises:
        ValueError: a back-end that is unknown, or not installed here.
    """
    cuda = torch.cuda.is_available() and device != "cpu"
    package = importlib.util.find_spec("flash_attn") is not None
    if name == "auto":
        name = ("flash-attn" if package else "sdpa-flash") if cuda else "sdpa"
        if cuda and not package:
            announce(
                "attention: sdpa-flash (flash-attn is not installed: pip install dbeta[flash]); masked keys use sdpa"
            )
    if name not in BACKENDS:
        raise ValueError(f"runtime.attention = {name!r}; accepted: auto, {', '.join(BACKENDS)}")
    if name == "flash-attn" and not (package and cuda):
        missing = "a CUDA GPU" if package else "the flash-attn package (pip install dbeta[flash])"
        raise ValueError(f"runtime.attention=flash-attn needs {missing}; use auto, {', '.join(BACKENDS[1:])}")
    return name


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Rows | None = None,
    key_rows: Rows | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "sdpa",
) -> Tensor:
    """Attention of H heads of width E.

    Args:
        q: [B, Tq, H, E], or packed [Nq, H, E] with ``rows``.
        k, v: [B, Tk, H, E], or packed with ``key_rows``, whose mask says which keys may be attended.
        rows, key_rows: layouts; None: every cell is a token.
        bias: added to the scores, broadcastable to [B, H, Tq, Tk] (T5); it then contains the key mask.
        scale: of the scores; None: 1/sqrt(E).
        dropout: probability of dropping an attention weight.

    Returns:
        Like ``q``. Rows whose query is padding hold finite values that mean nothing.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if backend == "flash-attn" and bias is None and half:
        return _flash_package(q, k, v, rows, key_rows, scale, dropout)
    if rows is not None:
        q = rows.unpack(q)
    if key_rows is not None:
        k, v = key_rows.unpack(k), key_rows.unpack(v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is None and key_rows is not None:
        bias = key_rows.mask[:, None, None, :]
    if backend == "reference" or (dropout and not q.is_cuda):  # no CPU kernel has dropout: the formula beats its detour
        out = _written_out(q, k, v, bias, scale, dropout)
    else:
        with _pinned(backend, half or not q.is_cuda, bias is not None):
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scale)
    out = out.transpose(1, 2)
    return out if rows is None else rows.pack(out)


def _pinned(backend: str, flash: bool, biased: bool) -> contextlib.AbstractContextManager:
    """The kernels that PyTorch may choose from for one call: not cuDNN's, its first choice on Hopper since torch 2.11.

    That one gives no gradient of a bias (T5's), and NaN for some masked lengths (pytorch/pytorch#196678).
    """
    if backend == "sdpa-flash" and flash and not biased:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if torch.are_deterministic_algorithms_enabled():  # the memory-efficient kernel adds gradients in any order
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    return F.dropout(scores.softmax(-1), dropout) @ v


def _flash_package(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows | None, key_rows: Rows | None, scale: float, dropout: float
) -> Tensor:
    """FlashAttention-2 on packed sequences; filler rows at the end of a packed tensor become sequences of their own."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if rows is not None and not rows.ordered:  # a grid of queries needs no packing, only keys do
        q = rows.unpack(q)
    if key_rows is None and not _is_packed(rows):
        out = flash_attn_func(q, k, v, **options)
        return out if rows is None else rows.pack(out)
    if key_rows is not None and not key_rows.ordered:
        key_rows = Rows.packed(key_rows.mask, key_rows.mask.numel())
        k, v = key_rows.pack(k), key_rows.pack(v)
    extra = max(-(-len(x) // layout.mask.shape[1]) for x, layout in ((q, rows), (k, key_rows)) if _is_packed(layout))
    sizes, flat = [], []
    for x, layout in ((q, rows), (k, key_rows)):
        if _is_packed(layout):
            ends, longest = layout.mask.sum(1).cumsum(0), layout.mask.shape[1]
            filler = (ends[-1] + longest * torch.arange(1, extra + 1, device=x.device)).clamp(max=len(x))
        else:
            ends, longest = torch.arange(1, len(x) + 1, device=x.device) * x.shape[1], x.shape[1]
            filler, x = ends[-1:].expand(extra), x.flatten(0, 1)
        sizes.append((F.pad(torch.cat((ends, filler)), (1, 0)).int(), longest))
        flat.append(x)
    v = v if _is_packed(key_rows) else v.flatten(0, 1)
    (q_ends, q_longest), (k_ends, k_longest) = sizes
    out = flash_attn_varlen_func(flat[0], flat[1], v, q_ends, k_ends, q_longest, k_longest, **options)
    if _is_packed(rows):
        return out
    out = out.unflatten(0, q.shape[:2])
    return out if rows is None else rows.pack(out)


def _is_packed(layout: Rows | None) -> bool:
    return layout is not None and layout.ordered
