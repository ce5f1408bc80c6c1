"""The C++ parts as they are in this checkout: what is installed when it is newer than the sources, built when not."""

import shutil

import pytest

from dbeta_kernels import extension

SOURCES = extension.CHECKOUT / "csrc"


def current(name: str) -> None:
    """Skips where ``name``.so cannot be had; builds it where the sources are newer."""
    found = extension.find(name)
    if found is None or found.stat().st_mtime < max(p.stat().st_mtime for p in SOURCES.iterdir()):
        if not (shutil.which("cmake") and shutil.which("g++")):
            pytest.skip(f"{name}.so is not built and there is no cmake and g++ to build it")
        extension.build()
    if extension.find(name) is None:
        pytest.skip(f"{name}.so is not built here (see the lines of: {extension.BUILD})")


@pytest.fixture(scope="session")
def wfdb_decode():
    """The public function over a current build of the PyTorch operator."""
    current("dbeta_torch")
    extension.load_torch()
    return extension.wfdb_decode
