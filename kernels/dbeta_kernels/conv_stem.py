"""The convolutional stem: kernel = stride = 2 each, a per-channel normalisation after the first, GELU after all.

MODEL section 2.1. With W channels and z_0 the ECG:

    u_1 = conv(z_0; w_1);  per record and channel over time  v_1 = gamma (u_1 - mean) / sqrt(var + eps) + beta
    z_1 = gelu(v_1);  z_l = gelu(conv(z_{l-1}; w_l)) for l = 2, 3, ...

var is biased, the GELU is x Phi(x). A trailing odd sample is dropped (625 -> 312); the last steps that only feed such
samples are not computed, though they count in the statistics.

Channels last, a convolution is a matrix product: two neighbouring steps are one row of 2 W values. The statistics of
u_1 need no pass over it: with p the patch of 2 C samples that a step reads, mean = w . E[p] and var = w' Cov[p] w, and
Cov[p] is 24 x 24 (merged from centred tiles). Its backward needs only sum_t d v_1 and sum_t d v_1 p': with S = sum_t
d v_1 (u_1 - mean) rstd, D = sum_t d v_1 (p - E[p]) and T_1 steps,

    d gamma = S, d beta = sum_t d v_1, d w_1 = gamma rstd (D - S rstd Cov[p] w_1), each summed over records.

The kernels keep z_1 .. z_{n-1} in the input's dtype and recompute u_l for the GELU's slope. Statistics and sums are
float32, each z_l is rounded once. 4 B W (C T_1 + W sum T_l) FLOP forward, twice that backward, and u_l once more.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dbeta_kernels import stem_kernels
from dbeta_kernels.launch import use_kernel
from dbeta_kernels.registry import Inputs, KernelSpec, Mutant, register

# 1. Reference


def reference(
    ecg: Tensor, weights: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Convolutions and group norm (groups = channels) of PyTorch, channels first, transposed at the end."""
    z = F.conv1d(ecg, weights[0], stride=2)
    wide = torch.promote_types(z.dtype, torch.float32)
    norm = F.group_norm(z.to(wide), len(norm_weight), norm_weight.to(wide), norm_bias.to(wide), eps)
    z = F.gelu(norm.to(z.dtype))
    for weight in weights[1:]:
        z = F.gelu(F.conv1d(z, weight, stride=2))
    return z.transpose(1, 2)


