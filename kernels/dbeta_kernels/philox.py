"""Philox4x32-10, the counter-based random generator of every draw that training makes.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of
(seed, stream, step, row, index): the host computes what the device will draw one step ahead, a resumed run repeats it,
and it does not depend on how rows are spread over ranks. Written in int64 torch arithmetic (products wrap modulo 2^64,
of which both 32-bit halves are exact), so CPU and CUDA agree bit for bit; Triton's ``tl.philox`` is the same function.
"""

import torch

# What a draw is for. The stream is part of the counter, so that no two uses ever see the same numbers.
LEAD_MASK, ECG_MASK, NEGATIVE_ROWS, NEGATIVE_PICK, MLM_SELECT, MLM_REPLACE = range(6)

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox(seed: int | torch.Tensor, c0: torch.Tensor, c1, c2, c3) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words for each counter (c0, c1, c2, c3) under a 64-bit seed.

    Args:
        seed: key; its low and high 32 bits are the two key words.
        c0, c1, c2, c3: int64 tensors or ints that broadcast together, each taken modulo 2^32.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = (c & _MASK for c in (c0, c1, c2, c3))
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words(
    seed: int | torch.Tensor, stream: int, step: int | torch.Tensor, rows: torch.Tensor, count: int
) -> torch.Tensor:
    """``count`` words per row, int64 in [0, 2^32), shape [*rows.shape, count].

    Counter layout: (index // 4, row, step, stream); word ``index % 4`` of the four.
    """
    block = torch.arange((count + 3) // 4, device=rows.device)
    drawn = philox(seed, block + torch.zeros_like(rows)[..., None], rows[..., None], step, stream)
    return torch.stack(drawn, dim=-1).flatten(-2)[..., :count]


def uniform(
    seed: int | torch.Tensor, stream: int, step: int | torch.Tensor, rows: torch.Tensor, count: int
) -> torch.Tensor:
    """Float32 in [0, 1) with 24 random bits, shape [*rows.shape, count]; see ``words``."""
    return (words(seed, stream, step, rows, count) >> 8).to(torch.float32) * 2.0**-24
