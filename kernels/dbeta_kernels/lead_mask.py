"""Random lead masking and ingest: integer samples to millivolts, whole leads dropped, statistics for the MEM target.

Paper 4.1 (each lead survives with probability p); MODEL sections 8 and 11. For record b, lead c, sample l:

    mv[b,c,l]  = (adc[b,c,l] - baseline[b,c]) / gain[b,c],  0 where adc is the invalid code -32768
    ecg[b,c,l] = keep[b,c] * mv[b,c,l],  keep[b,c] = (u[b,c] < p)
    mean[b,c], rstd[b,c] = mean and (var + 1e-6)^-1/2 of mv over the first 16 * (L // 16) samples, var with n - 1

u is the Philox draw (seed, LEAD_MASK, step, global row, lead), so it depends on nothing else. A float signal is taken
as millivolts, with NaN read as 0. The statistics are of the unmasked record: MEM reconstructs dropped leads.
"""

import torch
from torch import Tensor

from . import philox

PATCH = 16  # samples of one ECG token (MODEL section 1)
EPS = 1e-6
INVALID = -32768


def millivolts(signal: Tensor, gain: Tensor | None, baseline: Tensor | None) -> Tensor:
    """The whole signal in mV, float32 (float64 where the inputs are): invalid codes and NaN become 0."""
    if signal.is_floating_point():
        signal = signal if signal.dtype == torch.float64 else signal.float()
        return torch.where(signal.isnan(), 0.0, signal)
    mv = (signal - baseline[..., None]) / gain[..., None]
    return torch.where(signal == INVALID, 0.0, mv)


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
    return ecg, measured.mean(-1), (measured.var(-1) + EPS).rsqrt()


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
        step: int, or a 0-d int64 tensor on the signal's device, which is not read by the host.
        rows: int64 [B], rows of the global batch.
        keep_probability: with which each lead survives.
        dtype: of the returned ECG.
        statistics: whether mean and rstd are wanted; without them dropped leads are not read.

    Returns:
        ecg [B,C,L] in mV; mean and rstd, float32 [B,C], of the *unmasked* record, or None twice.

    Raises:
        ValueError: signal of another dtype or shape, gain or baseline missing or superfluous, rows of another length.
    """
    _check(signal, gain, baseline, rows)
    return reference(
        signal, gain, baseline, seed=seed, step=step, rows=rows,
        keep_probability=keep_probability, dtype=dtype, statistics=statistics,
    )  # fmt: skip


def _check(signal: Tensor, gain: Tensor | None, baseline: Tensor | None, rows: Tensor) -> None:
    if signal.ndim != 3 or not (signal.is_floating_point() or signal.dtype == torch.int16):
        raise ValueError(f"signal is {signal.dtype} {list(signal.shape)}; give int16 or float [records, leads, L]")
    if signal.is_floating_point() != (gain is None) or (gain is None) != (baseline is None):
        raise ValueError("gain and baseline belong to an int16 signal, both of them; a float signal is already in mV")
    if rows.shape != signal.shape[:1]:
        raise ValueError(f"rows has shape {list(rows.shape)}, but the signal holds {len(signal)} records")
