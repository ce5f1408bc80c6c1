"""The ETS loss over ranks, forward and both gradients: texts round the ring against texts gathered from all ranks.

- ring: ``dbeta.ets.ring_ets_loss``, which scores a block while the next one is on its way.
- ring, waiting: the same, but nothing is on its way while a block is scored.
- all-gather: each rank gives a part of ``batch / world`` rows at a time, so that memory is linear in the local batch,
  too. A rank scores its own texts first: block mode knows a diagonal of all ECGs, and of a gathered block with its own
  texts in place only some would have one. While a part is scored the next one and the last one's gradients travel.
- all-gather whole: the same in one part, the bound; its memory is linear in the global batch.

Gradients go home by all-to-all and are summed there: gloo's reduce-scatter is an all-reduce, which sends twice as much.
Then a rank sends ``2 (world - 1)`` blocks of ``batch x width`` values (arithmetic) in all providers.
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dbeta.distributed import Ranks
from dbeta.ets import _Known, ring_ets_loss
from dbeta_bench import timing
from dbeta_kernels.ets_loss import ets_loss

WORLDS, BATCHES, WIDTH = (2, 4), (256, 2048), 768  # on GPUs the one world is all of them
TOLERANCE = 1e-10  # of losses and gradients in float64


def all_gather_ets_loss(ecg, text, aligned, *, ranks, ecg_reports, text_reports, parts=None, **options) -> Tensor:
    """As ``ring_ets_loss``, by gathers of a part of every rank's texts; ``parts``: as many as ranks."""
    parts = parts or ranks.world

    def gather(part: int):
        return [_gather(rows.chunk(parts)[part], ranks) for rows in (text.detach(), text_reports)]

    def score(block: Tensor, reports: Tensor, diagonal: bool):
        with torch.enable_grad():
            x, t = ecg.detach().requires_grad_(), block.detach().requires_grad_()
            loss = ets_loss(x, t, aligned, ecg_reports=ecg_reports, text_reports=reports, diagonal=diagonal, **options)
            if options["reduction"] == "mean":  # of pairs: the columns of every block count
                loss = loss * (len(t) / (ranks.world * len(text)))
            return loss.detach(), *torch.autograd.grad(loss, (x, t))

    coming = gather(0)
    total, grad_ecg, grad_text = score(text, text_reports, diagonal=True)
    arrived = None
    for part, home in enumerate(grad_text.chunk(parts)):
        others = [wait() for wait in coming]
        coming = gather(part + 1) if part + 1 < parts else []
        loss, d_ecg, d_others = score(*others, diagonal=False)
        total += loss
        grad_ecg += d_ecg
        sent = _send_home(d_others, home, ranks)
        if arrived:
            arrived()
        arrived = sent
    arrived()
    return _Known.apply(ecg, text, total, grad_ecg, grad_text)


def _gather(rows: Tensor, ranks: Ranks) -> Callable[[], Tensor]:
    """Start gathering; what is returned waits for the rows of all other ranks, in their order."""
    slots = rows.new_empty(ranks.world, *rows.shape)
    order = list(slots[:-1])
    order.insert(ranks.rank, slots[-1])  # this rank's own, out of the way
    work = dist.all_gather(order, rows.contiguous(), async_op=True)
    return lambda: (work.wait(), slots[:-1].flatten(0, 1))[1]


def _send_home(gradient: Tensor, home: Tensor, ranks: Ranks) -> Callable[[], Tensor]:
    """Start sending gradients of gathered rows to their ranks; what is returned adds those that come to ``home``."""
    rows = len(gradient) // (ranks.world - 1)
    sizes = [rows * (rank != ranks.rank) for rank in range(ranks.world)]
    received = torch.empty_like(gradient)
    work = dist.all_to_all_single(received, gradient, sizes, sizes, async_op=True)
    return lambda: (work.wait(), home.add_(received.unflatten(0, (-1, rows)).sum(0)))[1]


class _Waiting(Ranks):
    def pass_on(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        received = super().pass_on(*tensors)()
        return lambda: received


def waiting_ring_ets_loss(*, ranks: Ranks, **inputs) -> Tensor:
    """``ring_ets_loss`` without overlap."""
    return ring_ets_loss(ranks=_Waiting(ranks.rank, ranks.world), **inputs)


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "ring": ring_ets_loss,
    "ring, waiting": waiting_ring_ets_loss,
    "all-gather": all_gather_ets_loss,
    "all-gather whole": partial(all_gather_ets_loss, parts=1),
}


