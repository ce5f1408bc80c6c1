"""Latency and throughput of ECG features from a trained model: ``encode_ecg`` and the exported encoder.

The ECG encoder has the paper's size; the report encoder, the fusion and the heads, which features do not need, are
small. ``encode_ecg`` takes float32 records on the host, as ``dbeta.read_ecg`` gives them, so its time holds the copy.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dbeta.config import ModelConfig
from dbeta.models.dbeta import DBeta
from dbeta.use.export import TOLERANCE, export
from dbeta_bench.timing import interleave

SMALL = {"text_layers": 1, "text_vocab": 128, "fusion_layers": 1, "mem_tap": 0, "mem_layers": 1}


def run(
    *,
    device: str = "cpu",
    batches: tuple[int, ...] | None = None,
    repeats: int | None = None,
    say: Callable[[str], None] = print,
    **sizes: Any,
) -> list[dict[str, Any]]:
    """Rows of median milliseconds per batch and records per second; the exported encoder is float32 on a CPU.

    Args:
        batches: records per call; None: 1, 8, 32 on a CPU, 1, 8, 64, 256 on a GPU.
        repeats: turns; None: 7 on a CPU, 20 on a GPU.
        sizes: of the network, where not the paper's.
    """
    where = torch.device(device)
    gpu = where.type == "cuda"
    torch.manual_seed(0)
    model = DBeta(ModelConfig(**(SMALL | sizes))).eval()
    encoders = {"encode_ecg": model.encode_ecg}
    if not gpu:
        with tempfile.TemporaryDirectory() as folder:
            export(model, Path(folder) / "encoder.pt2")
            encoders["torch.export"] = torch.export.load(Path(folder) / "encoder.pt2").module()
    model.to(where)
    rows = []
    for batch in batches or ((1, 8, 64, 256) if gpu else (1, 8, 32)):
        ecg = 0.3 * torch.randn(batch, model.config.leads, model.config.samples)
        calls = {name: partial(_encode, encoder, ecg) for name, encoder in encoders.items()}
        found = {name: call() for name, call in calls.items()}
        for name, features in found.items():
            error = (features - found["encode_ecg"]).abs().max().item()
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{name} differs from encode_ecg by {error:.1e}; no time is given")
        times = interleave(calls, device=where, repeats=repeats or (20 if gpu else 7), warmup=1)
        for name, taken in times.items():
            seconds = taken["median"]
            row = {"encoder": name, "dtype": "bfloat16" if gpu else "float32", "batch": batch}
            rows.append(row | {"ms": seconds * 1e3, "records_per_s": batch / seconds} | taken)
            say(f"{name:14} batch {batch:4} {seconds * 1e3:9.2f} ms {batch / seconds:9.1f} records/s")
    return rows


@torch.no_grad()
def _encode(encoder: Callable[[torch.Tensor], torch.Tensor], ecg: torch.Tensor) -> torch.Tensor:
    return encoder(ecg)
