"""The C++ parts as they are in this checkout: what is installed when it is newer than the sources, built when not."""

import shutil

import pytest

from dbeta_kernels import extension

SOURCES = extension.CHECKOUT / "csrc"


def current(name: str) -> None:
    """Builds ``name``.so where the sources are newer; skips only where there is nothing to build it with.

    What it is for (torch, or DALI, without which its tests are skipped before) is here, so it must come of a build.
    """
    found = extension.find(name)
    if found is None or found.stat().st_mtime < max(p.stat().st_mtime for p in SOURCES.iterdir()):
        if not (shutil.which("cmake") and shutil.which("g++")):
            pytest.skip(f"{name}.so is not built and there is no cmake and g++ to build it")
        extension.build()
    assert extension.find(name), f"{name}.so was not built (see the lines of: {extension.BUILD})"


@pytest.fixture(scope="session")
def wfdb_decode():
    """The public function over a current build of the PyTorch operator."""
    current("dbeta_torch")
    extension.load_torch()
    return extension.wfdb_decode
