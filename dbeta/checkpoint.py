"""Checkpoints: atomic, checksummed folders of safetensors and JSON, and nothing that can run code.

    RUN/checkpoints/step-00001000/shard-*.safetensors   weights and AdamW moments, a file a rank: ``shards``
                                  state.json            step, loader state, best metric, configuration
                                  manifest.json         sha256 and size of all others, written last

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
from torch import Tensor

from dbeta import shards
from dbeta.distributed import ALONE, Ranks
from dbeta.files import file_digest, put_in_place, sync_file
from dbeta.runtime import warn

MAX_JSON = 1 << 22  # bytes: a state has thousands, a manifest a hundred a rank; parsed, they take many times as much
STATE = {  # what a run goes on from
    "step": int, "loader": {"epoch": int, "position": int}, "best": {"score": float, "step": int},
    "counters": {"sums": {str: float}, "counted": int, "skipped": [int, int]},
}  # fmt: skip


class Writer:
    """Writes checkpoints below ``folder`` while training goes on; keeps the newest ``keep``.

    Only copying the tensors holds training up. An error of the disk is raised by the next call. Every rank has one and
    calls it at the same steps; ``ranks`` need messages of their own, which training's cannot overtake.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = ALONE):
        self.folder, self.keep, self.ranks = folder, keep, ranks
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="dbeta-checkpoint")
        self.writing: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.thread.shutdown(wait=True)
        if kind is None:
            self.wait()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write checkpoint ``step``, once the one before is there."""
        self.wait()
        self.writing = self.thread.submit(write, self.folder, step, tensors, state, self.keep, self.ranks)

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


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write checkpoint ``step`` below ``folder``, which all ranks share, and delete all but the newest ``keep``.

    Args:
        tensors: this rank's ``shards.snapshot``.
        state: what else to go on from; the first rank's is written.

    Raises:
        OSError: on every rank: the disk is full or not writable for one; the earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        ranks.once(lambda: _make(folder, partial))
        shards.save(tensors, partial, ranks)
        ranks.once(lambda: _complete(partial, final, tensors, {"step": step, **state}, keep))
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint at step {step} not written to {folder}: {error}; the one before it is whole. Put that right "
            "and use --resume"
        ) from error
    return final


def _make(folder: Path, partial: Path) -> None:
    for left in folder.glob(".*.partial"):  # of a run that was killed
        _remove(left)
    partial.mkdir(parents=True)


def _complete(partial: Path, final: Path, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> None:
    """Give the shards their state and manifest, the folder its name, and older checkpoints up."""
    try:
        shards.check_shapes(shards.stored(partial), tensors, "it")
    except ValueError as error:
        raise OSError(f"not every rank's part arrived; all ranks must see the same --out ({error})") from None
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(partial.iterdir())
    }
    (partial / "manifest.json").write_text(json.dumps(files, indent=1))
    for path in (partial / "state.json", partial / "manifest.json", partial):  # each rank has synced its shard
        sync_file(path)
    if final.is_dir():
        _discard(final)
    put_in_place(partial, final)
    for old in [path for path in whole(final.parent) if path.name <= final.name][:-keep]:  # later ones are damaged
        _discard(old)


def _discard(path: Path) -> None:
    """Delete a checkpoint, which until then carries its final name only as long as it is whole."""
    _remove(path.rename(path.with_name(f".{path.name}.discarded.partial")))


def _remove(path: Path) -> None:
    """Delete a folder; of a checkpoint that was moved to another disk, the link to it."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def whole(folder: Path) -> list[Path]:
    """The checkpoints that carry a final name, oldest first; others beside them (copies) are none of ours."""
    return sorted(path for path in folder.glob("step-" + 8 * "[0-9]") if path.is_dir())


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
        present = {file.name: file.is_file() for file in path.iterdir()}
        if odd := [name for name, regular in present.items() if not regular]:  # a pipe would be waited for
            return f"{min(odd)} is no file"
        files = _json(path / "manifest.json")
        if unlisted := present.keys() - {*files, "manifest.json"}:
            return f"{min(unlisted)} is not in the manifest"
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, the manifest says {expected['bytes']}"
            if file_digest(path / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
        return None if "state.json" in files else "state.json is not in the manifest"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"manifest unreadable: {error}"


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path.name} is longer than {MAX_JSON:,} bytes")
    return json.loads(path.read_text())


def load(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    holds: Mapping[str, Any] = STATE,
) -> dict[str, Any]:
    """Restore model and optimiser in place; returns the rest of the state, checked against ``holds``.

    Raises:
        ValueError: see ``shards.load``; nothing is changed then.
    """
    try:
        state = _json(path / "state.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    if not _fits(state, holds):
        raise ValueError(f"checkpoint {path}: its state.json does not hold {', '.join(holds)}; use another checkpoint")
    shards.load(path, model, optimizer)
    return state


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of a type, no count below 0, or holds what fits: every name (``str``: any), every item."""
    if isinstance(kind, list):
        return isinstance(value, list) and len(value) == len(kind) and all(map(_fits, value, kind))
    if isinstance(kind, Mapping) and str in kind:
        return isinstance(value, dict) and all(_fits(part, kind[str]) for part in value.values())
    if isinstance(kind, Mapping):
        return isinstance(value, dict) and all(_fits(value.get(name), part) for name, part in kind.items())
    return type(value) is kind and not (kind is int and value < 0)
