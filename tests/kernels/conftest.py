"""Kernel tests: the registry in Triton's interpreter on a machine without a GPU, compiled for the GPU on one with.

The interpreter is chosen when triton is first imported and then holds for the whole process, and it would slow every
other test down: so these tests have a pytest run of their own, ``pytest tests/kernels``. In a run with others, and on a
GPU machine unless TRITON_INTERPRET=1 is set there, the interpreted tests are skipped and say so.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_configure(config):
    alone = all(HERE in (p := Path(a.split("::")[0]).resolve(), *p.parents) for a in config.args)
    if alone and "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(2)


@pytest.fixture
def interpreter():
    """Skips the test in a process where triton was imported without the interpreter."""
    from dbeta_kernels.launch import INTERPRETED

    if not INTERPRETED:
        pytest.skip("triton was imported without TRITON_INTERPRET=1; run: pytest tests/kernels")


@pytest.fixture(autouse=True)
def guarded():
    """In the interpreter, no kernel may touch memory that it was not given."""
    from dbeta_kernels.checking import guarded
    from dbeta_kernels.launch import INTERPRETED

    with guarded() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _memory_given_back():
    """Several workers share a GPU, and the paper's sizes fill a quarter of it: none keeps what it does not use."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where kernels run: interpreted on CPU tensors, or compiled on the GPU."""
    from dbeta_kernels.launch import INTERPRETED

    if request.param == "cpu":
        request.getfixturevalue("interpreter")
    elif INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing would be compiled for the GPU")
    return request.param
