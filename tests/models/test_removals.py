"""The exact removals (KERNELS section 1) and every attention back-end against the dense computation, in float64."""

import dataclasses

import pytest
import torch

from dbeta.config import LossConfig, ModelConfig, RuntimeConfig
from dbeta.losses import Losses, pretraining_losses
from dbeta.models.heads import MemHead, MlmHead
from tests.models.small import LENGTHS, SMALL, TOKENS, batch_of, network

DENSE = RuntimeConfig(removals=False, kernels="reference", attention="reference")


def losses_and_gradients(config: ModelConfig, runtime: RuntimeConfig, loss: LossConfig, **batch):
    model = network(config, runtime)
    losses = pretraining_losses(model, batch_of(config, **batch), loss)
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected) -> None:
    for field in dataclasses.fields(Losses):
        pair = getattr(found[0], field.name), getattr(expected[0], field.name)
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10, msg=field.name)
    for name, gradient in expected[1].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("text_tokens", [None, TOKENS, TOKENS + 45], ids=["grid", "packed", "packed with filler"])
@pytest.mark.parametrize("attention", ["reference", "sdpa", "sdpa-flash"])
def test_losses_and_gradients(attention, text_tokens):
    expected = losses_and_gradients(SMALL, DENSE, LossConfig())
    runtime = RuntimeConfig(removals=True, attention=attention)
    assert_same(losses_and_gradients(SMALL, runtime, LossConfig(), text_tokens=text_tokens), expected)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa-flash"])
def test_dense_back_ends(attention):
    runtime = RuntimeConfig(removals=False, attention=attention)
    expected = losses_and_gradients(SMALL, DENSE, LossConfig(), lengths=(5, 1, 30))
    assert_same(losses_and_gradients(SMALL, runtime, LossConfig(), lengths=(5, 1, 30)), expected)


@pytest.mark.parametrize(
    ("network_change", "loss_change"),
    [
        ({"mem_tap": -1}, {}),
        ({"mem_tap": 2}, {}),
        ({"mem_tap": 0, "fusion_layers": 1, "mem_layers": 1}, {}),
        ({"text_mask": False, "etm_logits": 2}, {"ets_reduction": "mean"}),
        ({}, {"reconstruct_rows": "matched", "ets_same_report": "positive", "mlm": 0.5}),
    ],
    ids=str,
)
def test_every_switch(network_change, loss_change):
    config, loss = dataclasses.replace(SMALL, **network_change), LossConfig(**loss_change)
    lengths = (9, 1, 40)
    expected = losses_and_gradients(config, DENSE, loss, lengths=lengths)
    assert_same(losses_and_gradients(config, RuntimeConfig(), loss, lengths=lengths, text_tokens=50), expected)


@pytest.mark.parametrize("weights", [{"mlm": 0.0}, {"mem": 0.0}, {"mlm": 0.0, "mem": 0.0}], ids=str)
def test_a_loss_of_weight_zero_leaves_out_its_head(weights, monkeypatch):
    """The ablations of Table 6: the rest is the dense computation's, and the head is not called."""
    loss = LossConfig(**weights)
    expected = losses_and_gradients(SMALL, DENSE, loss)
    called = []
    for name, head in (("mlm", MlmHead), ("mem", MemHead)):
        forward = head.forward
        monkeypatch.setattr(head, "forward", lambda *a, n=name, f=forward, **k: called.append(n) or f(*a, **k))
    found = losses_and_gradients(SMALL, RuntimeConfig(), loss, text_tokens=TOKENS)
    assert {"mlm", "mem"} - set(called) == set(weights)
    for name in {"total", "mlm", "mem", "etm", "ets"} - set(weights):
        torch.testing.assert_close(getattr(found[0], name), getattr(expected[0], name), rtol=0, atol=1e-10, msg=name)
    for name, gradient in expected[1].items():
        if name.partition("_head")[0] in weights:
            assert found[1][name] is None and not gradient.any(), name
        else:
            torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-10, msg=name)


def test_training_curves_agree():
    """15 float32 updates without dropout: the same losses to rounding."""
    curves = []
    for runtime, tokens in ((DENSE, None), (RuntimeConfig(), 50)):
        model, batch = network(SMALL, runtime).float(), batch_of(SMALL, lengths=(9, 1, 40), text_tokens=tokens)
        for name in ("ecg", "signal", "mean", "rstd"):
            setattr(batch, name, getattr(batch, name).float())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for _ in range(15):
            losses = pretraining_losses(model, batch, LossConfig())
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            curve.append(losses.total.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_outputs(masked):
    """All outputs that are defined in both, with and without masking; without MLM positions there is no MLM state."""
    dense, batch = network(SMALL, DENSE), batch_of(SMALL)
    arguments = {"noise": batch.noise if masked else None}
    expected = dense(batch.ecg, batch.text_ids, batch.text_mask, **arguments)
    model = network(SMALL, RuntimeConfig())
    positions = batch.mlm_positions if masked else None
    found = model(batch.ecg, batch.text_ids, batch.text_mask, mlm_positions=positions, text_tokens=TOKENS, **arguments)
    for name in ("ecg_features", "text_features", "etm_logits", "fused", "mem_prediction", "mem_patches"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-10, msg=name)
    if masked:
        torch.testing.assert_close(found.mlm_hidden, expected.mlm_hidden[positions], rtol=0, atol=1e-10)
    else:
        assert found.mlm_hidden is None and found.mem_prediction is None
    torch.testing.assert_close(model.text_features(batch.text_ids, batch.text_mask), expected.text_features)


def test_padding_is_never_attended():
    """Other ids in the padding change nothing; with the released switch they do."""
    batch = batch_of(SMALL)
    changed = torch.where(batch.text_mask, batch.text_ids, 7)
    for config, same in ((SMALL, True), (dataclasses.replace(SMALL, text_mask=False), False)):
        model = network(config, RuntimeConfig())
        with torch.no_grad():
            one = model(batch.ecg, batch.text_ids, batch.text_mask)
            two = model(batch.ecg, changed, batch.text_mask)
        assert torch.equal(one.etm_logits, two.etm_logits) == same


def test_nothing_is_computed_on_padding_or_unread_tokens(monkeypatch):
    """Rows that linear layers see under the removals: what is real, kept or masked, and no more."""
    seen = {}
    linear = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        rows = x.numel() // x.shape[-1]
        seen.setdefault(tuple(weight.shape), []).append(rows)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    batch = batch_of(SMALL, text_tokens=TOKENS)
    pretraining_losses(network(SMALL, RuntimeConfig()), batch, LossConfig())
    slots, rows, visible = len(batch.mlm_positions), len(LENGTHS), 1 + SMALL.ecg_tokens // 4
    hidden = SMALL.ecg_tokens - SMALL.ecg_tokens // 4
    assert seen[SMALL.text_ffn, SMALL.text_width] == [TOKENS] * 2 * SMALL.text_layers  # T5's wi_0 and wi_1
    assert seen[SMALL.text_vocab, SMALL.width] == [slots]
    assert seen[SMALL.leads * SMALL.patch, SMALL.mem_width] == [rows * hidden]
    assert seen[SMALL.mem_ffn, SMALL.mem_width] == [rows * (1 + SMALL.ecg_tokens), rows * hidden]
    encoder, fusion = [rows * visible] * SMALL.ecg_layers, [TOKENS, rows * visible] * (SMALL.fusion_layers - 1)
    assert seen[SMALL.fusion_ffn, SMALL.width] == encoder + fusion + [slots + rows, rows]
