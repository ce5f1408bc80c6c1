"""Convolutional position embedding, computed only at the positions that are read.

MODEL section 2.5, before its GELU. With K taps, G groups of n = D / G channels, t = keep[b,p], channel o in group g:

    out[b,p,o] = bias[o] + sum_k sum_i weight[o,i,k] x[b, t + k - K/2, g n + i]

x is 0 outside the record; for even K the convolution with padding K/2 has one step too many, which is dropped.

The input is first packed group by group, padded: ``packed`` [G, B (T + K - 1), n]. There the K n values that an output
reads are neighbours, from n times its row on, so the convolution is a matrix product whose rows overlap in memory,
which a BLAS cannot express: [B P, K n] x [K n, n] for each group. The same windows give d_weight. d_x is the same
product once more: d_out, put back in its place among zeros, with the taps reversed. So each value of d_x is summed by
one program, without atomics, at the price of the dense product. On a CPU it is the other way about: per token all its
taps are multiplied out and added where they belong, which is P / T of that work.

Products are summed in float32 and rounded once. 2 B P D n K FLOP forward and 2 B (P + T) D n K backward (2 B P D n K
twice on a CPU); x, d_x, out, d_out, weight and d_weight are moved, and packed ones written and read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dbeta_kernels import conv_kernels
from dbeta_kernels.launch import cdiv, use_kernel
from dbeta_kernels.registry import Inputs, KernelSpec, Mutant, register

CPU_ROWS = 640  # rows of windows at a time


# 1. Reference


def reference(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, *, groups: int) -> Tensor:
    """The dense convolution, then a gather."""
    dense = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=groups)
    dense = dense[..., : x.shape[1]].transpose(1, 2)
    return dense if keep is None else dense.gather(1, keep[..., None].expand(-1, -1, dense.shape[-1]))


# 2. Operators; the device code is in ``conv_kernels``


def _before(taps: int) -> int:
    """Zero rows before a record."""
    return taps // 2


def _pack(x: Tensor, groups: int, taps: int, before: int) -> Tensor:
    """x [B,T,D] -> [G, B (T + K - 1), n], with ``before`` zero rows before each record and the rest after it."""
    batch, steps, width = x.shape
    packed = x.new_zeros(groups, batch, steps + taps - 1, width // groups)
    packed[:, :, before : before + steps] = x.unflatten(-1, (groups, -1)).permute(2, 0, 1, 3)
    return packed.flatten(1, 2)


def _starts(x: Tensor, taps: int, keep: Tensor | None) -> Tensor:
    """The packed row where the window of each output begins, int32 [B P]."""
    steps = torch.arange(x.shape[1], device=x.device) if keep is None else keep
    record = torch.arange(len(x), device=x.device)[:, None] * (x.shape[1] + taps - 1)
    return (record + steps).flatten().int()


def _group_major(weight: Tensor, groups: int) -> Tensor:
    """weight [D, n, K] -> taps [G, K n, n]: row k n + i holds weight[:, i, k]."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2).contiguous()


@torch.library.custom_op("dbeta::positional_conv", mutates_args=())
def _positional_conv(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, groups: int, kernel: bool) -> Tensor:
    """The operator of contiguous tensors of one dtype, by the kernel or in the form for the CPU."""
    taps = weight.shape[-1]
    packed, starts = _pack(x, groups, taps, _before(taps)), _starts(x, taps, keep)
    multiply = conv_kernels.windows_times if kernel else _windows_times_cpu
    out = multiply(packed, starts, _group_major(weight, groups), bias)
    return out.view(x.shape if keep is None else (*keep.shape, x.shape[-1]))


@_positional_conv.register_fake
def _(x, weight, bias, keep, groups, kernel):
    return x.new_empty(x.shape if keep is None else (*keep.shape, x.shape[-1]))


@torch.library.custom_op("dbeta::positional_conv_backward", mutates_args=())
def _positional_conv_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, keep: Tensor | None, groups: int, kernel: bool
) -> tuple[Tensor, Tensor]:
    """d_x and d_weight."""
    taps = weight.shape[-1]
    packed, starts = _pack(x, groups, taps, _before(taps)), _starts(x, taps, keep)
    grouped = _group_major(weight, groups)
    if kernel:
        d_x = _input_gradient(d_out, x, grouped, taps, keep)
        d_taps = conv_kernels.taps_gradient(packed, starts, d_out, grouped)
    else:
        d_packed, d_taps = _gradients_cpu(packed, starts, d_out.flatten(0, 1), grouped)
        d_padded = d_packed.view(groups, len(x), x.shape[1] + taps - 1, d_packed.shape[-1])
        d_x = d_padded[:, :, _before(taps) :][:, :, : x.shape[1]].permute(1, 2, 0, 3).flatten(2).contiguous()
    return d_x, d_taps.unflatten(1, (taps, -1)).permute(0, 3, 2, 1).flatten(0, 1).contiguous()


