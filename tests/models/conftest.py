"""The parity fixtures, imported as a released checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dbeta.data.batch import Batch
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


@pytest.fixture
def tiny_batch(tiny):
    """Makes the fixture's batch in a dtype; ``normalise`` is the released norm_pix_loss."""

    def make(dtype: torch.dtype = torch.float32, *, normalise: bool = True, text_tokens: int | None = None) -> Batch:
        ecg, labels = tiny["in/ecg"].to(dtype), tiny["in/mlm_labels"].flatten()
        positions = (labels != -100).nonzero()[:, 0]
        cut = ecg[..., : 312 * 16]
        mean, rstd = cut.mean(-1), (cut.var(-1) + 1e-6).rsqrt()
        return Batch(
            records=torch.arange(3), ecg=ecg, signal=ecg, gain=None, baseline=None,
            mean=mean if normalise else None, rstd=rstd if normalise else None,
            reports=torch.arange(3), text_reports=torch.arange(3), aligned=tiny["in/is_aligned"].bool(),
            text_ids=tiny["in/text_ids"], text_mask=tiny["in/text_attention_mask"].bool(), mlm_positions=positions,
            mlm_labels=labels[positions], noise=tiny["in/noise"], text_tokens=text_tokens,
        )  # fmt: skip

    return make
