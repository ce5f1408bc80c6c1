"""What the device can do, measured in the run that judges by it: bytes copied and matrix products per second."""

from dataclasses import dataclass
from functools import partial

import torch

from dbeta_bench.timing import interleave

DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}


@dataclass(frozen=True)
class Roofline:
    """Ceilings of one device: bytes per second read plus written, FLOP per second by dtype."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The least time of work of ``flops`` and ``moved`` bytes: the slower of both ceilings."""
        return max(flops / self.flops_per_s[dtype], moved / self.bytes_per_s)


def measure(device: torch.device, repeats: int = 10) -> Roofline:
    """Copy and square matrix product, 1 GiB and 8192 on a GPU, 256 MiB and 1024 on a CPU."""
    gpu = device.type == "cuda"
    source = torch.randn((1 << 30 if gpu else 1 << 28) // 4, device=device)  # zeros may be moved faster
    copied = interleave({"copy": partial(torch.empty_like(source).copy_, source)}, device=device, repeats=repeats)
    moved = 2.0 * source.nbytes
    flops = {}
    size = 8192 if gpu else 1024
    for dtype in DTYPES[device.type]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        taken = interleave({"gemm": partial(torch.mm, a, b)}, device=device, repeats=repeats)["gemm"]
        flops[dtype] = 2.0 * size**3 / taken["median"]
    return Roofline(moved / copied["copy"]["median"], flops)
