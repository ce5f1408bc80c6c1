"""A run's folder: made once, and gone on with only by the same run."""

import json
from pathlib import Path
from typing import Any

from dbeta import checkpoint
from dbeta.config import Config
from dbeta.files import write_whole
from dbeta.runtime import environment

# A run can be resumed with other values of these; any other change would make it a different run.
RESUMABLE = {
    "train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
    "data.on_corrupt",
}  # fmt: skip


def open_run(out: Path, config: Config, resume: bool) -> Path | None:
    """Make or check the run folder; the checkpoint to go on from, if any.

    Raises:
        ValueError: it holds another run, none, or only damaged checkpoints.
    """
    folder = out / "checkpoints"
    if not resume:
        if folder.is_dir() and checkpoint.whole(folder):
            raise ValueError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(out / "environment.json", json.dumps(environment(), indent=2))
            write_whole(out / "config.json", config.to_json())  # last: it makes the folder a run
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from None
        return None
    stored = out / "config.json"
    if not stored.is_file():
        raise ValueError(f"--resume: {out} holds no run (no config.json); leave --resume out to start one")
    changed = _differences(json.loads(stored.read_text()), config.to_dict())
    if changed:
        raise ValueError(f"--resume: {out} was started with another {', '.join(changed)}; use the same values")
    return checkpoint.latest(folder)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose change would make a resumed run a different one."""
    sections = ("data", "model", "loss", "optim", "train")
    keys = [f"{section}.{key}" for section in sections for key in new[section]]
    return [k for k in keys if k not in RESUMABLE and _get(old, k) != _get(new, k)]


def _get(values: dict[str, Any], dotted: str) -> Any:
    section, key = dotted.split(".")
    return values.get(section, {}).get(key)
