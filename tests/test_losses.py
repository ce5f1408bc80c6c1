"""The four losses against their equations, written out pair by pair; every switch of LossConfig."""

import dataclasses
import math

import pytest
import torch

from dbeta.config import LossConfig, RuntimeConfig
from dbeta.losses import pretraining_losses
from tests.models.small import LENGTHS, SMALL, batch_of, network

ROWS = len(LENGTHS)


@pytest.fixture(scope="module")
def step():
    """Model, batch and outputs of the pass whose losses are checked."""
    model, batch = network(SMALL, RuntimeConfig()), batch_of(SMALL)
    with torch.no_grad():
        out = model(batch.ecg, batch.text_ids, batch.text_mask, noise=batch.noise, mlm_positions=batch.mlm_positions)
    return model, batch, out


def losses(step, **changes):
    with torch.no_grad():
        return pretraining_losses(step[0], step[1], LossConfig(**changes))


@pytest.mark.parametrize("rows", ["all", "matched"])
def test_mlm(step, rows):
    model, batch, out = step
    logits = model.mlm_head.vocabulary(out.mlm_hidden)
    terms, right = [], 0
    for slot, label in enumerate(batch.mlm_labels.tolist()):
        row = batch.mlm_positions[slot].item() // batch.text_ids.shape[1]
        if label != -100 and (rows == "all" or batch.aligned[row]):
            terms.append(-logits[slot].log_softmax(-1)[label].item())
            right += int(logits[slot].argmax() == label)
    found = losses(step, reconstruct_rows=rows)
    assert found.mlm.item() == pytest.approx(sum(terms) / len(terms), abs=1e-10)
    assert (found.mlm_count.item(), found.mlm_correct.item()) == (len(terms), right)


@pytest.mark.parametrize("rows", ["all", "matched"])
def test_mem(step, rows):
    _, batch, out = step
    total = count = 0
    for b in range(ROWS):
        if rows == "matched" and not batch.aligned[b]:
            continue
        for p, patch in enumerate(out.mem_patches[b].tolist()):
            target = (batch.signal[b, :, 16 * patch : 16 * patch + 16] - batch.mean[b, :, None]) * batch.rstd[
                b, :, None
            ]
            total += (out.mem_prediction[b, p] - target.flatten()).square().mean().item()
            count += 1
    assert losses(step, reconstruct_rows=rows).mem.item() == pytest.approx(total / count, abs=1e-10)


def test_etm(step):
    _, batch, out = step
    expected = correct = 0.0
    for logit, aligned in zip(out.etm_logits[:, 0].tolist(), batch.aligned.tolist()):
        p = 1 / (1 + math.exp(-logit))
        expected -= math.log(p if aligned else 1 - p) / ROWS
        correct += (logit > 0) == aligned
    found = losses(step)
    assert found.etm.item() == pytest.approx(expected, abs=1e-10)
    assert found.etm_correct.item() == correct


@pytest.mark.parametrize("same_report", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("reduction", ["batch", "mean"])
def test_ets(step, same_report, reduction):
    _, batch, out = step
    total = 0.0
    for i in range(ROWS):
        for j in range(ROWS):
            z = (out.ecg_features[i] @ out.text_features[j]).item()
            sign = (1 if batch.aligned[i] else -1) if i == j else -1
            if i != j and batch.reports[i] == batch.text_reports[j] and same_report != "negative":
                if same_report == "ignore":
                    continue
                sign = 1
            total += math.log1p(math.exp(-sign * z))
    divisor = ROWS if reduction == "batch" else ROWS**2
    found = losses(step, ets_same_report=same_report, ets_reduction=reduction)
    assert found.ets.item() == pytest.approx(total / divisor, abs=1e-10)


def test_weights_multiply_and_a_zero_is_the_ablation(step):
    found = losses(step, mlm=2.0, mem=0.5, etm=0.0, ets=3.0)
    expected = 2 * found.mlm + 0.5 * found.mem + 3 * found.ets
    assert found.total.item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_batch_without_masked_words_has_no_mlm_loss(step):
    model, batch, _ = step
    empty = dataclasses.replace(batch, mlm_labels=torch.full_like(batch.mlm_labels, -100))
    found = pretraining_losses(model, empty, LossConfig())
    assert found.mlm.item() == 0 and found.mlm_count.item() == 0
    found.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def test_bf16_autocast_stays_close():
    """Losses of the step in bf16 autocast within 3 % of float32, gradients finite and pointing the same way."""
    results = []
    for enabled in (False, True):
        model, batch = network(SMALL, RuntimeConfig()).float(), batch_of(SMALL, text_tokens=sum(LENGTHS))
        for name in ("ecg", "signal", "mean", "rstd"):
            setattr(batch, name, getattr(batch, name).float())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = pretraining_losses(model, batch, LossConfig())
        found.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((found, gradient))
    (exact, direction), (found, gradient) = results
    for name in ("mlm", "mem", "etm", "ets", "total"):
        assert getattr(found, name).dtype == torch.float32
        assert getattr(found, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.03)
    assert torch.cosine_similarity(gradient, direction, dim=0) > 0.99
