"""Device code of ``conv_stem``: patch moments, the first convolution with its norm, and products with GELU.

A patch is what one output step of the first convolution reads: J = 2 C values, ordered as a row of its weight. It is
held in a tile of BLOCK_J > J columns, of which column J is 1 where sums over steps are wanted beside products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbeta_kernels.launch import cdiv, power_of_2
from dbeta_kernels.registry import AotConfig

# Tiles of steps and channels, and warps. The statistics take the moments' steps.
MOMENTS, FIRST, GRADIENT = (128, 64, 4), (128, 64, 8), (64, 32, 4)
# Tile, warps and stages of a product; float32 multiplies as three tf32 products.
PRODUCT = {False: (128, 128, 64, 8, 3), True: (128, 64, 32, 8, 3)}


@triton.jit
def gelu(v):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gelu_slope(v):
    return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)


@triton.jit
def load_patches(ecg, record, step, inside, LEADS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_J: tl.constexpr):
    """Patches of ``step`` [T, BLOCK_J] with a 1 in column 2 LEADS; samples of steps outside are 0."""
    j = tl.arange(0, BLOCK_J)
    start = ecg + record.to(tl.int64) * (LEADS * SAMPLES)
    sample = (j // 2)[None, :] * SAMPLES + (j % 2)[None, :] + 2 * step[:, None]
    x = tl.load(start + sample, mask=inside[:, None] & (j < 2 * LEADS)[None, :], other=0.0)
    return tl.where((j == 2 * LEADS)[None, :], 1.0, x).to(x.dtype)


@triton.jit
def load_taps(weight, channel, WIDTH: tl.constexpr, LEADS: tl.constexpr, BLOCK_J: tl.constexpr):
    """The first convolution's weight [W, 2 LEADS], transposed to [BLOCK_J, channels]."""
    j = tl.arange(0, BLOCK_J)
    inside = (j < 2 * LEADS)[:, None] & (channel < WIDTH)[None, :]
    return tl.load(weight + channel[None, :] * (2 * LEADS) + j[:, None], mask=inside, other=0.0)


