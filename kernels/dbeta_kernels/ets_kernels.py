"""Device code of ``ets_loss``: part 3 of the operator's file, beside it because of its length.

``small`` sweeps everything in one launch of two roles, ``large`` makes g in chunks of rows. Both return the sums
[parts, 3] of the loss, of g x.t and of g, and g T and g^T X, all float32 and all divided by the loss's divisor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbeta_kernels.launch import cdiv
from dbeta_kernels.registry import AotConfig

SMALL = 256  # rows and columns up to which one launch does it all
BLOCK, SLICE = 64, 64  # of the small form: pairs per side, and the share of the width one program makes a gradient of
TILE_M, TILE_N = (
    128,
    128,
)  # of the large form: 128 registers at 8 warps, so that one tile's epilogue hides in another's product
DEPTH = {2: 64, 4: 32}  # of the products' steps, by the bytes of a value
CHUNK_ROWS, CHUNK_PAIRS = 2048, 2**26  # of the large form: at most 128 MiB of g in bf16


class Pairs(NamedTuple):
    """What a sweep is given; ``inverse`` is 1 / divisor, ``same_report`` the label of such a pair."""

    ecg: Tensor
    text: Tensor
    aligned: Tensor
    scale: float | Tensor
    bias: float | Tensor
    ecg_reports: Tensor | None
    text_reports: Tensor | None
    same_report: int
    offset: int
    diagonal: bool
    inverse: float
    gradients: bool

    def gradient_memory(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Zeros for g T and g^T X; empty if no gradient is wanted."""
        return tuple(t.new_zeros(t.shape if self.gradients else (0,), dtype=dtype) for t in (self.ecg, self.text))


@triton.jit
def _pair(w):
    """softplus(w) and sigmoid(w), to float32 rounding also where they are tiny; one exp and one division."""
    e = tl.exp(-tl.abs(w))
    # log1p(e) / e on [0, 1]: a Chebyshev fit of degree 8, relative error 2e-7 in float32; log(1 + e) loses a small e.
    p = 0.00525346 * e - 0.02958851
    p = p * e + 0.07836167
    p = p * e - 0.1367477
    p = p * e + 0.19111431
    p = p * e - 0.2484437
    p = p * e + 0.33319271
    p = p * e - 0.49999502
    p = p * e + 0.99999997
    inverse = 1.0 / (1.0 + e)
    return tl.maximum(w, 0.0) + e * p, tl.where(w >= 0.0, inverse, e * inverse)


