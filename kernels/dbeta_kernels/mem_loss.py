"""Masked ECG modelling: mean squared error on the masked patches, against a target normalised on the fly.

Paper eq. 2; MODEL section 8. Patch t of a record is its samples 16t .. 16t+15 of all leads, ordered lead * 16 + sample:

    target[b,p,:] = (mv[b, c, 16 patches[b,p] + s] - mean[b,c]) * rstd[b,c]        (mv itself without mean and rstd)
    loss = sum_b w_b sum_p mean_192 (prediction[b,p,:] - target[b,p,:])^2 / (P sum_b w_b)

mv is read as in ``lead_mask`` (gain, baseline, invalid code and NaN as 0 mV). The loss of nothing (B = 0, P = 0, or
all weights 0) is 0.

Computed in float32 in one pass, which also leaves prediction - target, rounded to the prediction's dtype; the backward
multiplies it by 2 w_b / (192 P sum w) and the incoming gradient. There is no target in memory and nothing is computed
on patches that are not masked. About 8 B P 192 FLOP; predictions and samples are read once, gradients written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbeta_kernels.launch import cdiv, power_of_2, use_kernel
from dbeta_kernels.lead_mask import INVALID, PATCH, load_mv, millivolts
from dbeta_kernels.registry import AotConfig, Inputs, KernelSpec, Mutant, register

BLOCK_P, BLOCK_N = 32, 64


# 1. Reference


def reference(
    prediction: Tensor,
    signal: Tensor,
    patches: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    baseline: Tensor | None = None,
    rows_weight: Tensor | None = None,
    patch: int = PATCH,
) -> Tensor:
    """``mem_loss`` in plain PyTorch; computes in float32, or in float64 where the prediction or signal is."""
    leads = signal.shape[1]
    tokens = signal[..., : signal.shape[-1] // patch * patch].unflatten(-1, (-1, patch)).transpose(1, 2)  # [B,T,C,S]
    target = tokens.gather(1, patches[..., None, None].expand(-1, -1, leads, patch))
    gain, baseline = (None if x is None else x[:, None] for x in (gain, baseline))
    target = millivolts(target, gain, baseline)
    if mean is not None:
        target = (target - mean[:, None, :, None]) * rstd[:, None, :, None]
    target = target.to(torch.promote_types(target.dtype, prediction.dtype)).flatten(2)
    error = (prediction.to(target.dtype) - target).square().sum((1, 2))
    weight = torch.ones_like(error) if rows_weight is None else rows_weight.to(error.dtype)
    count = weight.sum() * (prediction.shape[1] * leads * patch)
    return (weight * error).sum() / torch.where(count == 0, 1.0, count)


# 2. Device code


@triton.jit
def mem_loss_kernel(
    prediction, signal, patches, mean, rstd, gain, baseline, coefficient, partial, difference,
    count, scale,
    LEADS: tl.constexpr, SAMPLES: tl.constexpr, PATCH: tl.constexpr, INTEGER: tl.constexpr, NORMALISE: tl.constexpr,
    WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per record and BLOCK_P masked patches; its part of the loss goes to ``partial``."""
    record = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    masked = place < count
    first = tl.load(patches + record * count + place, mask=masked, other=0) * PATCH
    total = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in range(0, LEADS * PATCH, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < LEADS * PATCH
        both = masked[:, None] & inside[None, :]
        lead = record * LEADS + column // PATCH
        adc_per_mv = tl.load(gain + lead, mask=inside, other=1.0)[None, :] if INTEGER else 1.0
        zero_mv = tl.load(baseline + lead, mask=inside, other=0.0)[None, :] if INTEGER else 0.0
        sample = (lead * SAMPLES + column % PATCH)[None, :] + first[:, None]
        target = load_mv(signal + sample, adc_per_mv, zero_mv, both, INTEGER)
        if NORMALISE:
            average = tl.load(mean + lead, mask=inside, other=0.0)
            target = (target - average[None, :]) * tl.load(rstd + lead, mask=inside, other=0.0)[None, :]
        element = (record * count + place)[:, None] * (LEADS * PATCH) + column[None, :]
        error = tl.load(prediction + element, mask=both, other=0.0).to(tl.float32) - target
        error = tl.where(both, error, 0.0)
        total += error * error
        if GRADIENT:
            tl.store(difference + element, error.to(difference.dtype.element_ty), mask=both)
    weight = tl.load(coefficient + record) if WEIGHTED else scale
    tl.store(partial + record * tl.num_programs(1) + tl.program_id(1), tl.sum(total) * weight)


# 3. Operators


@torch.library.custom_op("dbeta::mem_loss", mutates_args=())
def _mem_loss(
    prediction: Tensor, signal: Tensor, patches: Tensor, mean: Tensor | None, rstd: Tensor | None,
    gain: Tensor | None, baseline: Tensor | None, coefficient: Tensor | None, scale: float, patch: int, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and, if asked for, prediction - target; ``coefficient`` [B] or ``scale`` weighs the squares of a record."""
    batch, count, width = prediction.shape
    _, difference = _allocate(prediction, gradient)
    partial = prediction.new_empty(batch, cdiv(count, BLOCK_P), dtype=torch.float32)
    if partial.numel():
        mem_loss_kernel[partial.shape](
            prediction, signal, patches, mean, rstd, gain, baseline, coefficient, partial, difference, count, scale,
            LEADS=width // patch, SAMPLES=signal.shape[-1], PATCH=patch, INTEGER=not signal.is_floating_point(),
            NORMALISE=mean is not None, WEIGHTED=coefficient is not None, GRADIENT=gradient,
            BLOCK_P=BLOCK_P, BLOCK_N=min(BLOCK_N, power_of_2(width)),
        )  # fmt: skip
    return partial.sum(), difference


def _allocate(prediction: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    return prediction.new_empty((), dtype=torch.float32), prediction.new_empty(prediction.shape if gradient else (0,))


@_mem_loss.register_fake
def _(prediction, signal, patches, mean, rstd, gain, baseline, coefficient, scale, patch, gradient):
    return _allocate(prediction, gradient)


@torch.library.custom_op("dbeta::mem_loss_backward", mutates_args=())
def _mem_loss_backward(difference: Tensor, factor: Tensor) -> Tensor:
    """``difference`` [B,P,C*S] times a float32 ``factor`` [B|1,1,1], rounded once."""
    return torch.mul(difference, factor, out=torch.empty_like(difference))


@_mem_loss_backward.register_fake
def _(difference, factor):
    return torch.empty_like(difference)


def _setup_context(ctx, inputs, output):
    ctx.scale = inputs[8]
    ctx.save_for_backward(inputs[7], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss, _):
    if d_loss is None:
        return (None,) * 11
    coefficient, difference = ctx.saved_tensors
    return _mem_loss_backward(difference, _factor(d_loss, coefficient, ctx.scale)), *(None,) * 10


def _factor(d_loss: Tensor, coefficient: Tensor | None, scale: float) -> Tensor:
    """d loss / d prediction over prediction - target, float32 [B|1,1,1]."""
    return (2.0 * d_loss * (scale if coefficient is None else coefficient)).view(-1, 1, 1)


torch.library.register_autograd("dbeta::mem_loss", _backward, setup_context=_setup_context)


# 4. Public function


def mem_loss(
    prediction: Tensor,
    signal: Tensor,
    patches: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    baseline: Tensor | None = None,
    rows_weight: Tensor | None = None,
    patch: int = PATCH,
    backend: str = "auto",
) -> Tensor:
    """Loss of reconstructing the masked patches (paper eq. 2, as a mean).

    Args:
        prediction: [B,P,C*patch], the decoder's output at the masked patches; it alone gets a gradient.
        signal: int16 ADC values or mV [B,C,L], the record before lead masking.
        patches: int64 [B,P], index of each patch, 0 <= index < L // patch.
        mean, rstd: float32 [B,C] of ``lead_mask``; without them the target is in mV.
        gain, baseline: float32 [B,C], with an int16 signal.
        rows_weight: float [B], weight of each record; None weighs all alike.
        patch: samples per patch.
        backend: auto, fused or reference; ``launch.use_kernel``.

    Returns:
        The scalar loss, float32 (float64 for a float64 prediction).

    Raises:
        ValueError: shapes that do not fit together, or one of two arguments that belong together.
    """
    _check(prediction, signal, patches, mean, rstd, gain, baseline, rows_weight, patch)
    if signal.dtype == torch.float64 or not use_kernel(backend, prediction, matmul=False):
        return reference(
            prediction, signal, patches, mean, rstd, gain=gain, baseline=baseline, rows_weight=rows_weight, patch=patch
        )
    elements = patches.shape[1] * prediction.shape[2]
    coefficient, scale = None, 1.0 / max(elements * len(prediction), 1)
    if rows_weight is not None:
        weight = rows_weight.detach().float()
        total = weight.sum() * elements
        coefficient = weight / torch.where(total == 0, 1.0, total)
    tables = (None if t is None else t.detach().float().contiguous() for t in (mean, rstd, gain, baseline))
    loss, _ = _mem_loss(
        prediction.contiguous(), signal.detach().contiguous(), patches.contiguous(), *tables, coefficient, scale, patch,
        prediction.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return loss


def _check(prediction, signal, patches, mean, rstd, gain, baseline, rows_weight, patch) -> None:
    expected = [len(signal), patches.shape[-1], signal.shape[1] * patch]
    if list(prediction.shape) != expected or patches.ndim != 2 or len(patches) != len(signal):
        raise ValueError(
            f"prediction {list(prediction.shape)}, signal {list(signal.shape)} and patches {list(patches.shape)} do "
            f"not fit: the prediction should be {expected} = [records, patches, leads * {patch}]"
        )
    if not (signal.is_floating_point() or signal.dtype == torch.int16):
        raise ValueError(f"signal is {signal.dtype}; give int16 ADC values or float mV")
    for names, first, second in (("mean and rstd", mean, rstd), ("gain and baseline", gain, baseline)):
        if (first is None) != (second is None) or any(
            t is not None and t.shape != signal.shape[:2] for t in (first, second)
        ):
            raise ValueError(f"{names} belong together, both of shape {list(signal.shape[:2])}, or neither")
    if signal.is_floating_point() != (gain is None):
        raise ValueError("an int16 signal needs gain and baseline, and a float signal is already in mV")
    if rows_weight is not None and rows_weight.shape != (len(signal),):
        raise ValueError(f"rows_weight has shape {list(rows_weight.shape)}, but the signal holds {len(signal)} records")


# 5. Registration


def _make(
    dtype, device, seed, *, records=2, leads=12, samples=5000, patch=PATCH, masked=234, integer=True, normalise=True,
    weights=None, holes=False, offset=0, amplitude=1.0,
) -> Inputs:  # fmt: skip
    """Distinct patches in ascending order, the last always among them; ``holes``: invalid codes or NaN."""
    generator = torch.Generator().manual_seed(seed)
    tokens = samples // patch
    masked = min(masked, tokens)
    adc = torch.randn(records, leads, samples, generator=generator).mul(300 * amplitude).add(offset)
    signal = adc.clamp(-32767, 32767).short() if integer else (adc / 1000).to(dtype)
    if holes:
        signal[torch.rand(signal.shape, generator=generator) < 0.1] = INVALID if integer else float("nan")
    order = torch.rand(records, tokens, generator=generator)
    order[:, -1] = 0
    tables = torch.rand(4, records, leads, generator=generator)
    inputs = {
        "prediction": torch.randn(records, masked, leads * patch, generator=generator).mul(amplitude).to(dtype),
        "signal": signal, "patches": order.argsort(1)[:, :masked].sort(1).values, "patch": patch,
    }  # fmt: skip
    if normalise:
        inputs |= {"mean": tables[0] - 0.5, "rstd": tables[1] * 4 + 0.5}
    if integer:
        inputs |= {"gain": tables[2] * 800 + 200, "baseline": (tables[3] * 1000 - 500).round()}
    if weights is not None:
        inputs["rows_weight"] = torch.tensor(weights)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _aot(prediction: str, signal: str, **flags) -> AotConfig:
    integer = signal == "i16"
    constants = {"INTEGER": integer, "NORMALISE": True, "WEIGHTED": False, "GRADIENT": True} | flags
    pointers = {"prediction": prediction, "signal": signal, "patches": "i64", "mean": "fp32", "rstd": "fp32"}
    pointers |= {"gain": "fp32", "baseline": "fp32", "coefficient": "fp32", "partial": "fp32", "difference": prediction}
    absent = {"gain", "baseline"} if not integer else set()
    absent |= {"mean", "rstd"} if not constants["NORMALISE"] else set()
    absent |= {"coefficient"} if not constants["WEIGHTED"] else set()
    return AotConfig(
        kernel="mem_loss_kernel",
        signature={name: f"*{kind}" for name, kind in pointers.items() if name not in absent}
        | {"count": "i32", "scale": "fp32"},
        constants=dict.fromkeys(absent)
        | constants
        | {"LEADS": 12, "SAMPLES": 5000, "PATCH": PATCH, "BLOCK_P": BLOCK_P, "BLOCK_N": BLOCK_N},
    )


def _bytes(inputs: Inputs) -> float:
    prediction, signal = inputs["prediction"], inputs["signal"]
    return 2.0 * prediction.nbytes + prediction.numel() * signal.itemsize


register(
    KernelSpec(
        name="mem_loss",
        function=mem_loss,
        reference=reference,
        make=_make,
        cases={
            "paper size": {"records": 2},
            "weighted": {"records": 3, "masked": 33, "samples": 700, "weights": (1.0, 0.0, 0.5)},
            "float": {"records": 2, "integer": False, "samples": 507, "masked": 23, "holes": True},
            "mV target": {"records": 2, "normalise": False, "samples": 252, "masked": 7},
            "one patch": {"records": 1, "masked": 1, "samples": 123, "leads": 5, "holes": True},
            "ragged": {"records": 3, "leads": 7, "patch": 9, "samples": 507, "masked": 41},
            "extreme": {"records": 2, "samples": 252, "masked": 12, "offset": 30000, "amplitude": 100.0},
            "no weight": {"records": 2, "samples": 252, "masked": 3, "weights": (0.0, 0.0)},
            "no patch": {"records": 2, "masked": 0},
            "empty": {"records": 0},
        },
        paper={"B=128": {"records": 128}, "B=2048": {"records": 2048}},
        cpu={"B=8": {"records": 8}},
        ranges={"records": (1, 4), "leads": (1, 13), "samples": (16, 300), "patch": (1, 16), "masked": (1, 70)},
        differentiable=("prediction",),
        interpreted=(torch.float32, torch.float16, torch.bfloat16),
        mutants={
            "mean for rstd": Mutant("mem_loss_kernel", "tl.load(rstd + lead", "tl.load(mean + lead", "float"),
            "mean added": Mutant("mem_loss_kernel", "target - average", "target + average", "paper size"),
            "tail of the patches lost": Mutant("mem_loss_kernel", "place < count", "place < count - 1", "paper size"),
            "squares outside counted": Mutant("mem_loss_kernel", "tl.where(both, error, 0.0)", "error", "paper size"),
            "weight forgotten": Mutant("mem_loss_kernel", "if WEIGHTED", "if False", "weighted"),
            "sample-major": Mutant("mem_loss_kernel", "column // PATCH", "column % LEADS", "paper size"),
            "sign of the gradient": Mutant("_factor", "2.0 * d_loss", "-2.0 * d_loss", "one patch"),
            "weight forgotten backwards": Mutant("_factor", "if coefficient is None", "if True", "weighted"),
        },
        aot={
            "bf16, int16": _aot("bf16", "i16"),
            "bf16, int16, weighted": _aot("bf16", "i16", WEIGHTED=True),
            "bf16, int16, no gradient": _aot("bf16", "i16", GRADIENT=False),
            "bf16, fp32 in mV": _aot("bf16", "fp32", NORMALISE=False),
            "fp32, int16": _aot("fp32", "i16"),
        },
        flops=lambda inputs: 8.0 * inputs["prediction"].numel(),
        bytes=_bytes,
    )
)
