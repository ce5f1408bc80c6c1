"""Several processes on PyTorch's own engine: joining, agreeing, wrapping a model, and sharded tensors as whole ones.

Every rank holds ``batch / world`` rows of the global batch. The data order, negatives, MLM and lead masks and visible
tokens depend on the global row alone, so they are those of one process with the whole batch; only dropout differs.
"""

import contextlib
import copy
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def share_of(batch: int, rank: int, world: int, parts: int = 1) -> Tensor:
    """The rows of a global batch that a rank holds: int64 [batch / world], its share of each of ``parts`` in order.

    Part p is always rows p * batch / parts and on, so what is in a micro-batch does not depend on the number of ranks.

    Raises:
        ValueError: the batch does not divide.
    """
    if batch % (world * parts):
        over = f"{world} ranks" + (f" x {parts} micro-batches" if parts > 1 else "")
        raise ValueError(f"train.batch = {batch} does not divide over {over}; use a multiple of {world * parts}")
    return torch.arange(batch).view(parts, world, -1)[:, rank].flatten()


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. Alone, nothing is communicated."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None  # through which they speak; None: that of ``join``

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def rows(self, batch: int, parts: int = 1) -> Tensor:
        """The global rows of this rank; see ``share_of``."""
        return share_of(batch, self.rank, self.world, parts)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, the same on each; not differentiable."""
        return value if self.world == 1 else _reduced(value, dist.ReduceOp.SUM, self.group) / self.world

    def any(self, flag: Tensor) -> Tensor:
        """Whether a bool is set on any rank, the same on each."""
        return flag if self.world == 1 else _reduced(flag.int(), dist.ReduceOp.MAX, self.group).bool()

    def once(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on the first rank, for all. Its error there ends all of them, so that none waits."""
        if self.world == 1:
            return work()
        outcome: list = [None, None]
        failure = None
        if self.first:
            try:
                outcome = [work(), None]
            except Exception as error:
                failure, outcome = error, [None, str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise failure or ValueError(outcome[1])
        return outcome[0]

    def apart(self, timeout_s: float) -> "Ranks":
        """The same ranks on a line of their own between hosts, for a thread that speaks while training does."""
        if self.world == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))

    def pass_on(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Start sending each tensor to the next rank; what is returned waits for those the previous one sent.

        Tensors must not change before that. All ranks start their passes in one order.
        """
        received = [torch.empty_like(tensor) for tensor in tensors]
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        operations = [dist.P2POp(dist.isend, tensor, after, self.group) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, before, self.group) for tensor in received]
        works = dist.batch_isend_irecv(operations)

        def arrived() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return arrived


ALONE = Ranks()


@torch.compiler.disable
def _reduced(value: Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup | None) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value, operation, group)
    return value


def join(device: torch.device, timeout_s: float) -> Ranks:
    """Join the process group that torchrun describes in the environment; alone without it.

    A rank that waits longer than ``timeout_s`` for the others ends with an error that names the collective.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what hosts agree on goes by gloo
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def explained(ranks: Ranks, timeout_s: float) -> Iterator[None]:
    """Turn what a collective raises when a rank has died or hangs into one line that says so.

    Raises:
        ConnectionError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        raise ConnectionError(
            f"rank {ranks.rank} of {ranks.world}: another rank has ended, or was silent for {timeout_s:g} s "
            f"(runtime.timeout_s): {text.splitlines()[0][:200]}. Checkpoints are whole; go on with --resume"
        ) from error


# --- models --------------------------------------------------------------------------------------------------------


class Wrappable(Protocol):
    """A module whose ``forward`` is the whole computation of the losses."""

    unused_parameters: bool  # whether there are some that no loss reads

    def blocks(self) -> list[nn.Module]:
        """The layers that FSDP gathers one at a time; everything else is gathered for the whole step."""


def wrap(module: Wrappable, strategy: str, ranks: Ranks) -> nn.Module:
    """``ddp``: gradients averaged while the backward pass runs. ``fsdp``: weights and moments sharded too (FSDP2)."""
    if ranks.world == 1:
        return module
    device = next(module.parameters()).device
    if strategy == "ddp":
        ddp = nn.parallel.DistributedDataParallel
        # Our buffers are constants; torch 2.13 renamed the switch.
        known = inspect.signature(ddp).parameters
        constant = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return ddp(
            module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
            find_unused_parameters=module.unused_parameters, **{constant: False},
        )  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    for block in module.blocks():
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def gradients_of(module: nn.Module, *, complete: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of a micro-batch: ranks exchange gradients only with the last one, ``complete``."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if complete else module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(complete)
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole one, which every rank has to ask for; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replica(model: nn.Module, strategy: str, ranks: Ranks) -> nn.Module | None:
    """What a single rank can run and save: the model itself or, where it is going to be sharded, the first's copy."""
    if ranks.world == 1 or strategy == "ddp":
        return model
    return copy.deepcopy(model) if ranks.first else None


def refresh(copied: nn.Module | None, model: nn.Module) -> None:
    """Bring the weights of a ``replica`` up to date; called by every rank."""
    if copied is model:
        return
    targets = {} if copied is None else copied.state_dict()
    for name, tensor in model.state_dict().items():
        value = whole(tensor)
        if copied is not None:
            targets[name].copy_(value)
