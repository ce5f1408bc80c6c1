"""The draw of lead masking equals the Python Philox bit for bit; only seed, step, global row and lead decide it."""

import pytest
import torch

from dbeta_kernels import philox
from dbeta_kernels.lead_mask import lead_mask

ROWS = torch.tensor([1, 127, 70_000, 2**32 - 1])


def kept(backend="auto", **options):
    """Which leads survive in an ECG of ones: bool [rows, 12]."""
    options = {"seed": 1, "step": 0, "rows": ROWS} | options
    ecg, _, _ = lead_mask(torch.ones(len(options["rows"]), 12, 16), backend=backend, **options)
    assert torch.equal(ecg[..., :1].expand_as(ecg), ecg)  # whole leads only
    return ecg[..., 0] == 1


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (1, 0), (2**40 + 7, 300_000), (2**63 - 1, 2**32 - 1)])
def test_draw_is_philox(seed, step):
    uniform = philox.uniform(seed, philox.LEAD_MASK, step, ROWS, 12)
    assert torch.equal(kept(seed=seed, step=step), uniform < 0.5)
    drawn = float(uniform[2, 7])  # a probability that is itself a drawn value: that lead has to be dropped
    assert torch.equal(kept(seed=seed, step=torch.tensor(step), keep_probability=drawn), uniform < drawn)


def test_half_survive():
    rows = torch.arange(512)
    share = kept("reference", rows=rows).float().mean()
    assert abs(share - 0.5) < 4 * (0.25 / (512 * 12)) ** 0.5


def test_rows_do_not_depend_on_the_rank():
    whole = kept(rows=torch.arange(4), step=3)
    assert torch.equal(torch.cat([kept(rows=torch.arange(first, first + 2), step=3) for first in (0, 2)]), whole)


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_statistics(backend, keep):
    signal = torch.randn(2, 12, 100)
    options = {"seed": 1, "step": 2, "rows": torch.arange(2), "keep_probability": keep, "backend": backend}
    ecg, mean, rstd = lead_mask(signal, statistics=False, **options)
    assert mean is None and rstd is None
    assert torch.equal(ecg, lead_mask(signal, **options)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal": torch.zeros(2, 12, 100, dtype=torch.int32)}, "int16 or float"),
        ({"gain": None}, "gain is None"),
        ({"baseline": torch.zeros(2, 11)}, "baseline is"),
        ({"signal": torch.zeros(2, 12, 100)}, "already in mV"),
        ({"rows": torch.arange(3)}, "rows has shape"),
        ({"signal": torch.zeros(2, 12, 15, dtype=torch.int16)}, "no patch"),
        ({"backend": "cuda"}, "accepted are auto"),
    ],
)
def test_mistakes(change, message):
    arguments = {
        "signal": torch.zeros(2, 12, 100, dtype=torch.int16), "gain": torch.ones(2, 12), "baseline": torch.zeros(2, 12),
        "seed": 0, "step": 0, "rows": torch.arange(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lead_mask(**arguments | change)
