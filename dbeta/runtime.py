"""Where a run happens: device, precision, determinism, and the one place that announces a slower path."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sized
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

from dbeta.config import RuntimeConfig

T = TypeVar("T")
_announced: set[str] = set()


def announce(message: str) -> None:
    """Say once per run (of several ranks the first speaks), on standard error, which engine is used and the like."""
    if message not in _announced and os.environ.get("RANK", "0") == "0":
        _announced.add(message)
        click.echo(f"note: {message}", err=True)


def warn(message: str) -> None:
    """Say on standard error, from any rank, that something is damaged and what is done about it."""
    click.secho(f"WARNING: {message}", err=True, fg="red", bold=True)


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` to a device; under torchrun the CUDA device of the local rank.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU here; use --device cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def autocast(config: RuntimeConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """The bf16 autocast of a step; does nothing in fp32.

    Raises:
        ValueError: bf16 is asked for on a GPU without it.
    """
    capable = device.type == "cpu" or torch.cuda.is_bf16_supported()
    wanted = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and capable)
    if not wanted:
        return contextlib.nullcontext()
    if not capable:
        raise ValueError("runtime.precision=bf16: this GPU has no bf16; use --set runtime.precision=fp32")
    return torch.autocast(device.type, torch.bfloat16)


def prepare_process(config: RuntimeConfig) -> None:
    """Process-wide switches: TF32 for what stays float32, and bit-for-bit repeatability where it is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def environment() -> dict[str, object]:
    """What a run depended on, for ``environment.json`` and benchmark results."""
    names = (
        "torch",
        "triton",
        "transformers",
        "numpy",
        "nvidia-dali-cuda130",
        "faiss-cpu",
        "faiss-gpu-cu12",
        "flash-attn",
    )
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    described = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return described


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with records/s and time left, on standard error; silent where that is not a terminal."""
    with _bar(_Rate(), TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar that shows what is done, how much of it, and the time left; silent as ``progress``."""
    size = len(items) if total is None and isinstance(items, Sized) else total
    with _bar(TimeRemainingColumn(), transient=True) as bar:
        yield from bar.track(items, total=size, description=what)


def _bar(*columns: ProgressColumn, transient: bool = False) -> Progress:
    console = Console(stderr=True)
    first = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*first, *columns, console=console, disable=not console.is_terminal, transient=transient)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> str:
        return f"{task.speed or 0:,.0f}/s"
