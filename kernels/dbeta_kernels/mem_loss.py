"""Masked ECG modelling: mean squared error on the masked patches, against a target normalised on the fly.

Paper eq. 2; MODEL section 8. Patch t of a record is its samples 16t .. 16t+15 of all leads, ordered lead * 16 + sample:

    target[b,p,:] = (mv[b, c, 16 patches[b,p] + s] - mean[b,c]) * rstd[b,c]        (mv itself without mean and rstd)
    loss = sum_b w_b sum_p mean_192 (prediction[b,p,:] - target[b,p,:])^2 / (P sum_b w_b)

mv is read as in ``lead_mask`` (gain, baseline, invalid code and NaN as 0 mV). The loss of nothing (B = 0, P = 0, or
all weights 0) is 0.
"""

import torch
from torch import Tensor

from .lead_mask import PATCH, millivolts


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
    """``mem_loss`` in plain PyTorch; computes in float32, or in float64 where the prediction is."""
    mv = millivolts(signal, gain, baseline)
    if mean is not None:
        mv = (mv - mean[..., None]) * rstd[..., None]
    leads, samples = mv.shape[1:]
    tokens = mv[..., : samples // patch * patch].unflatten(-1, (-1, patch)).transpose(1, 2).flatten(2)  # [B,T,C*S]
    target = tokens.gather(1, patches[..., None].expand(-1, -1, leads * patch))
    error = (prediction.to(mv.dtype) - target).square().sum((1, 2))
    weight = torch.ones_like(error) if rows_weight is None else rows_weight.to(error.dtype)
    count = weight.sum() * (prediction.shape[1] * leads * patch)
    return (weight * error).sum() / torch.where(count == 0, 1.0, count)


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
        prediction: [B,P,C*patch], the decoder's output at the masked patches.
        signal: int16 ADC values or mV [B,C,L], the record before lead masking.
        patches: int64 [B,P], index of each patch, 0 <= index < L // patch.
        mean, rstd: float32 [B,C] of ``lead_mask``; without them the target is in mV.
        gain, baseline: float32 [B,C], with an int16 signal.
        rows_weight: float [B], weight of each record; None weighs all alike.
        patch: samples per patch.

    Returns:
        The scalar loss, float32 (float64 for a float64 prediction).

    Raises:
        ValueError: shapes that do not fit together, or one of two arguments that belong together.
    """
    _check(prediction, signal, patches, mean, rstd, gain, baseline, patch)
    return reference(
        prediction, signal, patches, mean, rstd, gain=gain, baseline=baseline, rows_weight=rows_weight, patch=patch
    )


def _check(prediction, signal, patches, mean, rstd, gain, baseline, patch) -> None:
    expected = [len(signal), patches.shape[-1], signal.shape[1] * patch]
    if list(prediction.shape) != expected or len(patches) != len(signal):
        raise ValueError(
            f"prediction {list(prediction.shape)}, signal {list(signal.shape)} and patches {list(patches.shape)} do "
            f"not fit: the prediction should be {expected} = [records, patches, leads * {patch}]"
        )
    if (mean is None) != (rstd is None):
        raise ValueError("mean and rstd belong together: give both, or neither for a target in mV")
    if signal.is_floating_point() != (gain is None) or (gain is None) != (baseline is None):
        raise ValueError("gain and baseline belong to an int16 signal, both of them; a float signal is already in mV")
