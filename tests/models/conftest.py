"""The parity fixtures, imported as a released checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dbeta.models.released import import_checkpoint


@pytest.fixture(scope="session")
def parity(shared) -> Path:
    return shared / "parity"


@pytest.fixture(scope="session")
def tiny(parity):
    """``tiny_seedA.npz`` as a dictionary of tensors."""
    with np.load(parity / "tiny_seedA.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind != "U"}


@pytest.fixture
def tiny_model(parity):
    """The fixture network in float32 and eval mode, a fresh copy."""
    return import_checkpoint(parity / "tiny_seedA_weights.safetensors")
