"""Finds, loads and builds the optional C++ parts (``csrc/``): the PyTorch operator and the DALI operator.

A wheel puts them beside this file; an editable install leaves them in site-packages while this file stays in the
checkout; ``python -m dbeta_kernels.extension`` builds them into the checkout's ``build/csrc``. The newest is loaded.
Nothing here is needed to train: the reference loader reads the same records.
"""

import functools
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parents[1]
BUILD = "python -m dbeta_kernels.extension"


class ExtensionError(ImportError):
    """A C++ part is absent or does not load; the message says what to run."""


def find(name: str) -> Path | None:
    """The newest ``name``.so ("dbeta_torch" or "dbeta_dali") that is installed or built, None where there is none."""
    places = [PACKAGE / f"{name}.so", CHECKOUT / "build" / "csrc" / f"{name}.so"]
    try:
        files = importlib.metadata.distribution("dbeta").files or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    places += [Path(file.locate()) for file in files if file.name == f"{name}.so"]
    return max((p for p in places if p.is_file()), key=lambda p: p.stat().st_mtime, default=None)


@functools.cache
def load_torch() -> None:
    """Make ``torch.ops.dbeta.wfdb_decode`` known.

    Raises:
        ExtensionError: it is not built, or does not load under this PyTorch.
    """
    path = _require("dbeta_torch", "torch", torch.__version__)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise _mismatch(path, "torch", torch.__version__, error) from None
    torch.library.register_fake("dbeta::wfdb_decode", _fake)


@functools.cache
def load_dali() -> None:
    """Make ``nvidia.dali.fn.wfdb_decode`` known.

    Raises:
        ExtensionError: DALI is not installed, the operator is not built, or it was built for another DALI.
    """
    try:
        version = importlib.metadata.version("nvidia-dali-cuda130")
        from nvidia.dali import plugin_manager
    except ImportError as error:
        raise ExtensionError(f"DALI cannot be imported ({error}); run: pip install 'dbeta[dali]'") from None
    path = _require("dbeta_dali", "nvidia-dali-cuda130", version)
    try:
        plugin_manager.load_library(str(path))
    except RuntimeError as error:
        raise _mismatch(path, "nvidia-dali-cuda130", version, error) from None


def wfdb_decode(data: Tensor, format: int, leads: int, samples: int, **options) -> Tensor:
    """Decode the bytes of one WFDB signal file (or of a corpus member) where they lie, CPU or GPU.

    Args:
        data: uint8 [bytes], the whole file.
        format: 8, 16, 24, 32, 61, 80, 160, 212, 310 or 311.
        leads, samples: as its header says; the file has to be exactly that long.
        options: gain float64 [leads] (1), baseline, skew, initial int32 [leads] (0), offset in bytes (0), planar
            (False: WFDB's frames; True: all samples of one lead, then the next), table float32 [up, taps] with down and
            first (``dbeta.data.resample``: resamples by up/down), start and length in output samples (the whole
            record), invalid in mV (NaN), dtype (torch.float32: mV; torch.int32 or int16: codes), record (its name).

    Returns:
        [leads, length]: mV = float32((code - baseline) / gain), or the codes with their "no sample" as the lowest value
        of the type. Samples that do not exist are ``invalid``.

    Raises:
        ValueError: names the record and, for a truncated or oversized file, the byte counts.
        ExtensionError: the operator is not built.
    """
    load_torch()
    return torch.ops.dbeta.wfdb_decode(data, format, leads, samples, **options)


def build(folder: Path | None = None, *options: str) -> None:
    """Configure and compile ``csrc/`` of this checkout for the running Python; a second run compiles what changed."""
    if not (CHECKOUT / "csrc" / "CMakeLists.txt").is_file():
        raise ExtensionError(
            f"{CHECKOUT} is not a checkout of dbeta; install from one: pip install --no-build-isolation ."
        )
    folder = folder or CHECKOUT / "build" / "csrc"
    cache = folder / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={CHECKOUT / 'csrc'}\n" not in cache.read_text():
        shutil.rmtree(folder)  # made by this checkout where it lay before, or copied: cmake would refuse it
    configure = ["cmake", "-S", CHECKOUT / "csrc", "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True)


def _require(name: str, needs: str, version: str) -> Path:
    path = find(name)
    if path is None:
        raise ExtensionError(f"{name}.so is not built for {needs} {version}; in a checkout, run: {BUILD}")
    return path


def _mismatch(path: Path, needs: str, version: str, error: Exception) -> ExtensionError:
    return ExtensionError(f"{path} does not load under {needs} {version}; in a checkout, run: {BUILD} ({error})")


def _fake(data, format, leads, samples, *, table=None, down=1, start=0, length=None, dtype=None, **_):
    if length is None:
        total = samples if table is None else -(-samples * table.shape[0] // down)
        length = max(0, total - start)
    return data.new_empty((leads, length), dtype=dtype or torch.float32)


if __name__ == "__main__":
    build()