@_positional_conv_backward.register_fake
def _(d_out, x, weight, keep, groups, kernel):
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, _, keep, ctx.groups, ctx.kernel = inputs
    ctx.save_for_backward(x, weight, keep)


def _backward(ctx, d_out):
    x, weight, keep = ctx.saved_tensors
    d_out = d_out.contiguous()
    d_x, d_weight = _positional_conv_backward(d_out, x, weight, keep, ctx.groups, ctx.kernel)
    d_bias = d_out.sum((0, 1), dtype=torch.promote_types(d_out.dtype, torch.float32)).to(d_out.dtype)
    return d_x, d_weight, d_bias, None, None, None


torch.library.register_autograd("dbeta::positional_conv", _backward, setup_context=_setup_context)


def _input_gradient(d_out: Tensor, x: Tensor, grouped: Tensor, taps: int, keep: Tensor | None) -> Tensor:
    """d_x by ``conv_kernel``: d_out in its place among zeros, the taps reversed, input and output channels swapped."""
    if keep is not None:
        d_out = torch.zeros_like(x).scatter_(1, keep[..., None].expand_as(d_out), d_out)
    packed = _pack(d_out, len(grouped), taps, taps - 1 - _before(taps))
    turned = grouped.unflatten(1, (taps, -1)).flip(1).mT.flatten(1, 2)
    return conv_kernels.windows_times(packed, _starts(x, taps, None), turned.contiguous(), None).view_as(x)


# The form for the CPU: the windows of one group and some rows at a time are copied out, for a BLAS.