def run(*, device: str = "cpu", repeats: int = 7, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Rows of median milliseconds per world, local batch and provider; ``ratio`` is to the ring.

    On a CPU gloo processes of one thread each, in float32; on GPUs NCCL and a process for each, in bf16. Providers take
    turns. A call ends when all ranks have the mean of their losses, so its time is the slowest rank's.

    Args:
        repeats: turns at the largest batch; at a smaller one as many more as it is smaller.

    Raises:
        ArithmeticError: a provider that does not give the loss and gradients of one process with the whole batch.
    """
    gpus = torch.cuda.device_count() if torch.device(device).type == "cuda" else None
    if gpus == 1:
        say("ranks: not measured with one GPU; NCCL wants one for each process")
        return []
    rows = []
    for world in WORLDS if gpus is None else (gpus,):
        shared = (world, device, PROVIDERS, BATCHES, WIDTH, repeats)  # a spawned process has but what it is given
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, get_context("spawn")) as pool:
            jobs = [pool.submit(_member, rank, str(Path(folder, "meet")), *shared) for rank in range(world)]
            found, *_ = [job.result() for job in jobs]
        for row in found:
            rows.append(row)
            say(
                f"world {world}  batch {row['batch']:5}  {row['provider']:16} {row['ms']:9.2f} ms  {row['ratio']:5.2f}x"
                f"  (20 % under {row['low'] * 1e3:.2f} ms)  {row['peak_mb']:7.1f} MB"
            )
    return rows


def _member(rank, address, world, device, providers, batches, width, repeats) -> list[dict[str, Any]]:
    """What one process does: join, check every provider, time all of them."""
    os.environ["KINETO_LOG_LEVEL"] = "6"  # torch's profiler, which counts memory on a CPU, would speak
    torch.set_num_threads(1)
    where = torch.device(device, rank) if torch.device(device).type == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{address}", rank=rank, world_size=world)
    try:
        ranks = Ranks(rank, world)
        for name, provider in providers.items():
            _check(name, provider, ranks, where)
        turns = {batch: repeats * max(batches) // batch for batch in batches}
        return [row for batch in batches for row in _times(providers, ranks, batch, width, where, turns[batch])]
    finally:
        dist.destroy_process_group()


def _features(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A whole batch; some texts occur on several ranks."""
    generator = torch.Generator().manual_seed(0)
    ecg, text = (torch.randn(batch, width, generator=generator).tanh().to(device, dtype) for _ in range(2))
    own, shown = torch.randint(0, batch // 2, (2, batch), generator=generator).to(device)
    aligned = (torch.rand(batch, generator=generator) < 0.5).to(device)
    return {"ecg": ecg, "text": text, "aligned": aligned, "ecg_reports": own, "text_reports": shown}


def _gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """Loss and both gradients."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("ecg", "text")}
    loss = function(**inputs | leaves, **options)
    return loss.detach(), *torch.autograd.grad(loss, tuple(leaves.values()))


def _check(name: str, provider: Callable[..., Tensor], ranks: Ranks, device: torch.device) -> None:
    whole = _features(3 * ranks.world**2, 16, torch.float64, device)
    rows = ranks.rows(len(whole["ecg"])).to(device)
    mine = {key: value[rows] for key, value in whole.items()}
    for reduction, same_report in (("batch", "negative"), ("mean", "ignore"), ("batch", "positive")):
        options = {"reduction": reduction, "same_report": same_report}
        truth, *slopes = _gradients(ets_loss, whole, backend="reference", **options)
        loss, *found = _gradients(provider, mine, ranks=ranks, **options)
        pairs = [(ranks.mean(loss), truth), *((f / ranks.world, s[rows]) for f, s in zip(found, slopes))]
        error = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
        if ranks.any(~(error <= TOLERANCE)):  # also where it is NaN
            over = f"{name} over {ranks.world} ranks ({reduction})"
            raise ArithmeticError(f"{over}: off by {error:.1e}; no time is given")


def _times(providers, ranks: Ranks, batch: int, width: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = _features(batch * ranks.world, width, dtype, device)
    rows = ranks.rows(batch * ranks.world).to(device)
    mine = {key: value[rows] for key, value in whole.items()}

    def call(provider) -> None:
        loss, *_ = _gradients(provider, mine, ranks=ranks, reduction="batch")
        ranks.mean(loss).item()  # all have ended

    calls = {name: partial(call, provider) for name, provider in providers.items()}
    peaks = {name: _peak_mb(one, device) for name, one in calls.items()}
    # The host's clock on a GPU, too: ranks have to agree on how often they call.
    times = timing.interleave(calls, device=torch.device("cpu"), repeats=repeats, warmup=1)
    base = next(iter(times.values()))["median"]
    return [
        {"world": ranks.world, "batch": batch, "width": width, "dtype": str(dtype).removeprefix("torch."),
         "provider": name, "ms": taken["median"] * 1e3, "ratio": taken["median"] / base, "peak_mb": peaks[name]}
        | taken
        for name, taken in times.items()
    ]  # fmt: skip


def _peak_mb(call: Callable[[], None], device: torch.device) -> float:
    """Memory of one call beyond what is held already, as torch counts it, in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes), default=0) / 1e6