@triton.jit
def _label(
    i, j, rows, columns, aligned, ecg_reports, text_reports, offset,
    SAME_REPORT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """y of the pairs (i, j), float32 -1, 0 or +1; 0 beyond the ends. i and j broadcast together."""
    inside = (i < rows) & (j < columns)
    y = tl.where(inside, -1.0, 0.0)
    if ecg_reports is not None:
        same = tl.load(ecg_reports + i, mask=i < rows, other=0) == tl.load(text_reports + j, mask=j < columns, other=0)
        y = tl.where(inside & same, SAME_REPORT, y)
    if DIAGONAL:
        own = tl.load(aligned + i, mask=i < rows, other=0).to(tl.float32)
        y = tl.where(inside & (j == i + offset), 2.0 * own - 1.0, y)
    return y


@triton.jit
def _product(
    a, b, rows_a, rows_b, stride_a, stride_b, count_a, count_b, width,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """a[rows_a] b[rows_b]^T in float32; rows beyond count are 0."""
    k = tl.arange(0, BLOCK_K)
    a += rows_a.to(tl.int64)[:, None] * stride_a + k[None, :]
    b += rows_b.to(tl.int64)[:, None] * stride_b + k[None, :]
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, width, BLOCK_K):
        mask_a, mask_b = rows_a[:, None] < count_a, rows_b[:, None] < count_b
        if not EVEN_K:
            mask_a = mask_a & (start + k[None, :] < width)
            mask_b = mask_b & (start + k[None, :] < width)
        tile_a = tl.load(a + start, mask=mask_a, other=0.0)
        tile_b = tl.load(b + start, mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b.T, total, input_precision="tf32x3")
    return total


@triton.jit
def _role(
    own, other, d_own, sums, block, part, count, others, own_stride, other_stride, width, scale, bias, inverse,
    aligned, ecg_reports, text_reports, offset, SAME_REPORT: tl.constexpr, DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr, GRADIENTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One block of rows (ROWS) or columns against all of the other side: a slice of its gradient; of rows, the loss."""
    mine = block * BLOCK + tl.arange(0, BLOCK)
    channel = part * SLICE + tl.arange(0, SLICE)
    total = tl.zeros((BLOCK, SLICE), tl.float32)
    loss, d_scale, d_bias = 0.0, 0.0, 0.0
    for start in range(0, others, BLOCK):
        theirs = start + tl.arange(0, BLOCK)
        product = _product(
            own, other, mine, theirs, own_stride, other_stride, count, others, width, BLOCK, BLOCK, BLOCK_K, EVEN_K
        )
        if ROWS:
            y = _label(
                mine[:, None], theirs[None, :], count, others,
                aligned, ecg_reports, text_reports, offset, SAME_REPORT, DIAGONAL,
            )  # fmt: skip
        else:
            y = _label(
                theirs[None, :], mine[:, None], others, count,
                aligned, ecg_reports, text_reports, offset, SAME_REPORT, DIAGONAL,
            )  # fmt: skip
        softplus, sigmoid = _pair(-y * (scale * product + bias))
        g = -y * sigmoid
        if ROWS:
            loss += tl.sum(tl.abs(y) * softplus)
            d_scale += tl.sum(g * product)
            d_bias += tl.sum(g)
        if GRADIENTS:
            mask = (theirs[:, None] < others) & (channel[None, :] < width)
            tile = tl.load(other + theirs[:, None] * other_stride + channel[None, :], mask=mask, other=0.0)
            total = tl.dot(g.to(tile.dtype), tile, total, input_precision="tf32x3")
    if GRADIENTS:
        mask = (mine[:, None] < count) & (channel[None, :] < width)
        tl.store(d_own + mine[:, None] * width + channel[None, :], total * inverse, mask=mask)
    if ROWS and part == 0:
        tl.store(sums + block * 3, loss * inverse)
        tl.store(sums + block * 3 + 1, d_scale * inverse)
        tl.store(sums + block * 3 + 2, d_bias * inverse)


@triton.jit
def _small_kernel(
    ecg, text, d_ecg, d_text, sums, rows, columns, width, ecg_stride, text_stride, inverse, scale, bias,
    aligned, ecg_reports, text_reports, offset, SAME_REPORT: tl.constexpr, DIAGONAL: tl.constexpr,
    SCALE_TENSOR: tl.constexpr, BIAS_TENSOR: tl.constexpr, GRADIENTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, then blocks of columns; slices of the width)."""
    block, part = tl.program_id(0), tl.program_id(1)
    if SCALE_TENSOR:
        scale = tl.load(scale).to(tl.float32)
    if BIAS_TENSOR:
        bias = tl.load(bias).to(tl.float32)
    row_blocks = tl.cdiv(rows, BLOCK)
    if block < row_blocks:
        _role(
            ecg, text, d_ecg, sums, block, part, rows, columns, ecg_stride, text_stride, width, scale, bias, inverse,
            aligned, ecg_reports, text_reports, offset, SAME_REPORT, DIAGONAL,
            True, GRADIENTS, EVEN_K, BLOCK, BLOCK_K, SLICE,
        )  # fmt: skip
    else:
        _role(
            text, ecg, d_text, sums, block - row_blocks, part, columns, rows, text_stride, ecg_stride, width, scale,
            bias, inverse, aligned, ecg_reports, text_reports, offset, SAME_REPORT, DIAGONAL,
            False, GRADIENTS, EVEN_K, BLOCK, BLOCK_K, SLICE,
        )  # fmt: skip


@triton.jit
def _tile_kernel(
    ecg, text, g, sums, first, rows, columns, width, ecg_stride, text_stride, scale, bias,
    aligned, ecg_reports, text_reports, offset, SAME_REPORT: tl.constexpr, DIAGONAL: tl.constexpr,
    SCALE_TENSOR: tl.constexpr, BIAS_TENSOR: tl.constexpr, GRADIENTS: tl.constexpr, EVEN_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """One tile of one chunk of g, rows [first, rows) of the batch, and the tile's three sums.

    Neighbouring programs take the row tiles of one column tile: the chunk of ecg stays in L2 and text streams past it.
    """
    tiles_m = tl.cdiv(rows - first, TILE_M)
    tile_m, tile_n = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    if SCALE_TENSOR:
        scale = tl.load(scale).to(tl.float32)
    if BIAS_TENSOR:
        bias = tl.load(bias).to(tl.float32)
    row = tile_m * TILE_M + tl.arange(0, TILE_M)  # in the chunk
    i = first + row
    j = tile_n * TILE_N + tl.arange(0, TILE_N)
    product = _product(ecg, text, i, j, ecg_stride, text_stride, rows, columns, width, TILE_M, TILE_N, TILE_K, EVEN_K)
    # The epilogue goes by quarters of the columns: the whole tile's temporaries would not fit in the registers.
    quarters = tl.permute(tl.reshape(product, (TILE_M, 2, 2, TILE_N // 4)), (0, 3, 1, 2))
    even, odd = tl.split(quarters)
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    loss = tl.zeros((TILE_M, TILE_N // 4), tl.float32)
    d_scale, d_bias = loss, loss
    for q in tl.static_range(4):
        part = q0 if q == 0 else q1 if q == 1 else q2 if q == 2 else q3
        j = tile_n * TILE_N + q * (TILE_N // 4) + tl.arange(0, TILE_N // 4)
        y = _label(
            i[:, None], j[None, :], rows, columns, aligned, ecg_reports, text_reports, offset, SAME_REPORT, DIAGONAL
        )
        softplus, sigmoid = _pair(-y * (scale * part + bias))
        loss += tl.abs(y) * softplus
        d_z = -y * sigmoid
        if SCALE_TENSOR:
            d_scale += d_z * part
        if BIAS_TENSOR:
            d_bias += d_z
        if GRADIENTS:
            mask = (i[:, None] < rows) & (j[None, :] < columns)
            tl.store(g + row.to(tl.int64)[:, None] * columns + j[None, :], d_z.to(g.dtype.element_ty), mask=mask)
    sums += 3 * ((first // TILE_M + tile_m) * tl.cdiv(columns, TILE_N) + tile_n)
    tl.store(sums, tl.sum(loss))
    tl.store(sums + 1, tl.sum(d_scale))
    tl.store(sums + 2, tl.sum(d_bias))


def small(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; a row of sums for every block of rows."""
    ecg, text, gradients = pairs.ecg, pairs.text, pairs.gradients
    (rows, width), columns, depth = ecg.shape, len(text), DEPTH[ecg.itemsize]
    sums = ecg.new_empty(cdiv(rows, BLOCK), 3, dtype=torch.float32)
    d_ecg, d_text = (t.new_empty(t.shape if gradients else (0,), dtype=torch.float32) for t in (ecg, text))
    blocks = cdiv(rows, BLOCK) + (cdiv(columns, BLOCK) if gradients else 0)
    _small_kernel[(blocks, cdiv(width, SLICE) if gradients else 1)](
        ecg, text, d_ecg, d_text, sums, rows, columns, width, ecg.stride(0), text.stride(0), pairs.inverse,
        *_shared_arguments(pairs), width % depth == 0, BLOCK, depth, SLICE, num_warps=8, num_stages=3,
    )  # fmt: skip
    return sums, d_ecg, d_text


def large(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Per chunk of rows one kernel that writes the chunk of g, and two products that use it."""
    ecg, text, inverse = pairs.ecg, pairs.text, pairs.inverse
    (rows, width), columns, depth = ecg.shape, len(text), DEPTH[ecg.itemsize]
    chunk = min(CHUNK_ROWS, max(TILE_M, CHUNK_PAIRS // columns // TILE_M * TILE_M))
    tiles_n = cdiv(columns, TILE_N)
    sums = ecg.new_empty(cdiv(rows, TILE_M) * tiles_n, 3, dtype=torch.float32)
    g = ecg.new_empty(min(chunk, rows) if pairs.gradients else 0, columns)
    d_ecg, d_text = pairs.gradient_memory(torch.float32)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        _tile_kernel[(cdiv(last - first, TILE_M) * tiles_n,)](
            ecg, text, g, sums, first, last, columns, width, ecg.stride(0), text.stride(0),
            *_shared_arguments(pairs), width % depth == 0, TILE_M, TILE_N, depth, num_warps=8, num_stages=3,
        )  # fmt: skip
        if pairs.gradients:
            part = g[: last - first]
            _add_product(d_ecg[first:last], part, text, beta=0, alpha=inverse)
            _add_product(d_text, part.T, ecg[first:last], beta=1, alpha=inverse)
    return sums.sum(0, keepdim=True) * inverse, d_ecg, d_text


def _shared_arguments(pairs: Pairs) -> tuple:
    return (
        pairs.scale, pairs.bias, pairs.aligned, pairs.ecg_reports, pairs.text_reports, pairs.offset, pairs.same_report,
        pairs.diagonal, isinstance(pairs.scale, Tensor), isinstance(pairs.bias, Tensor), pairs.gradients,
    )  # fmt: skip


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int, alpha: float) -> None:
    """``total = beta total + alpha a b`` in place, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out_dtype=torch.float32, out=total)
    else:  # out_dtype is CUDA's; the interpreter runs on CPU tensors
        torch.addmm(total, a.float(), b.float(), beta=beta, alpha=alpha, out=total)


def _aot(kernel: str, dtype: str, even: bool, tensors: bool, reports: bool) -> AotConfig:
    """As the launchers above call it: contiguous features, 64-bit report ids."""
    small = kernel == "_small_kernel"
    signature = {"ecg": f"*{dtype}", "text": f"*{dtype}", "sums": "*fp32", "aligned": "*i1"}
    signature |= dict.fromkeys(("rows", "columns", "width", "ecg_stride", "text_stride", "offset"), "i32")
    signature |= dict.fromkeys(("scale", "bias"), "*fp32" if tensors else "fp32")
    signature |= (
        {"d_ecg": "*fp32", "d_text": "*fp32", "inverse": "fp32"} if small else {"g": f"*{dtype}", "first": "i32"}
    )
    signature |= dict.fromkeys(("ecg_reports", "text_reports"), "*i64") if reports else {}
    depth = DEPTH[4 if dtype == "fp32" else 2]
    tiles = {"BLOCK": BLOCK, "BLOCK_K": depth, "SLICE": SLICE}
    if not small:
        tiles = {"TILE_M": TILE_M, "TILE_N": TILE_N, "TILE_K": depth}
    return AotConfig(
        kernel=f"ets_kernels.{kernel}",
        signature=signature,
        constants={
            **({} if reports else {"ecg_reports": None, "text_reports": None}),
            "SAME_REPORT": 0 if reports else -1, "DIAGONAL": True, "SCALE_TENSOR": tensors, "BIAS_TENSOR": tensors,
            "GRADIENTS": True, "EVEN_K": even, **tiles,
        },
        num_warps=8,
        divisible=("rows", "columns", "width", "ecg_stride", "text_stride", "offset", "first") if even else (),
        slow=not even or dtype == "fp32",
        wgmma=True,
        spill_reason="float32 is for checking; the paper's sizes run in bf16" if dtype == "fp32" else "",
    )  # fmt: skip


AOT = {
    "small bf16": _aot("_small_kernel", "bf16", True, False, False),
    "small bf16 learned, ids, ragged": _aot("_small_kernel", "bf16", False, True, True),
    "small fp32": _aot("_small_kernel", "fp32", True, False, False),
    "large bf16": _aot("_tile_kernel", "bf16", True, False, False),
    "large bf16 learned, ids": _aot("_tile_kernel", "bf16", True, True, True),
    "large fp32": _aot("_tile_kernel", "fp32", True, False, False),
}
