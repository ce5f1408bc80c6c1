"""Tensors of a checkpoint, by torch.distributed.checkpoint: each rank writes its part, any number of ranks reads.

    shard-00001.safetensors   of the first rank: model.NAME and optimizer.NAME:MOMENT
    shard-00002.safetensors   of the second

Safetensors whose headers say where in its tensor each shard lies, and not the engine's own files: those hold pickles.
What every rank has (all of it under DDP) the first one writes.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dbeta.distributed import Ranks
from dbeta.files import sync_file

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
MAX_HEADER = 1 << 22  # bytes: that of the paper's network has 447,160; parsed, one takes many times as much
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose: one process, or no need to agree


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, *, first: bool = True) -> dict[str, Tensor]:
    """Copies in host memory of what this rank is to write of weights and moments; communicates nothing.

    That is 12 bytes a parameter (4 GB for the paper's network), over the number of ranks where they are sharded.

    Args:
        first: whether this rank also writes what every rank has.
    """
    tensors = _named(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}:{key}"] = value
    mine = {name: tensor.detach() for name, tensor in tensors.items() if first or isinstance(tensor, DTensor)}
    return BlockingAsyncStager().stage(mine)


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def save(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write and sync this rank's ``snapshot``; called by every rank, and may run beside training.

    Raises:
        OSError: a rank could not write its part; all of them raise.
    """
    options = {"storage_writer": _Writer(str(folder), save_distributed=True), "process_group": ranks.group}
    with _plain_errors():
        dcp.save(dict(tensors), **options, no_dist=ranks.world == 1)


class _Writer(dcp.HuggingFaceStorageWriter):
    """The engine's format, but without its copy of all tensors in memory, and the same bytes for the same tensors."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list]:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        places = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
        if tensors:
            path = Path(self.path, f"shard-{plan.storage_data['shard_index']:05d}.safetensors")
            save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(places)})
            sync_file(path)
        written: Future[list] = Future()
        written.set_result([])
        return written


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """In place of the engine's own error, a BaseException with the traceback of every rank, what was wrong."""
    try:
        yield
    except CheckpointException as error:
        raise OSError("; ".join(str(cause) for cause, _ in error.failures.values())) from error


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors that a folder of shards holds, without their values (on the device ``meta``).

    Raises:
        ValueError: a file cannot be read, or shards do not make up whole tensors.
    """
    try:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                    raise ValueError(f"the header of {path.name} is longer than {MAX_HEADER:,} bytes")
        found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name, described in found.items():
            if not _makes_whole(described):
                raise ValueError(f"the shards of {name} overlap or leave a gap")
        return {n: torch.empty(d.size, dtype=d.properties.dtype, device="meta") for n, d in found.items()}
    except Exception as error:  # whatever the engine makes of a header that it did not write
        raise ValueError(f"{folder} cannot be read: {error}") from None


def _makes_whole(described: TensorStorageMetadata) -> bool:
    """Whether the shards lie one behind the other along the first dimension, where FSDP2 cuts."""
    if not described.size:
        return len(described.chunks) == 1
    end, (_, *rest) = 0, described.size
    for chunk in sorted(described.chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        if list(chunk.offsets) != [end, *(0 for _ in rest)] or list(chunk.sizes[1:]) != rest:
            return False
        end += chunk.sizes[0]
    return end == described.size[0]


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Restore this rank's part of weights and moments in place, whatever number of ranks wrote them.

    Raises:
        OSError: a file cannot be read.
        ValueError: a tensor is missing, extra or of another shape or type; nothing is changed then.
    """
    held, moments = stored(folder), {}
    if optimizer is None:
        held = {name: tensor for name, tensor in held.items() if name.startswith("model.")}
    wanted = _named(model)
    for name, parameter in model.named_parameters() if optimizer else ():
        keys = [f"optimizer.{name}:{key}" for key in MOMENTS]
        if not held.keys().isdisjoint(keys):  # a parameter that no loss reads has none
            step = torch.zeros((), device=parameter.device)  # where the fused kernels want it
            averages = (torch.zeros_like(parameter, requires_grad=False) for _ in MOMENTS[1:])
            moments[parameter] = dict(zip(MOMENTS, (step, *averages)))
            wanted |= zip(keys, moments[parameter].values())
    check_shapes(held, wanted, f"checkpoint {folder}")
    for name, tensor in wanted.items():
        if held[name].dtype != tensor.dtype:
            raise ValueError(f"checkpoint {folder}: {name} is {held[name].dtype}, the model has {tensor.dtype}")
    with _plain_errors():
        dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    if optimizer:
        optimizer.state.update(moments)


def check_shapes(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raise one ValueError that names every missing, extra and misshapen tensor (the first three of each)."""
    problems = []
    for what, names in (("missing", wanted.keys() - given.keys()), ("unexpected", given.keys() - wanted.keys())):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(sorted(names)[:3])}")
    misshapen = [n for n in sorted(given.keys() & wanted.keys()) if given[n].shape != wanted[n].shape]
    if misshapen:
        shapes = (f"{n} is {list(given[n].shape)}, the model has {list(wanted[n].shape)}" for n in misshapen[:3])
        problems.append(f"{len(misshapen)} of another shape: {'; '.join(shapes)}")
    if problems:
        raise ValueError(
            f"{source} does not fit the model ({'; '.join(problems)}); use the configuration it was made with"
        )
