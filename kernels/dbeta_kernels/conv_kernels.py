"""Device code of ``positional_conv``: matrix products whose rows are overlapping windows of one array.

``packed`` [G, .., n] is the input, group by group; the window of a row begins at n * start[row] of its group and is
DEPTH = K n values long. Nothing is gathered in memory: the pointers of a tile's rows are the windows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbeta_kernels.launch import cdiv, power_of_2
from dbeta_kernels.registry import AotConfig

# Tiles of (rows or K n, depth of a step), warps and stages. Float32 multiplies as three tf32 products: half the depth.
TILES = {False: (128, 64, 4, 4), True: (128, 32, 8, 3)}


@triton.jit
def conv_kernel(
    packed, starts, weight, bias, out, rows, group_size,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows, G n] = windows x weight [G, DEPTH, n]: one program per BLOCK_M rows and group."""
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    inside = channel[None, :] < CHANNELS
    start = tl.load(starts + row, mask=row < rows, other=0) * CHANNELS
    window = packed + group.to(tl.int64) * group_size + start[:, None] + depth[None, :]
    taps = weight + (group * DEPTH + depth)[:, None] * CHANNELS + channel[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            x = tl.load(window + first)
            w = tl.load(taps + first * CHANNELS, mask=inside, other=0.0)
        else:
            left = first + depth < DEPTH
            x = tl.load(window + first, mask=left[None, :], other=0.0)
            w = tl.load(taps + first * CHANNELS, mask=inside & left[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="tf32x3")
    if HAS_BIAS:
        total += tl.load(bias + group * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * (tl.num_programs(1) * CHANNELS) + group * CHANNELS + channel[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit
def weight_kernel(
    packed, starts, d_out, d_weight, rows, group_size,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_weight [G, DEPTH, n] = windows transposed x d_out: one program per BLOCK_M of DEPTH and group."""
    group = tl.program_id(1)
    depth = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_N)
    inside = channel[None, :] < CHANNELS
    window = packed + group.to(tl.int64) * group_size + depth[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, rows, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        start = tl.load(starts + row, mask=row < rows, other=0) * CHANNELS
        if DEPTH % BLOCK_M == 0:
            x = tl.load(window + start[:, None])
        else:
            x = tl.load(window + start[:, None], mask=depth[None, :] < DEPTH, other=0.0)
        place = row.to(tl.int64)[:, None] * (tl.num_programs(1) * CHANNELS) + group * CHANNELS + channel[None, :]
        d = tl.load(d_out + place, mask=(row < rows)[:, None] & inside, other=0.0)
        total = tl.dot(tl.trans(x), d, total, input_precision="tf32x3")
    place = (group * DEPTH + depth)[:, None] * CHANNELS + channel[None, :]
    tl.store(d_weight + place, total.to(d_weight.dtype.element_ty), mask=(depth < DEPTH)[:, None] & inside)


def windows_times(packed: Tensor, starts: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """[rows, D] = the window of each start x taps [G, K n, n], plus bias, by ``conv_kernel``."""
    groups, depth, channels = taps.shape
    block_m, block_k, warps, stages = TILES[packed.dtype == torch.float32]
    out = packed.new_empty(len(starts), groups * channels)
    if out.numel():
        conv_kernel[(cdiv(len(starts), block_m), groups)](
            packed, starts, taps, bias, out, len(starts), packed[0].numel(), CHANNELS=channels, DEPTH=depth,
            HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=power_of_2(channels), BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def taps_gradient(packed: Tensor, starts: Tensor, d_out: Tensor, taps: Tensor) -> Tensor:
    """[G, K n, n] = the windows, transposed x d_out [rows, D], by ``weight_kernel``."""
    groups, depth, channels = taps.shape
    block_m, block_k, warps, stages = TILES[packed.dtype == torch.float32]
    d_taps = torch.empty_like(taps)
    weight_kernel[(cdiv(depth, block_m), groups)](
        packed, starts, d_out, d_taps, len(starts), packed[0].numel(), CHANNELS=channels, DEPTH=depth,
        BLOCK_M=block_m, BLOCK_N=power_of_2(channels), BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return d_taps


def _aot(kernel: str, kind: str) -> AotConfig:
    block_m, block_k, warps, stages = TILES[kind == "fp32"]
    names = ("weight", "bias", "out") if kernel == "conv_kernel" else ("d_out", "d_weight")
    constants = {"CHANNELS": 48, "DEPTH": 6144, "BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": block_k}
    return AotConfig(
        kernel=f"conv_kernels.{kernel}",
        signature={"packed": f"*{kind}", "starts": "*i32"}
        | {name: f"*{kind}" for name in names}
        | {"rows": "i32", "group_size": "i32"},
        constants=constants | ({"HAS_BIAS": True} if kernel == "conv_kernel" else {}),
        num_warps=warps,
        num_stages=stages,
        divisible=("group_size",),
        wgmma=True,
        slow=kind == "fp32",
    )


AOT = {
    "forward bf16": _aot("conv_kernel", "bf16"),
    "forward fp32": _aot("conv_kernel", "fp32"),
    "weight bf16": _aot("weight_kernel", "bf16"),
    "weight fp32": _aot("weight_kernel", "fp32"),
}
