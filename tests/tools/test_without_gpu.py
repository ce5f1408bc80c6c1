"""Compiling for a GPU that is not there: with a torch built for CUDA, in its own environment, by

python -m pytest -m slow tests/tools/test_without_gpu.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "without_gpu.py"
TINY = (
    "model.samples=640", "model.text_vocab=600", "model.ecg_layers=1", "model.text_layers=1", "model.fusion_layers=2",
    "model.mem_tap=1", "model.mem_layers=1",
)  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_named():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert done.returncode == 2 and f"torch {torch.__version__} is built without CUDA" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.parametrize("provider", ["fused + compile", "fused + compiled layers", "compiled reference"])
def test_the_step_compiles_for_an_absent_gpu(provider):
    """One graph, or one for each kind of layer, forward and backward; a second one holds all further shapes."""
    settings = [word for value in TINY for word in ("--set", value)]
    command = [sys.executable, TOOL, "--workload", "real", "--batch", "16", "--shapes", "3", "--provider", provider]
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    graphs = [int(line.split()[-4]) for line in done.stdout.splitlines() if line.startswith("text ")]
    assert graphs[0] > 0 and graphs[1] > 0 and graphs[2] == 0, done.stderr[-2000:]
    assert "0 graph breaks" in done.stdout
