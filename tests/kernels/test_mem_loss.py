"""MEM loss beside lead masking, as a step uses it: what the target is, and that nothing but masked patches counts."""

import pytest
import torch

from dbeta_kernels.lead_mask import lead_mask
from dbeta_kernels.mem_loss import mem_loss


@pytest.fixture
def batch():
    """A raw batch of two records and what lead masking makes of it with every lead dropped."""
    generator = torch.Generator().manual_seed(0)
    adc = torch.randint(-2000, 2000, (2, 12, 5000), generator=generator).short()
    adc[0, 3] = 7  # a flat lead
    gain, baseline = torch.full((2, 12), 1000.0), torch.zeros(2, 12)
    _, mean, rstd = lead_mask(adc, gain, baseline, seed=0, step=0, rows=torch.arange(2), keep_probability=0.0)
    patches = torch.stack([torch.randperm(312, generator=generator)[:9] for _ in range(2)])
    return {"signal": adc, "gain": gain, "baseline": baseline, "mean": mean, "rstd": rstd, "patches": patches}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_normalised_original_is_the_perfect_answer(batch, backend):
    mv = batch["signal"][..., :4992].double() / 1000
    target = (mv - mv.mean(-1, keepdim=True)) / (mv.var(-1, keepdim=True) + 1e-6).sqrt()
    cut = target.unflatten(-1, (312, 16)).transpose(1, 2).flatten(2)  # [2, 312, 192], lead-major
    prediction = torch.stack([c[p] for c, p in zip(cut, batch["patches"])]).float().requires_grad_()
    loss = mem_loss(prediction, **batch, backend=backend)
    assert loss < 1e-9
    offset = mem_loss(prediction + 0.5, **batch, backend=backend)
    torch.testing.assert_close(offset, torch.tensor(0.25), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(offset, prediction)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2 * 0.5 / gradient.numel()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_select_records(batch, backend):
    prediction = torch.randn(2, 9, 192)
    weighted = mem_loss(prediction, **batch, rows_weight=torch.tensor([0.0, 3.0]), backend=backend)
    alone = mem_loss(prediction[1:], **{name: value[1:] for name, value in batch.items()}, backend=backend)
    torch.testing.assert_close(weighted, alone)


def test_only_masked_patches_are_read(batch):
    prediction = torch.randn(2, 9, 192)
    before = mem_loss(prediction, **batch)
    visible = torch.ones(2, 5000, dtype=torch.bool)
    for b in range(2):
        for p in batch["patches"][b].tolist():
            visible[b, 16 * p : 16 * p + 16] = False
    batch["signal"].masked_fill_(visible[:, None], 1234)
    assert mem_loss(prediction, **batch) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 8}, "leads \\* 8"),
        ({"patches": torch.zeros(2, 8, dtype=torch.int64)}, "the prediction should be"),
        ({"rstd": None}, "mean and rstd belong together"),
        ({"gain": torch.ones(2, 11)}, "gain and baseline belong together"),
        ({"gain": None, "baseline": None}, "needs gain and baseline"),
        ({"rows_weight": torch.ones(3)}, "rows_weight has shape"),
        ({"signal": torch.zeros(2, 12, 5000, dtype=torch.int32)}, "int16 ADC values or float"),
    ],
)
def test_mistakes(batch, change, message):
    with pytest.raises(ValueError, match=message):
        mem_loss(torch.zeros(2, 9, 192), **batch | change)