def products(
    ecg: Tensor, weights: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """The same as matrix products under autograd: the form for the CPU, and for a gradient of the ECG."""
    dtype, wide = ecg.dtype, torch.promote_types(ecg.dtype, torch.float32)
    samples = ecg.shape[-1]
    used = samples >> len(weights) << len(weights) - 1  # steps of the first convolution that are read
    patches = ecg[..., : samples // 2 * 2].to(wide).unflatten(-1, (-1, 2)).permute(0, 2, 1, 3).flatten(2)
    centred = patches - patches.mean(1, keepdim=True)
    covariance = centred.mT @ centred / patches.shape[1]
    w = weights[0].flatten(1).to(wide).t()
    scale = norm_weight * (((covariance @ w) * w).sum(1) + eps).rsqrt()  # [B,W]
    v = torch.baddbmm(norm_bias.to(wide), centred[:, :used], w * scale[:, None])
    z = F.gelu(v.to(dtype))
    for weight in weights[1:]:
        z = F.gelu(F.linear(z.view(len(z), z.shape[1] // 2, 2 * z.shape[2]), _tap_major(weight)))
    return z


def _tap_major(weight: Tensor) -> Tensor:
    """[W,W,2] -> [W, 2 W]: the weights of the first of two neighbouring steps, then those of the second."""
    return weight.transpose(1, 2).flatten(1)


# 2. Operators; the device code is in ``stem_kernels``


@torch.library.custom_op("dbeta::conv_stem", mutates_args=())
def _conv_stem(
    ecg: Tensor, first: Tensor, rest: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z_n, then for the backward z_1 .. z_{n-1} in one array, patch mean and covariance, and mean and rstd of u_1.

    ``first`` [W, 2 C] and ``rest`` [n-1, W, 2 W] are the weights, tap-major; gamma and beta are float32.
    """
    mean, covariance, norm = stem_kernels.statistics(ecg, first, eps)
    out, states = _allocate(ecg, first, rest)
    z = [*_states(states, out, len(rest)), out]
    stem_kernels.first(ecg, first, norm, gamma, beta, z[0])
    for before, weight, after in zip(z, rest, z[1:]):
        stem_kernels.product(before.view(-1, weight.shape[1]), weight, after)
    return out, states, mean, covariance, norm


def _allocate(ecg: Tensor, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    layers = len(rest)
    steps = ecg.shape[2] >> layers + 1
    earlier = sum(steps << layer for layer in range(1, layers + 1))
    return ecg.new_empty(len(ecg), steps, len(first)), ecg.new_empty(len(ecg) * earlier * len(first))


def _states(states: Tensor, out: Tensor, layers: int) -> tuple[Tensor, ...]:
    """Views z_1 .. z_{n-1} [B, T_l, W] of the flat array."""
    batch, steps, width = out.shape
    lengths = [steps << layer for layer in range(layers, 0, -1)]
    parts = states.split([batch * length * width for length in lengths])
    return tuple(part.view(batch, length, width) for part, length in zip(parts, lengths))


@_conv_stem.register_fake
def _(ecg, first, rest, gamma, beta, eps):
    j = stem_kernels.patch_columns(ecg)
    shapes = ((len(ecg), j), (len(ecg), j, j), (len(ecg), 2, len(first)))
    return *_allocate(ecg, first, rest), *(ecg.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("dbeta::conv_stem_backward", mutates_args=())
def _conv_stem_backward(
    d_out: Tensor, ecg: Tensor, first: Tensor, rest: Tensor, gamma: Tensor, beta: Tensor,
    states: Tensor, mean: Tensor, covariance: Tensor, norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``first``, ``rest``, gamma and beta."""
    d_rest = torch.empty_like(rest)
    d = d_out
    for layer, z in reversed(list(enumerate(_states(states, d_out, len(rest))))):
        rows = z.view(-1, rest.shape[2])
        d_u = torch.empty_like(d)
        stem_kernels.product(rows, rest[layer], d_u, d)
        d_u = d_u.flatten(0, 1)
        torch.mm(d_u.t(), rows, out=d_rest[layer])
        d = (d_u @ rest[layer]).view_as(z)
    sums = stem_kernels.first_gradient(ecg, first, norm, gamma, beta, d)
    return *_first_gradients(sums, mean, covariance, norm, first, gamma), d_rest


def _first_gradients(
    sums: Tensor, mean: Tensor, covariance: Tensor, norm: Tensor, first: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the first convolution, gamma and beta, from sum_t d v_1 (p, 1)."""
    j = first.shape[1]
    w, rstd = first.t().float(), norm[:, 1]
    d_beta = sums[:, j]  # [B,W]
    centred = sums[:, :j] - mean[:, :j, None] * d_beta[:, None]  # [B,J,W]
    d_gamma = (centred * w).sum(1) * rstd
    d_first = gamma * rstd[:, None] * (centred - (d_gamma * rstd)[:, None] * (covariance[:, :j, :j] @ w))
    return d_first.sum(0).t().contiguous().to(first.dtype), d_gamma.sum(0), d_beta.sum(0)


@_conv_stem_backward.register_fake
def _(d_out, ecg, first, rest, gamma, beta, states, mean, covariance, norm):
    return torch.empty_like(first), torch.empty_like(gamma), torch.empty_like(beta), torch.empty_like(rest)


def _setup_context(ctx, inputs, output):
    ecg, first, rest, gamma, beta, _ = inputs
    ctx.save_for_backward(ecg, first, rest, gamma, beta, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, *_):
    if d_out is None:
        return (None,) * 6
    d_first, d_gamma, d_beta, d_rest = _conv_stem_backward(d_out.contiguous(), *ctx.saved_tensors)
    return None, d_first, d_rest, d_gamma, d_beta, None


torch.library.register_autograd("dbeta::conv_stem", _backward, setup_context=_setup_context)


# 3. Public function


def conv_stem(
    ecg: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """ECG to tokens.

    Under autocast the ECG and the weights take its dtype, as those of a convolution do.

    Args:
        ecg: [B,C,L], mV. A gradient of it is computed by matrix products only (auto takes them; fused refuses).
        weights: [W,C,2], then [W,W,2] for each further convolution.
        norm_weight, norm_bias: [W] of the group norm.
        eps: of the group norm.
        backend: auto, fused or reference; ``launch.use_kernel``. Without a kernel, auto multiplies matrices.

    Returns:
        [B, L // 2^layers, W], channels last, in the dtype of ``ecg``.

    Raises:
        ValueError: shapes that do not fit together, or an ECG too short for one token.
    """
    _check(ecg, weights, norm_weight, norm_bias)
    if backend == "reference":
        return reference(ecg, weights, norm_weight, norm_bias, eps=eps)
    device = ecg.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else ecg.dtype
    ecg, weights = ecg.to(dtype), [weight.to(dtype) for weight in weights]
    wanted = ecg.requires_grad and torch.is_grad_enabled()
    if wanted and backend == "fused":
        raise ValueError("backend 'fused' gives no gradient of the ECG; use 'auto' or 'reference'")
    with torch.autocast(device, enabled=False):
        if wanted or not use_kernel(backend, ecg):
            return products(ecg, weights, norm_weight, norm_bias, eps=eps)
        first, *rest = (weight.flatten(1) if i == 0 else _tap_major(weight) for i, weight in enumerate(weights))
        stacked = torch.stack(rest) if rest else first.new_empty(0, len(first), 2 * len(first))
        out, *_ = _conv_stem(
            ecg.contiguous(), first.contiguous(), stacked, norm_weight.float().contiguous(),
            norm_bias.float().contiguous(), eps,
        )  # fmt: skip
        return out


def _check(ecg: Tensor, weights: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor) -> None:
    width = len(norm_weight)
    expected = [(width, ecg.shape[1], 2)] + [(width, width, 2)] * (len(weights) - 1)
    if not weights or [tuple(w.shape) for w in weights] != expected or norm_bias.shape != norm_weight.shape:
        raise ValueError(f"stem weights {[list(w.shape) for w in weights]} do not fit; expected {expected}")
    if ecg.shape[-1] >> len(weights) == 0:
        least = 1 << len(weights)
        raise ValueError(f"{ecg.shape[-1]} samples are too few for {len(weights)} halvings; give at least {least}")


# 4. Registration


def _make(
    dtype, device, seed, *, records=2, leads=12, samples=5000, width=256, layers=4, offset=0.0, dropped=False
) -> Inputs:  # fmt: skip
    """Walks of about 1 mV around ``offset``; ``dropped``: every lead of the first record is masked."""
    generator = torch.Generator().manual_seed(seed)
    ecg = torch.randn(records, leads, samples, generator=generator).cumsum(-1) / max(samples, 1) ** 0.5 + offset
    if dropped:
        ecg[0] = 0
    shapes = [(width, leads, 2)] + [(width, width, 2)] * (layers - 1)
    weights = tuple(torch.randn(s, generator=generator) * (2 / (2 * s[1])) ** 0.5 for s in shapes)
    return {
        "ecg": ecg.to(device, dtype), "weights": tuple(w.to(device, dtype) for w in weights),
        "norm_weight": (torch.rand(width, generator=generator) + 0.5).to(device),
        "norm_bias": (torch.randn(width, generator=generator) / 2).to(device),
    }  # fmt: skip


def _flops(inputs: Inputs) -> float:
    batch, _, samples = inputs["ecg"].shape
    forward = [2.0 * batch * (samples >> i + 1) * w.numel() for i, w in enumerate(inputs["weights"])]
    return 3.0 * sum(forward) - forward[0]  # the ECG gets no gradient


def _bytes(inputs: Inputs) -> float:
    """Each z_l, out of the chip's caches: written, read by its successor, twice in the backward; d z_l twice."""
    ecg, weights = inputs["ecg"], inputs["weights"]
    steps = ecg.shape[2] >> len(weights)
    states = sum(steps << layer for layer in range(1, len(weights)))
    return 2.0 * ecg.nbytes + len(ecg) * len(weights[0]) * ecg.itemsize * (6.0 * states + 2.0 * steps)


_PRODUCT = "stem_kernels.product_kernel"

register(
    KernelSpec(
        name="conv_stem",
        function=conv_stem,
        reference=reference,
        make=_make,
        cases={
            "paper width": {"records": 2, "samples": 246, "layers": 2},
            "tiny model": {"records": 2, "samples": 507, "width": 16},
            "ragged": {"records": 3, "leads": 5, "samples": 123, "width": 70, "layers": 3},
            "one convolution": {"records": 1, "leads": 3, "samples": 25, "width": 5, "layers": 1},
            "one token": {"records": 1, "samples": 31, "width": 32},
            "several tiles": {"records": 1, "samples": 1250, "width": 16, "layers": 2},
            "large offset": {"records": 2, "samples": 252, "width": 32, "offset": 5.0},
            "all leads masked": {"records": 2, "samples": 123, "width": 32, "dropped": True},
            "empty": {"records": 0, "samples": 40, "width": 16},
        },
        paper={"B=128": {"records": 128}},
        cpu={"B=8": {"records": 8}},
        ranges={"records": (1, 3), "leads": (1, 13), "samples": (16, 300), "width": (1, 70), "layers": (1, 4)},
        differentiable=("weights", "norm_weight", "norm_bias"),
        # Four roundings in a row, each magnified where terms cancel: the kernel's root mean square error is below the
        # reference's (tests/kernels/test_conv_stem.py), but not each element's error below that element's.
        tolerance={torch.float32: 5e-4, torch.float16: 6e-3, torch.bfloat16: 5e-2},
        mutants={
            "taps swapped": Mutant("stem_kernels.load_patches", "(j % 2)", "(1 - j % 2)", "tiny model"),
            "no column of ones": Mutant("stem_kernels.load_patches", "1.0, x", "0.0, x", "tiny model"),
            "steps outside centred": Mutant(
                "stem_kernels.moments_kernel", "tl.where(inside[:, None], x - mean[None, :], 0.0)", "x - mean", "ragged"
            ),
            "tiles not merged": Mutant(
                "stem_kernels.statistics_kernel", " + count * apart[:, None] * apart[None, :]", "", "several tiles"
            ),
            "unbiased variance": Mutant(
                "stem_kernels.statistics_kernel", "total = total / steps", "total = total / (steps - 1)", "ragged"
            ),
            "eps forgotten": Mutant("stem_kernels.statistics_kernel", "variance + eps", "variance", "all leads masked"),
            "mean not taken off": Mutant("stem_kernels.normalised", " - mean[None, :]", "", "large offset"),
            "weight of the norm forgotten": Mutant(
                "stem_kernels.normalised", "rstd * tl.load(gamma + channel, mask=inside, other=0.0)", "rstd", "ragged"
            ),
            "GELU of another slope": Mutant("stem_kernels.gelu", "0.7071067811865476", "0.70", "one convolution"),
            "half the slope": Mutant(
                "stem_kernels.gelu_slope", " + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)", "", "one token"
            ),
            "tail of the rows lost": Mutant(_PRODUCT, "(row < rows)", "(row < rows - 1)", "ragged"),
            "tail of the depth lost": Mutant(_PRODUCT, "range(0, DEPTH,", "range(0, DEPTH - BLOCK_K,", "ragged"),
            "last steps not summed": Mutant(
                "stem_kernels.first_gradient_kernel", "range(0, steps,", "range(0, steps - BLOCK_T,", "several tiles"
            ),
            "sums not centred": Mutant("_first_gradients", " - mean[:, :j, None] * d_beta[:, None]", "", "ragged"),
            "norm taken for constant": Mutant("_first_gradients", "(d_gamma * rstd)", "0 * (d_gamma * rstd)", "ragged"),
        },
        aot=stem_kernels.AOT,
        slack=3.0,
        flops=_flops,
        bytes=_bytes,
        peers={"matrix products": products},
    )
)