@triton.jit
def moments_kernel(
    ecg, means, squares, steps,
    LEADS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Mean [BLOCK_J] and sum of centred squares [BLOCK_J, BLOCK_J] of the patches of one tile."""
    record, tile = tl.program_id(1), tl.program_id(0)
    step = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = step < steps
    x = load_patches(ecg, record, step, inside, LEADS, SAMPLES, BLOCK_J).to(tl.float32)
    count = tl.minimum(steps - tile * BLOCK_T, BLOCK_T)
    mean = tl.sum(x, axis=0) / count
    centred = tl.where(inside[:, None], x - mean[None, :], 0.0)
    j = tl.arange(0, BLOCK_J)
    place = record * tl.num_programs(0) + tile
    tl.store(means + place * BLOCK_J + j, mean)
    product = tl.dot(tl.trans(centred), centred, input_precision="tf32x3")
    tl.store(squares + place * (BLOCK_J * BLOCK_J) + j[:, None] * BLOCK_J + j[None, :], product)


@triton.jit
def statistics_kernel(
    means, squares, weight, mean, covariance, norm, steps, tiles, eps,
    WIDTH: tl.constexpr, LEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge a record's tiles (Chan et al.); from them mean and rstd [2, W] of every channel of the convolution."""
    record = tl.program_id(0)
    j = tl.arange(0, BLOCK_J)
    square = j[:, None] * BLOCK_J + j[None, :]
    average = tl.zeros([BLOCK_J], dtype=tl.float32)
    for tile in range(tiles):
        count = tl.minimum(steps - tile * BLOCK_T, BLOCK_T).to(tl.float32)
        average += tl.load(means + (record * tiles + tile) * BLOCK_J + j) * (count / steps)
    total = tl.zeros([BLOCK_J, BLOCK_J], dtype=tl.float32)
    for tile in range(tiles):
        count = tl.minimum(steps - tile * BLOCK_T, BLOCK_T).to(tl.float32)
        place = record * tiles + tile
        apart = tl.load(means + place * BLOCK_J + j) - average
        total += tl.load(squares + place * (BLOCK_J * BLOCK_J) + square) + count * apart[:, None] * apart[None, :]
    total = total / steps
    tl.store(mean + record * BLOCK_J + j, average)
    tl.store(covariance + record * (BLOCK_J * BLOCK_J) + square, total)
    for first in range(0, WIDTH, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        w = load_taps(weight, channel, WIDTH, LEADS, BLOCK_J).to(tl.float32)
        variance = tl.sum(tl.dot(total, w, input_precision="tf32x3") * w, axis=0)
        out = norm + record * (2 * WIDTH) + channel
        tl.store(out, tl.sum(average[:, None] * w, axis=0), mask=channel < WIDTH)
        tl.store(out + WIDTH, tl.rsqrt(variance + eps), mask=channel < WIDTH)


@triton.jit
def normalised(x, w, norm, gamma, beta, record, channel, WIDTH: tl.constexpr):
    """The normalised first convolution of patches x [T, BLOCK_J] with taps w [BLOCK_J, channels]."""
    inside = channel < WIDTH
    mean = tl.load(norm + record * (2 * WIDTH) + channel, mask=inside, other=0.0)
    rstd = tl.load(norm + record * (2 * WIDTH) + WIDTH + channel, mask=inside, other=0.0)
    scale = rstd * tl.load(gamma + channel, mask=inside, other=0.0)
    shift = tl.load(beta + channel, mask=inside, other=0.0)
    return (tl.dot(x, w, input_precision="tf32x3") - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def first_kernel(
    ecg, weight, norm, gamma, beta, out, steps,
    WIDTH: tl.constexpr, LEADS: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, steps, W] = gelu of the normalised first convolution; one program per record and BLOCK_T steps."""
    record = tl.program_id(1)
    step = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = step < steps
    x = load_patches(ecg, record, step, inside, LEADS, SAMPLES, BLOCK_J)
    row = record.to(tl.int64) * steps + step
    for first in range(0, WIDTH, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        w = load_taps(weight, channel, WIDTH, LEADS, BLOCK_J)
        z = gelu(normalised(x, w, norm, gamma, beta, record, channel, WIDTH))
        mask = inside[:, None] & (channel < WIDTH)[None, :]
        tl.store(out + row[:, None] * WIDTH + channel[None, :], z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def first_gradient_kernel(
    ecg, weight, norm, gamma, beta, d_out, sums, steps,
    WIDTH: tl.constexpr, LEADS: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums [B, BLOCK_J, W] = patches (and ones) transposed x d loss / d normalised convolution."""
    record = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = load_taps(weight, channel, WIDTH, LEADS, BLOCK_J)
    total = tl.zeros([BLOCK_J, BLOCK_C], dtype=tl.float32)
    for first in range(0, steps, BLOCK_T):
        step = first + tl.arange(0, BLOCK_T)
        inside = step < steps
        x = load_patches(ecg, record, step, inside, LEADS, SAMPLES, BLOCK_J)
        v = normalised(x, w, norm, gamma, beta, record, channel, WIDTH)
        row = record.to(tl.int64) * steps + step
        mask = inside[:, None] & (channel < WIDTH)[None, :]
        d = tl.load(d_out + row[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(x), (d * gelu_slope(v)).to(x.dtype), total, input_precision="tf32x3")
    j = tl.arange(0, BLOCK_J)
    place = (record * BLOCK_J + j)[:, None] * WIDTH + channel[None, :]
    tl.store(sums + place, total, mask=(channel < WIDTH)[None, :])


@triton.jit
def product_kernel(
    x, weight, d_out, out, rows,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gelu(u), u = x [rows, DEPTH] x weight [WIDTH, DEPTH] transposed; as GRADIENT, d_out times its slope at u."""
    tiles = tl.cdiv(WIDTH, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # rows and channels outside repeat the last: they are not stored, and loads without a mask are cheaper
    left = x + tl.minimum(row, rows - 1)[:, None] * DEPTH + depth[None, :]
    right = weight + tl.minimum(channel, WIDTH - 1)[:, None] * DEPTH + depth[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(left + first)
            b = tl.load(right + first)
        else:
            rest = (first + depth < DEPTH)[None, :]
            a = tl.load(left + first, mask=rest, other=0.0)
            b = tl.load(right + first, mask=rest, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
    place = row[:, None] * WIDTH + channel[None, :]
    mask = (row < rows)[:, None] & (channel < WIDTH)[None, :]
    if GRADIENT:
        z = tl.load(d_out + place, mask=mask, other=0.0).to(tl.float32) * gelu_slope(total)
    else:
        z = gelu(total)
    tl.store(out + place, z.to(out.dtype.element_ty), mask=mask)


def patch_columns(ecg: Tensor) -> int:
    """BLOCK_J: room for a patch and a column of ones."""
    return power_of_2(2 * ecg.shape[1] + 1, 32)


def _constants(ecg: Tensor, width: int, tile: tuple[int, int, int]) -> dict[str, int]:
    steps, channels, warps = tile
    return {
        "WIDTH": width, "LEADS": ecg.shape[1], "BLOCK_J": patch_columns(ecg), "BLOCK_T": steps,
        "BLOCK_C": min(channels, power_of_2(width)), "num_warps": warps,
    }  # fmt: skip


def statistics(ecg: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Patch mean [B, J'] and covariance [B, J', J'], and norm [B, 2, W]: mean and rstd of the convolution."""
    constants = _constants(ecg, len(weight), MOMENTS)
    batch, samples, j = len(ecg), ecg.shape[2], constants["BLOCK_J"]
    steps = samples // 2
    tiles = cdiv(steps, constants["BLOCK_T"])
    shapes = ((batch, tiles, j), (batch, tiles, j, j), (batch, j), (batch, j, j), (batch, 2, len(weight)))
    means, squares, mean, covariance, norm = (ecg.new_empty(shape, dtype=torch.float32) for shape in shapes)
    if batch:
        of_moments = {name: constants[name] for name in ("LEADS", "BLOCK_J", "BLOCK_T", "num_warps")}
        moments_kernel[(tiles, batch)](ecg, means, squares, steps, SAMPLES=samples, **of_moments)
        statistics_kernel[(batch,)](means, squares, weight, mean, covariance, norm, steps, tiles, eps, **constants)
    return mean, covariance, norm


def first(ecg: Tensor, weight: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, out: Tensor) -> None:
    """Write ``out`` [B, steps, W] by ``first_kernel``."""
    batch, steps, width = out.shape
    constants = _constants(ecg, width, FIRST)
    if batch:
        first_kernel[(cdiv(steps, constants["BLOCK_T"]), batch)](
            ecg, weight, norm, gamma, beta, out, steps, SAMPLES=ecg.shape[2], **constants
        )


def first_gradient(ecg: Tensor, weight: Tensor, norm: Tensor, gamma: Tensor, beta: Tensor, d_out: Tensor) -> Tensor:
    """sums [B, J', W] by ``first_gradient_kernel``."""
    batch, steps, width = d_out.shape
    constants = _constants(ecg, width, GRADIENT)
    sums = ecg.new_empty(batch, constants["BLOCK_J"], width, dtype=torch.float32)
    if batch:
        first_gradient_kernel[(cdiv(width, constants["BLOCK_C"]), batch)](
            ecg, weight, norm, gamma, beta, d_out, sums, steps, SAMPLES=ecg.shape[2], **constants
        )
    return sums


def product(x: Tensor, weight: Tensor, out: Tensor, d_out: Tensor | None = None) -> None:
    """Write ``out`` [rows, W]: gelu(x weight^T), or d_out times its slope, by ``product_kernel``."""
    block_m, block_n, block_k, warps, stages = PRODUCT[x.dtype == torch.float32]
    width, depth = weight.shape
    block_n = min(block_n, power_of_2(width))
    if out.numel():
        product_kernel[(cdiv(len(x), block_m) * cdiv(width, block_n),)](
            x, weight, d_out, out, len(x), WIDTH=width, DEPTH=depth, GRADIENT=d_out is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _aot(kernel: str, kind: str, pointers: str, tile: tuple[int, int, int], left_out: str = "") -> AotConfig:
    """``pointers``: those in capitals are of dtype ``kind``, the others float32; at the paper's sizes."""
    steps, channels, warps = tile
    constants = {"WIDTH": 256, "LEADS": 12, "SAMPLES": 5000, "BLOCK_T": steps, "BLOCK_J": 32, "BLOCK_C": channels}
    numbers = {"steps": "i32"} | ({"tiles": "i32", "eps": "fp32"} if kernel == "statistics_kernel" else {})
    return AotConfig(
        kernel=f"stem_kernels.{kernel}",
        signature={name.lower(): f"*{kind if name.isupper() else 'fp32'}" for name in pointers.split()} | numbers,
        constants={name: value for name, value in constants.items() if name not in left_out.split()},
        num_warps=warps,
        slow=kind == "fp32",
    )


def _aot_product(kind: str, gradient: bool) -> AotConfig:
    block_m, block_n, block_k, warps, stages = PRODUCT[kind == "fp32"]
    constants = {"WIDTH": 256, "DEPTH": 512, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    names = ("x", "weight", "d_out", "out") if gradient else ("x", "weight", "out")
    return AotConfig(
        kernel="stem_kernels.product_kernel",
        signature={name: f"*{kind}" for name in names} | {"rows": "i32"},
        constants=constants | {"GRADIENT": gradient} | ({} if gradient else {"d_out": None}),
        num_warps=warps,
        num_stages=stages,
        wgmma=True,
        slow=kind == "fp32",
    )


AOT = {
    f"{name} {kind}": config
    for kind in ("bf16", "fp32")
    for name, config in {
        "moments": _aot("moments_kernel", kind, "ECG means squares", MOMENTS, "WIDTH BLOCK_C"),
        "statistics": _aot("statistics_kernel", kind, "means squares WEIGHT mean covariance norm", MOMENTS, "SAMPLES"),
        "first": _aot("first_kernel", kind, "ECG WEIGHT norm gamma beta OUT", FIRST),
        "first, gradient": _aot("first_gradient_kernel", kind, "ECG WEIGHT norm gamma beta D_OUT sums", GRADIENT),
        "product": _aot_product(kind, False),
        "product, gradient": _aot_product(kind, True),
    }.items()
}
