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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dbeta.files import file_digest, put_in_place, sync_file
from dbeta.runtime import announce

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write checkpoint ``step`` below ``folder`` and delete all but the newest ``keep``.

    Raises:
        OSError: the disk is full or not writable; the earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(_tensors(model.state_dict()), partial / "model.safetensors")
        save_file(_moments(model, optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(partial.iterdir())
        }
        (partial / "manifest.json").write_text(json.dumps(files, indent=1))
        for path in partial.iterdir():
            sync_file(path)
        shutil.rmtree(final, ignore_errors=True)
        put_in_place(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint at step {step} not written to {folder}: {error}; free some space and use --resume"
        ) from error
    for old in whole(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def whole(folder: Path) -> list[Path]:
    """The checkpoints that carry a final name, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint; a damaged one is named, with what is wrong, and the one before it is used."""
    for path in reversed(whole(folder)):
        problem = damage(path)
        if problem is None:
            return path
        announce(f"checkpoint {path} is damaged ({problem}); using the one before it")
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"manifest unreadable: {error}"


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Restore model and optimiser in place; returns the rest of the state.

    Raises:
        ValueError: a tensor is missing, extra or of another shape; nothing is changed then.
    """
    device = next(model.parameters()).device
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors") if optimizer else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    check_shapes(weights, model.state_dict(), f"checkpoint {path}")
    model.load_state_dict(weights)
    if optimizer:
        for name, parameter in model.named_parameters():
            if f"{name}:step" in moments:
                optimizer.state[parameter] = {key: moments[f"{name}:{key}"].to(device) for key in MOMENTS}
                if device.type == "cpu":  # the fused CPU kernel wants its step count as loaded: float32 on the host
                    optimizer.state[parameter]["step"] = moments[f"{name}:step"]
    return json.loads((path / "state.json").read_text())


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


def _tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    entries = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            entries[f"{name}:{key}"] = value.detach().contiguous().cpu()
    return entries
