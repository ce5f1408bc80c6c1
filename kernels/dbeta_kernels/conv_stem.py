"""The convolutional stem: kernel = stride = 2 each, a per-channel normalisation after the first, GELU after all.

MODEL section 2.1. With W channels and z_0 the ECG:

    u_1 = conv(z_0; w_1);  per record and channel over time  v_1 = gamma (u_1 - mean) / sqrt(var + eps) + beta
    z_1 = gelu(v_1);  z_l = gelu(conv(z_{l-1}; w_l)) for l = 2, 3, ...

var is biased, the GELU is x Phi(x). A trailing odd sample is dropped (625 -> 312).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def reference(
    ecg: Tensor, weights: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Convolutions and group norm (groups = channels) of PyTorch, channels first, transposed at the end."""
    z = F.conv1d(ecg, weights[0], stride=2)
    z = F.gelu(F.group_norm(z, len(norm_weight), norm_weight, norm_bias, eps))
    for weight in weights[1:]:
        z = F.gelu(F.conv1d(z, weight, stride=2))
    return z.transpose(1, 2)


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

    Args:
        ecg: [B,C,L], mV.
        weights: [W,C,2], then [W,W,2] for each further convolution.
        norm_weight, norm_bias: [W] of the group norm.
        eps: of the group norm.

    Returns:
        [B, L // 2^layers, W], channels last, in the dtype of ``ecg``.

    Raises:
        ValueError: shapes that do not fit together, or an ECG too short for one token.
    """
    _check(ecg, weights, norm_weight, norm_bias)
    return reference(ecg, weights, norm_weight, norm_bias, eps=eps)


def _check(ecg: Tensor, weights: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor) -> None:
    width = len(norm_weight)
    expected = [(width, ecg.shape[1], 2)] + [(width, width, 2)] * (len(weights) - 1)
    if not weights or [tuple(w.shape) for w in weights] != expected or norm_bias.shape != norm_weight.shape:
        raise ValueError(f"stem weights {[list(w.shape) for w in weights]} do not fit; expected {expected}")
    if ecg.shape[-1] >> len(weights) == 0:
        least = 1 << len(weights)
        raise ValueError(f"{ecg.shape[-1]} samples are too few for {len(weights)} halvings; give at least {least}")