def _windows_times_cpu(packed: Tensor, starts: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    groups, depth, channels = taps.shape
    out = packed.new_empty(len(starts), groups, channels)
    for group, rows in _blocks(groups, len(starts)):
        windows = _windows(packed[group], starts[rows], depth)
        out[rows, group] = torch.addmm(bias[group * channels : (group + 1) * channels], windows, taps[group])
    return out.flatten(1)


def _gradients_cpu(packed: Tensor, starts: Tensor, d_out: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    groups, depth, channels = taps.shape
    d_packed, d_taps = torch.zeros_like(packed), torch.zeros_like(taps)
    read = starts[:, None] + torch.arange(depth // channels, device=starts.device)  # packed rows of each window
    d_out = d_out.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
    for group, rows in _blocks(groups, len(starts)):
        windows = _windows(packed[group], starts[rows], depth)
        d_taps[group].addmm_(windows.t(), d_out[group, rows])
        torch.mm(d_out[group, rows], taps[group].t(), out=windows)
        d_packed[group].index_add_(0, read[rows].flatten(), windows.view(-1, channels))
    return d_packed, d_taps


def _blocks(groups: int, rows: int):
    """Every group with every slice of at most CPU_ROWS rows."""
    return ((g, slice(first, first + CPU_ROWS)) for g in range(groups) for first in range(0, rows, CPU_ROWS))


def _windows(packed: Tensor, starts: Tensor, depth: int) -> Tensor:
    """[rows, K n], from packed [.., n] of one group."""
    channels = packed.shape[1]
    overlapping = packed.as_strided((len(packed) - depth // channels + 1, depth), (channels, 1))
    return overlapping.index_select(0, starts)


# 3. Public function


def positional_conv(
    x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, *, groups: int, backend: str = "auto"
) -> Tensor:
    """Grouped convolution over time at the kept positions.

    Under autocast all three tensors take its dtype, as those of a convolution do.

    Args:
        x: [B,T,D] tokens.
        weight: [D, D / groups, K], the weight norm folded in.
        bias: [D].
        keep: int64 [B,P] positions, in any order, without repetition; None computes all T.
        groups: number of groups.
        backend: auto, fused or reference; ``launch.use_kernel``. Without a kernel, auto takes the form for the CPU,
            which is the dense convolution for all positions.

    Returns:
        [B,P,D] ([B,T,D] without ``keep``), before the GELU.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    _check(x, weight, bias, keep, groups, dtype)
    if backend == "reference":
        return reference(x, weight, bias, keep, groups=groups)
    x, weight, bias = (t.to(dtype).contiguous() for t in (x, weight, bias))
    kernel = use_kernel(backend, x)
    # A CPU sums half precision badly.
    inner = dtype if kernel else torch.promote_types(dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        if keep is None and not kernel:
            return reference(x.to(inner), weight.to(inner), bias.to(inner), groups=groups).to(dtype)
        keep = None if keep is None else keep.contiguous()
        return _positional_conv(x.to(inner), weight.to(inner), bias.to(inner), keep, groups, kernel).to(dtype)


def _check(x, weight, bias, keep, groups, dtype) -> None:
    width = x.shape[-1]
    if x.ndim != 3 or width % groups or weight.shape[:2] != (width, width // groups) or bias.shape != (width,):
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)} and {groups} groups do not fit: "
            "give [B,T,D], [D, D / groups, K], [D]"
        )
    if dtype == x.dtype and not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}, bias {bias.dtype}: give all three in one dtype")
    if keep is not None and (keep.ndim != 2 or len(keep) != len(x)):
        raise ValueError(f"keep {list(keep.shape)} should be [{len(x)}, positions]")


# 4. Registration


def _make(
    dtype, device, seed, *, records=2, steps=312, width=768, groups=16, taps=128, kept=None, amplitude=1.0
) -> Inputs:  # fmt: skip
    """``width`` is rounded up to a multiple of ``groups``; both ends are among the ``kept`` positions."""
    generator = torch.Generator().manual_seed(seed)
    width = cdiv(width, groups) * groups
    channels = width // groups
    inputs = {
        "x": torch.randn(records, steps, width, generator=generator) * amplitude,
        "weight": torch.randn(width, channels, taps, generator=generator) / (channels * taps) ** 0.5,
        "bias": torch.randn(width, generator=generator),
    }
    inputs = {name: value.to(device, dtype) for name, value in inputs.items()}
    if kept is not None:
        order = torch.rand(records, steps, generator=generator)
        order[:, 0] = order[:, -1] = 0
        inputs["keep"] = order.argsort(1)[:, : min(kept, steps)].to(device)
    return inputs | {"groups": groups}


def _flops(inputs: Inputs) -> float:
    weight = inputs["weight"]
    rows = inputs["x"][..., 0].numel() if inputs.get("keep") is None else inputs["keep"].numel()
    return 6.0 * rows * weight.numel()


def _bytes(inputs: Inputs) -> float:
    x, weight = inputs["x"], inputs["weight"]
    rows = x[..., 0].numel() if inputs.get("keep") is None else inputs["keep"].numel()
    return 3.0 * x.nbytes + 2.0 * rows * x.shape[-1] * x.itemsize + 3.0 * weight.nbytes


_CONV, _WEIGHT = "conv_kernels.conv_kernel", "conv_kernels.weight_kernel"

register(
    KernelSpec(
        name="positional_conv",
        function=positional_conv,
        reference=reference,
        make=_make,
        cases={
            "two paper groups": {"records": 2, "steps": 40, "width": 96, "groups": 2, "kept": 10},
            "all positions": {"records": 2, "steps": 37, "width": 48, "groups": 4, "taps": 16},
            "ragged": {"records": 3, "steps": 123, "width": 60, "groups": 5, "taps": 21, "kept": 43},
            "odd taps": {"records": 1, "steps": 9, "width": 34, "groups": 2, "taps": 5, "kept": 4},
            "short record": {"records": 2, "steps": 3, "width": 32, "groups": 1, "taps": 16, "kept": 2},
            "depthwise": {"records": 2, "steps": 20, "width": 6, "groups": 6, "taps": 4, "kept": 7},
            "many rows": {"records": 2, "steps": 252, "width": 32, "groups": 2, "taps": 8, "kept": 200},
            "extreme": {"records": 1, "steps": 30, "width": 48, "groups": 4, "taps": 16, "kept": 8, "amplitude": 1e3},
            "no position": {"records": 2, "steps": 10, "width": 32, "groups": 2, "taps": 8, "kept": 0},
            "empty": {"records": 0, "steps": 10, "width": 32, "groups": 2, "taps": 8, "kept": 3},
        },
        paper={"B=128": {"records": 128, "kept": 78}, "B=128, all positions": {"records": 128}},
        cpu={"B=8": {"records": 8, "kept": 78}, "B=8, all positions": {"records": 8}},
        ranges={
            "records": (1, 3),
            "steps": (1, 40),
            "width": (1, 70),
            "groups": (1, 4),
            "taps": (2, 20),
            "kept": (1, 40),
        },
        differentiable=("x", "weight", "bias"),
        mutants={
            "tail of the taps lost": Mutant(_CONV, "range(0, DEPTH,", "range(0, DEPTH - BLOCK_K,", "ragged"),
            "tail of the rows lost": Mutant(_CONV, "mask=(row < rows)", "mask=(row < rows - 1)", "ragged"),
            "bias forgotten": Mutant(_CONV, "if HAS_BIAS", "if False", "two paper groups"),
            "wrong group": Mutant(_CONV, "group.to(tl.int64) * group_size", "0", "two paper groups"),
            "last row of d_weight lost": Mutant(_WEIGHT, "mask=(row < rows)", "mask=(row < rows - 1)", "ragged"),
            "rows of d_weight lost": Mutant(_WEIGHT, "range(0, rows, BLOCK_K)", "range(0, 1, BLOCK_K)", "many rows"),
            "taps not reversed": Mutant("_input_gradient", ".flip(1)", "", "odd taps"),
            "padding of the output": Mutant(
                "_input_gradient", "taps - 1 - _before(taps)", "_before(taps)", "many rows"
            ),
            "channels not swapped": Mutant("_input_gradient", ".mT", "", "two paper groups"),
            "padding at the end": Mutant("_before", "taps // 2", "taps - 1", "many rows"),
        },
        aot=conv_kernels.AOT,
        flops=_flops,
        bytes=_bytes,
        eager="cuDNN grouped",
    )
)
