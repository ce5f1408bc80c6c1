"""Checkpoints: atomic, checksummed folders of safetensors and JSON, and nothing that can run code.

    RUN/checkpoints/step-00001000/model.safetensors      weights
                                  optimizer.safetensors  AdamW moments, one entry per parameter name
                                  state.json             step, loader state, best metric, configuration
                                  manifest.json          sha256 and size of the three, written last

A folder is written under a temporary name, synced and renamed, so one that carries its final name is whole; the
manifest shows if it was damaged afterwards. ``latest`` then falls back to the one before, and says so.
"""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dbeta.distributed import placed_like
from dbeta.distributed import whole as whole_tensor
from dbeta.files import file_digest, put_in_place, sync_file
from dbeta.runtime import warn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
STATE = {  # what a run goes on from
    "step": int, "loader": {"epoch": int, "position": int}, "best": {"score": float, "step": int},
    "counters": {"sums": dict, "counted": int, "skipped": list},
}  # fmt: skip
Snapshot = dict[str, dict[str, torch.Tensor]]  # file name -> tensors


class Writer:
    """Writes checkpoints below ``folder`` while training goes on; keeps the newest ``keep``.

    Only copying the tensors holds training up. An error of the disk is raised by the next call.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="dbeta-checkpoint")
        self.writing: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.thread.shutdown(wait=True)
        if kind is None:
            self.wait()

    def save(self, step: int, tensors: Snapshot, state: dict[str, Any]) -> None:
        """Begin to write checkpoint ``step``, once the one before is there."""
        self.wait()
        self.writing = self.thread.submit(write, self.folder, step, tensors, state, self.keep)

    def check(self) -> None:
        """Raise what went wrong with the last checkpoint, if that is known already."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.

        Raises:
            OSError: see ``write``.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, wanted: bool = True) -> Snapshot:
    """Copies of all tensors in host memory, by file name. Sharded ones become whole, so every rank has to call this.

    Whole tensors in safetensors, since one file then serves any number of ranks, either strategy, and evaluation; the
    sharded files of torch.distributed.checkpoint hold their metadata in a pickle, which nothing here reads. The first
    rank's host needs 12 bytes a parameter, 4 GB for the paper's network.

    Args:
        wanted: whether this rank keeps the copies; else it returns nothing.
    """
    moments = {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    copies: Snapshot = {}
    for file, tensors in (("model.safetensors", model.state_dict()), ("optimizer.safetensors", moments)):
        copies[file] = {}
        for name, tensor in tensors.items():
            value = whole_tensor(tensor.detach())
            if wanted:
                copies[file][name] = value.to("cpu", copy=True).contiguous()
    return copies


def write(folder: Path, step: int, tensors: Snapshot, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint ``step`` below ``folder`` and delete all but the newest ``keep``.

    Raises:
        OSError: the disk is full or not writable; the earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        for left in folder.glob(".*.partial"):  # of a run that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        for name, values in tensors.items():
            save_file(values, partial / name)
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(partial.iterdir())
        }
        (partial / "manifest.json").write_text(json.dumps(files, indent=1))
        for path in partial.iterdir():
            sync_file(path)
        sync_file(partial)
        if final.is_dir():
            _discard(final)
        put_in_place(partial, final)
        for old in [path for path in whole(folder) if path.name <= final.name][:-keep]:  # later ones are damaged
            _discard(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint at step {step} not written to {folder}: {error}; the one before it is whole. Free some space "
            "and use --resume"
        ) from error
    return final


def _discard(path: Path) -> None:
    """Delete a checkpoint, which until then carries its final name only as long as it is whole."""
    doomed = path.rename(path.with_name(f".{path.name}.discarded.partial"))
    shutil.rmtree(doomed)


def whole(folder: Path) -> list[Path]:
    """The checkpoints that carry a final name, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, None where none was written yet; a damaged one is named, with what is wrong.

    Raises:
        ValueError: there are checkpoints, and every one is damaged.
    """
    found = whole(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path} is damaged ({problem}); using the one before it")
    if found:
        raise ValueError(f"every checkpoint in {folder} is damaged: none to go on from; start anew with another --out")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text())
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, the manifest says {expected['bytes']}"
            if file_digest(path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
        missing = {"model.safetensors", "optimizer.safetensors", "state.json"} - set(files)
        return f"{', '.join(sorted(missing))} not listed in the manifest" if missing else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"manifest unreadable: {error}"


def load(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    holds: Mapping[str, Any] = STATE,
) -> dict[str, Any]:
    """Restore model and optimiser in place; returns the rest of the state, checked against ``holds``.

    Raises:
        ValueError: a tensor is missing, extra or of another shape; nothing is changed then.
    """
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors") if optimizer else {}
        state = json.loads((path / "state.json").read_text())
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    if not _fits(state, holds):
        raise ValueError(f"checkpoint {path}: its state.json does not hold {', '.join(holds)}; use another checkpoint")
    wanted = model.state_dict()
    check_shapes(weights, wanted, f"checkpoint {path}")
    model.load_state_dict({name: placed_like(weights[name], tensor) for name, tensor in wanted.items()})
    if optimizer:
        for name, parameter in model.named_parameters():
            if f"{name}:step" in moments:
                step, *averages = (moments.get(f"{name}:{key}") for key in MOMENTS)
                if any(average is None or average.shape != parameter.shape for average in averages):
                    raise ValueError(f"checkpoint {path}: the moments of {name} do not fit; use another checkpoint")
                # The fused kernel of the CPU wants its step count as loaded: float32 on the host.
                count = step if parameter.device.type == "cpu" else step.to(parameter.device)
                placed = (placed_like(value, parameter) for value in averages)
                optimizer.state[parameter] = dict(zip(MOMENTS, (count, *placed)))
    return state


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of a type or, for a mapping, holds every name with a value that fits, none below 0."""
    if isinstance(kind, Mapping):
        return isinstance(value, dict) and all(_fits(value.get(name), part) for name, part in kind.items())
    return type(value) is kind and not (kind is int and value < 0)


def check_shapes(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], source: str) -> None:
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
