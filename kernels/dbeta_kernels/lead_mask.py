"""Random lead masking and ingest: integer samples to millivolts, whole leads dropped, statistics for the MEM target.

Paper 4.1 (each lead survives with probability p); MODEL sections 8 and 11. For record b, lead c, sample l:

    mv[b,c,l]  = (adc[b,c,l] - baseline[b,c]) / gain[b,c],  0 where adc is the invalid code -32768
    ecg[b,c,l] = mv[b,c,l] where u[b,c] < p, else 0
    mean[b,c], rstd[b,c] = mean and (var + 1e-6)^-1/2 of mv over the first 16 * (L // 16) samples, var with n - 1

u is the Philox draw (seed, LEAD_MASK, step, global row, lead), so it depends on nothing else. A float signal is taken
as millivolts, with NaN read as 0. The statistics are of the unmasked record: MEM reconstructs dropped leads.

Computed in float32 from one read of each lead, which stays in registers for the two passes of the variance; ``ecg`` is
rounded once. About 10 B C L FLOP; 2 B C L bytes are read from int16 and ``itemsize`` B C L written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbeta_kernels import philox
from dbeta_kernels.launch import power_of_2, use_kernel
from dbeta_kernels.registry import AotConfig, Inputs, KernelSpec, Mutant, register

PATCH = 16  # samples of one ECG token (MODEL section 1)
EPS = 1e-6
INVALID = -32768
STREAM = tl.constexpr(philox.LEAD_MASK)


# 1. Reference


def millivolts(signal: Tensor, gain: Tensor | None, baseline: Tensor | None) -> Tensor:
    """The whole signal in mV, float32 (float64 where the inputs are): invalid codes and NaN become 0."""
    if signal.is_floating_point():
        signal = signal if signal.dtype == torch.float64 else signal.float()
        return torch.where(signal.isnan(), 0.0, signal)
    mv = signal.to(gain.dtype).sub_(baseline[..., None]).div_(gain[..., None])  # in place: new memory costs the most
    return mv.masked_fill_(signal == INVALID, 0.0)


def reference(
    signal: Tensor,
    gain: Tensor | None = None,
    baseline: Tensor | None = None,
    *,
    seed: int,
    step: int | Tensor,
    rows: Tensor,
    keep_probability: float = 0.5,
    dtype: torch.dtype = torch.float32,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``lead_mask`` in plain PyTorch; float64 where the inputs are."""
    mv = millivolts(signal, gain, baseline)
    keep = philox.uniform(seed, philox.LEAD_MASK, step, rows, signal.shape[1]) < keep_probability
    ecg = torch.where(keep[..., None], mv, 0.0).to(dtype)
    if not statistics:
        return ecg, None, None
    measured = mv[..., : mv.shape[-1] // PATCH * PATCH]
    mean = measured.mean(-1)
    squares = torch.linalg.vector_norm(measured - mean[..., None], dim=-1).square()  # ``var`` takes longer
    return ecg, mean, (squares / (measured.shape[-1] - 1) + EPS).rsqrt()


# 2. Device code


@triton.jit
def load_mv(signal, gain, baseline, mask, INTEGER: tl.constexpr):
    """mV at ``signal`` pointers, 0 where masked; ``gain`` and ``baseline`` are values, read for an integer signal."""
    if INTEGER:
        adc = tl.load(signal, mask=mask, other=-32768)
        return tl.where(adc == -32768, 0.0, (adc.to(tl.float32) - baseline) / gain)
    mv = tl.load(signal, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mv == mv, mv, 0.0)


@triton.jit
def draw(seed, step, row, lead):
    """Uniform in [0, 1) with 24 bits: word ``lead`` of the row, as ``philox.uniform`` lays the counter out."""
    w0, w1, w2, w3 = tl.philox(seed, (lead // 4).to(tl.uint32), row.to(tl.uint32), step.to(tl.uint32), STREAM)
    low = tl.where(lead % 2 == 0, w0, w1)
    high = tl.where(lead % 2 == 0, w2, w3)
    return (tl.where(lead % 4 < 2, low, high) >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit(do_not_specialize=["seed"])
def lead_mask_kernel(
    signal, gain, baseline, step, rows, ecg, mean, rstd,
    seed, keep_probability,
    LEADS: tl.constexpr, SAMPLES: tl.constexpr, INTEGER: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per record and lead. L is a constant: from 5000 = 8 * 625 follow 16-byte loads."""
    program = tl.program_id(0)
    uniform = draw(seed, tl.load(step), tl.load(rows + program // LEADS), program % LEADS)
    keep = uniform < keep_probability
    sample = tl.arange(0, BLOCK)
    inside = sample < SAMPLES
    read = inside if STATISTICS else sample < tl.where(keep, SAMPLES, 0)
    start = program.to(tl.int64) * SAMPLES
    adc_per_mv = tl.load(gain + program) if INTEGER else 1.0
    zero_mv = tl.load(baseline + program) if INTEGER else 0.0
    mv = load_mv(signal + start + sample, adc_per_mv, zero_mv, read, INTEGER)
    tl.store(ecg + start + sample, tl.where(keep, mv, 0.0).to(ecg.dtype.element_ty), mask=inside)
    if STATISTICS:
        measured = SAMPLES // 16 * 16
        counted = sample < measured
        average = tl.sum(tl.where(counted, mv, 0.0)) / measured
        centred = tl.where(counted, mv - average, 0.0)
        tl.store(mean + program, average)
        tl.store(rstd + program, tl.rsqrt(tl.sum(centred * centred) / (measured - 1) + 1e-6))


# 3. Operator. It is the first of the step and has no gradient.


@torch.library.custom_op("dbeta::lead_mask", mutates_args=())
def _lead_mask(
    signal: Tensor, gain: Tensor | None, baseline: Tensor | None, step: Tensor, rows: Tensor,
    seed: int, keep_probability: float, dtype: torch.dtype, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fused ``lead_mask`` of contiguous tensors; the statistics are empty where they are not wanted."""
    ecg, mean, rstd = _allocate(signal, dtype, statistics)
    leads, samples = signal.shape[1:]
    lead_mask_kernel[(mean.numel() or len(signal) * leads,)](
        signal, gain, baseline, step, rows, ecg, mean, rstd,
        seed, keep_probability, LEADS=leads, SAMPLES=samples,
        INTEGER=not signal.is_floating_point(), STATISTICS=statistics, BLOCK=power_of_2(samples), num_warps=8,
    )  # fmt: skip
    return ecg, mean, rstd


def _allocate(signal: Tensor, dtype: torch.dtype, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = signal.shape[:2] if statistics else (0,)
    mean, rstd = (signal.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return signal.new_empty(signal.shape, dtype=dtype), mean, rstd


@_lead_mask.register_fake
def _(signal, gain, baseline, step, rows, seed, keep_probability, dtype, statistics):
    return _allocate(signal, dtype, statistics)


# 4. Public function


def lead_mask(
    signal: Tensor,
    gain: Tensor | None = None,
    baseline: Tensor | None = None,
    *,
    seed: int,
    step: int | Tensor,
    rows: Tensor,
    keep_probability: float = 0.5,
    dtype: torch.dtype = torch.float32,
    statistics: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Turn a raw batch into network input with random leads set to 0 mV (paper 4.1).

    Args:
        signal: int16 ADC values [B,C,L], or mV in any float dtype (then without gain and baseline).
        gain: float32 [B,C], ADC units per mV.
        baseline: float32 [B,C], the ADC value of 0 mV.
        seed: of the run.
        step: int, or a 0-d int64 tensor on the signal's device, which the host does not read.
        rows: int64 [B], rows of the global batch.
        keep_probability: with which each lead survives.
        dtype: of the returned ECG.
        statistics: whether mean and rstd are wanted; without them dropped leads are not read.
        backend: auto, fused or reference; ``launch.use_kernel``.

    Returns:
        ecg [B,C,L] in mV; mean and rstd, float32 [B,C], of the *unmasked* record, or None twice.

    Raises:
        ValueError: signal of another dtype or shape, gain or baseline missing or superfluous, rows of another length.
    """
    _check(signal, gain, baseline, rows, statistics)
    if not use_kernel(backend, signal, matmul=False):
        return reference(
            signal, gain, baseline, seed=seed, step=step, rows=rows,
            keep_probability=keep_probability, dtype=dtype, statistics=statistics,
        )  # fmt: skip
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=signal.device)
    gain, baseline = (None if t is None else t.float().contiguous() for t in (gain, baseline))
    ecg, mean, rstd = _lead_mask(
        signal.contiguous(), gain, baseline, step, rows.contiguous(), seed, keep_probability, dtype, statistics
    )
    return (ecg, mean, rstd) if statistics else (ecg, None, None)


def _check(signal, gain, baseline, rows, statistics) -> None:
    if signal.ndim != 3 or not (signal.is_floating_point() or signal.dtype == torch.int16):
        raise ValueError(f"signal is {signal.dtype} {list(signal.shape)}; give int16 or float [records, leads, L]")
    for name, value in (("gain", gain), ("baseline", baseline)):
        if signal.is_floating_point() != (value is None) or (value is not None and value.shape != signal.shape[:2]):
            raise ValueError(
                f"{name} is {None if value is None else list(value.shape)}: an int16 signal needs gain and baseline "
                f"{list(signal.shape[:2])}, and a float signal is already in mV and takes neither"
            )
    if rows.shape != signal.shape[:1]:
        raise ValueError(f"rows has shape {list(rows.shape)}, but the signal holds {len(signal)} records")
    if statistics and signal.shape[-1] < PATCH:
        raise ValueError(f"{signal.shape[-1]} samples hold no patch of {PATCH}: ask for statistics=False")


# 5. Registration


def _make(
    dtype, device, seed, *, records=2, leads=12, samples=5000, integer=True, offset=0, first_row=0, holes=False,
    **options,
) -> Inputs:  # fmt: skip
    """Random walks about ``offset`` ADC units, some flat; ``holes``: a tenth invalid, and one lead wholly."""
    generator = torch.Generator().manual_seed(seed)
    adc = torch.randn(records, leads, samples, generator=generator).cumsum(-1).mul(30).add(offset).clamp(-32767, 32767)
    adc[:, -1] = offset
    signal = adc.short() if integer else (adc / 1000).to(dtype)
    if holes:
        hole = torch.rand(adc.shape, generator=generator) < 0.1
        hole[:, 0] = True
        signal[hole] = INVALID if integer else float("nan")
    gain, baseline = None, None
    if integer:
        gain = torch.rand(records, leads, generator=generator).mul(800).add(200).to(device)
        baseline = torch.randint(-500, 500, (records, leads), generator=generator).float().to(device)
    rows = torch.arange(records).mul(3).add(first_row)  # a rank's rows need not be neighbours
    return {
        "signal": signal.to(device), "gain": gain, "baseline": baseline, "seed": (1 << 40) + 17, "step": 12,
        "rows": rows.to(device), "dtype": dtype,
    } | options  # fmt: skip


def _aot(signal: str, ecg: str, statistics: bool) -> AotConfig:
    integer = signal == "i16"
    pointers = {"signal": f"*{signal}", "gain": "*fp32", "baseline": "*fp32", "step": "*i64", "rows": "*i64"}
    outputs = {"ecg": f"*{ecg}", "mean": "*fp32", "rstd": "*fp32"}
    numbers = {"seed": "i64", "keep_probability": "fp32"}
    constants = {"LEADS": 12, "SAMPLES": 5000, "INTEGER": integer, "STATISTICS": statistics, "BLOCK": 8192}
    if not integer:
        del pointers["gain"], pointers["baseline"]
        constants |= {"gain": None, "baseline": None}
    return AotConfig(
        kernel="lead_mask_kernel", signature=pointers | outputs | numbers, constants=constants, num_warps=8
    )


register(
    KernelSpec(
        name="lead_mask",
        function=lead_mask,
        reference=reference,
        make=_make,
        cases={
            "paper size": {"records": 3},
            "float": {"records": 2, "integer": False, "samples": 507, "holes": True},
            "one ragged lead": {"records": 1, "leads": 1, "samples": 123},
            "invalid codes": {"records": 3, "leads": 7, "samples": 252, "holes": True},
            "large offset": {"records": 2, "samples": 507, "offset": 31000},
            "all leads masked": {"records": 2, "samples": 252, "keep_probability": 0.0},
            "all leads kept": {"records": 2, "samples": 252, "keep_probability": 1.0},
            "one patch": {"records": 2, "samples": 16},
            "far rows": {"records": 8, "leads": 13, "samples": 31, "first_row": 1 << 20, "keep_probability": 0.3},
            "empty": {"records": 0},
        },
        paper={"B=128": {"records": 128}, "B=4096": {"records": 4096}},
        cpu={"B=8": {"records": 8}},
        interpreted=(torch.float32, torch.float16, torch.bfloat16),
        ranges={"records": (1, 5), "leads": (1, 13), "samples": (16, 300)},
        mutants={
            "kept for dropped": Mutant("lead_mask_kernel", "uniform < keep", "uniform >= keep", "all leads masked"),
            "word of the first lead": Mutant("draw", "lead // 4", "lead // 64", "far rows"),
            "words swapped": Mutant("draw", "lead % 4 < 2", "lead % 4 >= 2", "far rows"),
            "local row": Mutant("lead_mask_kernel", "tl.load(rows + program // LEADS)", "program // LEADS", "far rows"),
            "invalid code read": Mutant("load_mv", "adc == -32768", "adc == 32767", "invalid codes"),
            "NaN kept": Mutant("load_mv", "tl.where(mv == mv, mv, 0.0)", "mv", "float"),
            "baseline forgotten": Mutant("load_mv", " - baseline", "", "paper size"),
            "statistics over the tail": Mutant("lead_mask_kernel", "sample < measured", "inside", "one ragged lead"),
            "mean of the input": Mutant(
                "lead_mask_kernel", "counted, mv, 0.0", "counted, mv * keep.to(tl.float32), 0.0", "all leads masked"
            ),
            "biased variance": Mutant("lead_mask_kernel", "(measured - 1)", "measured", "one patch"),
            "tail unwritten": Mutant(
                "lead_mask_kernel", ", mask=inside)", ", mask=inside & (sample < 16))", "paper size"
            ),
        },
        aot={
            "int16 to bf16": _aot("i16", "bf16", True),
            "int16 to fp32": _aot("i16", "fp32", True),
            "int16 to bf16, no statistics": _aot("i16", "bf16", False),
            "fp32 to bf16": _aot("fp32", "bf16", True),
        },
        flops=lambda inputs: 10.0 * inputs["signal"].numel(),
        bytes=lambda inputs: inputs["signal"].nbytes + inputs["signal"].numel() * inputs["dtype"].itemsize,
    )
)
