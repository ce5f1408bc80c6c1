"""Philox4x32-10, the counter-based random generator of every draw that training makes.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A draw is a pure function of
(seed, stream, step, row, index): the host computes what the device will draw one step ahead, a resumed run repeats it,
and it does not depend on how rows are spread over ranks. Written in int64 torch arithmetic (products wrap modulo 2^64,
of which both 32-bit halves are exact), so CPU and CUDA agree bit for bit; Triton's ``tl.philox`` is the same function,
and draws on a GPU: one launch instead of 120.
"""

import torch
import triton
import triton.language as tl

# What a draw is for. The stream is part of the counter, so that no two uses ever see the same numbers.
LEAD_MASK, ECG_MASK, NEGATIVE_ROWS, NEGATIVE_PICK, MLM_SELECT, MLM_REPLACE = range(6)

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
BLOCK = 128  # counters of a program


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
    if rows.is_cuda and isinstance(seed, int) and isinstance(step, int) and not torch.compiler.is_compiling():
        return launched(seed, stream, step, rows, count)
    block = torch.arange((count + 3) // 4, device=rows.device)
    drawn = philox(seed, block + torch.zeros_like(rows)[..., None], rows[..., None], step, stream)
    return torch.stack(drawn, dim=-1).flatten(-2)[..., :count]


@triton.jit(do_not_specialize=["seed", "stream", "step", "count"])
def _words_kernel(rows, out, seed, stream, step, count, BLOCK: tl.constexpr):
    """One program per row and BLOCK counters."""
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counter = block.to(tl.uint32), tl.load(rows + row).to(tl.uint32), step.to(tl.uint32), stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter[0], counter[1], counter[2], counter[3])
    place = out + row.to(tl.int64) * count + 4 * block
    tl.store(place, w0.to(tl.int64), mask=4 * block < count)
    tl.store(place + 1, w1.to(tl.int64), mask=4 * block + 1 < count)
    tl.store(place + 2, w2.to(tl.int64), mask=4 * block + 2 < count)
    tl.store(place + 3, w3.to(tl.int64), mask=4 * block + 3 < count)


def launched(seed: int, stream: int, step: int, rows: torch.Tensor, count: int) -> torch.Tensor:
    """``words`` by the kernel."""
    out = rows.new_empty(*rows.shape, count)
    if out.numel():
        grid = (rows.numel(), triton.cdiv(count, 4 * BLOCK))
        _words_kernel[grid](rows.contiguous(), out, seed, stream, step, count, BLOCK=BLOCK)
    return out


def uniform(
    seed: int | torch.Tensor, stream: int, step: int | torch.Tensor, rows: torch.Tensor, count: int
) -> torch.Tensor:
    """Float32 in [0, 1) with 24 random bits, shape [*rows.shape, count]; see ``words``."""
    return (words(seed, stream, step, rows, count) >> 8).to(torch.float32) * 2.0**-24
