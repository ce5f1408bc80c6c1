"""Several processes on PyTorch's own engine: joining, wrapping a model, and the ETS loss round a ring.

Every rank holds ``batch / world`` rows of the global batch. The data order, negatives, MLM and lead masks and visible
tokens depend on the global row alone, so they are those of one process with the whole batch; only dropout differs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dbeta_kernels.ets_loss import ets_loss


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def rows(self, batch: int) -> Tensor:
        """The global rows of this rank, int64 [batch / world].

        Raises:
            ValueError: the batch does not divide by the number of ranks.
        """
        if batch % self.world:
            raise ValueError(
                f"train.batch = {batch} does not divide over {self.world} ranks; use a multiple of {self.world}"
            )
        share = batch // self.world
        return torch.arange(self.rank * share, (self.rank + 1) * share)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, the same on each; not differentiable."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.world
        return value

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()


def join(device: torch.device, timeout_s: float) -> Ranks:
    """Join the process group that torchrun describes in the environment; alone without it.

    A rank that waits longer than ``timeout_s`` for the others ends with an error that names the collective.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(module: nn.Module, strategy: str, ranks: Ranks, blocks: Callable[[nn.Module], list[nn.Module]]) -> nn.Module:
    """``ddp``: gradients averaged while the backward pass runs. ``fsdp``: weights and moments sharded too (FSDP2).

    Args:
        module: its ``forward`` is the whole computation of the losses.
        blocks: the layers that FSDP gathers one at a time.
    """
    if ranks.world == 1:
        return module
    if strategy == "ddp":
        device = next(module.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(module.parameters()).device.type, (ranks.world,))
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def ring_ets_loss(
    ecg: Tensor,
    text: Tensor,
    aligned: Tensor,
    *,
    ranks: Ranks,
    ecg_reports: Tensor,
    text_reports: Tensor,
    reduction: str,
    **options: Any,
) -> Tensor:
    """The ETS loss (Eq. 4) of this rank's ECGs against the texts of all ranks; memory linear in the local batch.

    Texts go round the ring: at each hop a rank scores its ECGs against the block it holds through ``ets_loss``'s block
    mode (no diagonal but its own) and adds to the gradient that travels with the block, which after ``world`` hops is
    complete and back at its owner. The mean of the returned values over ranks is the loss of the whole batch, and
    gradients averaged over ranks (DDP, FSDP) are its gradients, exactly.

    Args:
        ecg, text: float [b, D], this rank's rows.
        aligned: bool [b].
        ecg_reports, text_reports: int64 [b].
        reduction, options: as ``ets_loss``.
    """
    if ranks.world == 1:
        return ets_loss(
            ecg, text, aligned, ecg_reports=ecg_reports, text_reports=text_reports, reduction=reduction, **options
        )
    if reduction == "mean":
        options["blocks"] = ranks.world
    return _RingEts.apply(ecg, text, aligned, ecg_reports, text_reports, ranks, {"reduction": reduction, **options})


class _RingEts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ecg, text, aligned, ecg_reports, text_reports, ranks, options):
        options = dict(options)
        share = 1 / options.pop("blocks", 1)  # the mean over pairs counts the columns of every block
        total = ecg.new_zeros((), dtype=torch.promote_types(ecg.dtype, torch.float32))
        grad_ecg, grad_block = torch.zeros_like(ecg), torch.zeros_like(text)
        block, reports = text.detach().contiguous(), text_reports.contiguous()
        for hop in range(ranks.world):
            with torch.enable_grad():
                x, t = ecg.detach().requires_grad_(), block.requires_grad_()
                loss = share * ets_loss(
                    x, t, aligned, ecg_reports=ecg_reports, text_reports=reports, diagonal=hop == 0, **options
                )
                gradients = torch.autograd.grad(loss, (x, t))
            total += loss.detach()
            grad_ecg += gradients[0]
            grad_block += gradients[1]
            block, grad_block, reports = _pass_on((block.detach(), grad_block, reports), ranks)
        ctx.save_for_backward(grad_ecg, grad_block)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_ecg, grad_text = ctx.saved_tensors
        return grad * grad_ecg, grad * grad_text, None, None, None, None, None


def _pass_on(tensors: tuple[Tensor, ...], ranks: Ranks) -> list[Tensor]:
    """Send each tensor to the next rank and return what the previous one sent."""
    received = [torch.empty_like(tensor) for tensor in tensors]
    after, before = (ranks.rank + 1) % ranks.world, (ranks.rank - 1) % ranks.world
    operations = [dist.P2POp(dist.isend, tensor, after) for tensor in tensors]
    operations += [dist.P2POp(dist.irecv, tensor, before) for tensor in received]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received
