"""Our T5 encoder against transformers' and against a recorded one whose heads do not fill the width."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dbeta.config import ModelConfig
from dbeta.models.attention import Rows
from dbeta.models.text_encoder import T5Encoder


def ours(described: dict) -> T5Encoder:
    config = ModelConfig(
        text_vocab=described["vocab_size"], text_width=described["d_model"], text_layers=described["num_layers"],
        text_heads=described["num_heads"], text_head_width=described["d_kv"], text_ffn=described["d_ff"],
        text_activation=described["feed_forward_proj"], text_buckets=described["relative_attention_num_buckets"],
        text_max_distance=described["relative_attention_max_distance"],
    )  # fmt: skip
    return T5Encoder(config).eval()


def test_recorded_small_encoder(parity):
    """Heads x width = 24 in a model of width 32; the mean embeddings of N3S too."""
    path = parity / "t5small_like_weights.safetensors"
    with safe_open(path, "pt") as file:
        encoder = ours(json.loads(file.metadata()["t5"]))
    weights = {n.removeprefix("encoder."): t for n, t in load_file(path).items() if n.startswith("encoder.")}
    encoder.load_state_dict(weights)
    with np.load(parity / "t5small_like.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file.files}
    mask = recorded["attention_mask"].bool()
    with torch.no_grad():
        states = encoder(recorded["ids"], Rows(mask))
        alone = [
            encoder(row[None, : m.sum()], Rows(m[None, : m.sum()])).mean(1) for row, m in zip(recorded["ids"], mask)
        ]
    torch.testing.assert_close(states, recorded["last_hidden_with_mask"], rtol=0, atol=5e-5)
    whole = recorded["batch_embedding_mean_over_all_positions_incl_pad"]
    torch.testing.assert_close(states.mean(1), whole, rtol=0, atol=5e-5)
    torch.testing.assert_close(torch.cat(alone), recorded["single_embedding_unpadded"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["gated-gelu", "relu", "gated-silu"])
def test_agrees_with_transformers(kind):
    """Outputs and gradients in float32, padded; packed rows give the same."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    described = T5Config(
        d_model=48, d_kv=8, d_ff=64, num_layers=3, num_heads=5, vocab_size=99, feed_forward_proj=kind, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=40,
    )  # fmt: skip
    theirs = T5EncoderModel(described).eval()
    encoder = ours(described.to_dict())
    state = {n.removeprefix("encoder."): t for n, t in theirs.state_dict().items() if n.startswith("encoder.")}
    encoder.load_state_dict({"embed_tokens.weight": theirs.shared.weight, **state})
    lengths = torch.tensor([70, 1, 33])
    mask = torch.arange(70) < lengths[:, None]
    ids = torch.randint(1, 99, mask.shape) * mask
    expected = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    wanted = {name: p.grad for name, p in theirs.encoder.named_parameters()}
    wanted["embed_tokens.weight"] = theirs.shared.weight.grad
    for rows in (Rows(mask), Rows.packed(mask, 104), Rows.packed(mask, 120)):
        encoder.zero_grad()
        found = encoder(ids, rows)
        found = found[mask] if rows.index is None else found[:104]
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
        (found * weight).sum().backward()
        for name, parameter in encoder.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=5e-4, msg=name)


def test_random_initialisation_follows_transformers():
    torch.manual_seed(0)
    config = ModelConfig(text_vocab=500, text_width=128, text_layers=1, text_heads=4, text_head_width=16, text_ffn=256)
    encoder = T5Encoder(config)
    encoder.reset_parameters()
    attention = encoder.block[0].layer[0]["SelfAttention"]
    expected = {
        attention.q: (128 * 16) ** -0.5,
        attention.k: 128**-0.5,
        attention.o: (4 * 16) ** -0.5,
        encoder.block[0].layer[1]["DenseReluDense"].wo: 256**-0.5,
        encoder.embed_tokens: 1.0,
    }
    for module, deviation in expected.items():
        assert module.weight.std().item() == pytest.approx(deviation, rel=0.05)
