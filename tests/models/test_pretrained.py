"""Saving, loading and using a model; initialisation; strictness."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbeta import DBeta
from dbeta.config import ModelConfig, RuntimeConfig
from dbeta.data.tokenizer import train
from dbeta.models.pretrained import load_text_weights
from tests.models.small import SMALL

TEXTS = ["sinus rhythm normal ecg", "atrial fibrillation", "left bundle branch block"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DBeta(SMALL, tokenizer=train(TEXTS, 90)).eval()


@pytest.fixture
def ecg():
    return torch.randn(2, SMALL.leads, SMALL.samples, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def test_round_trip(model, saved, ecg):
    for source in (saved, saved.parent, str(saved)):  # a model folder, a run folder
        again = DBeta.from_pretrained(source)
        assert again.config == model.config and not again.training
        assert torch.equal(again.encode_ecg(ecg), model.encode_ecg(ecg))
        assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert not list(saved.glob(".*")), "temporary files are left"
    assert again.runtime == RuntimeConfig() and all(p.requires_grad for p in again.parameters())


def test_use(model, ecg):
    scores = model.train().zero_shot(ecg, {"AFIB": TEXTS[1], "LBBB": TEXTS[2]})
    assert model.training, "the mode is restored"
    model.eval()
    expected = model.ecg_features(ecg) @ model.encode_text(TEXTS[1:]).T
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad and scores.shape == (2, 2)
    alone = torch.cat([model.encode_text([text]) for text in TEXTS])  # the neighbours' lengths do not matter
    torch.testing.assert_close(model.encode_text(TEXTS), alone)
    torch.testing.assert_close(model.encode_text(["Atrial  FIBRILLATION."]), alone[1:2])


@pytest.mark.parametrize("shape", [(12, 640), (1, 640, 12), (1, 12, 5000)])
def test_wrong_ecg(model, shape):
    with pytest.raises(ValueError, match=r"give float \[B, 12, 640\] in mV at 500 Hz"):
        model.encode_ecg(torch.zeros(shape))


def test_wrong_text(model):
    for texts in ("atrial fibrillation", []):
        with pytest.raises(ValueError, match="a list of at least one text"):
            model.encode_text(texts)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        model.encode_text(TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("etm_head.bias"), "1 missing: etm_head.bias"),
        (lambda w: w.update(more=torch.zeros(1)), "1 unexpected: more"),
        (lambda w: w.update({"etm_head.bias": torch.zeros(2)}), r"etm_head.bias is \[2\], the model has \[1\]"),
    ],
)
def test_strict(saved, change, message):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        DBeta.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99"),
        ({"format": "other"}, "not that of a dbeta model"),
        ({"model": {"widht": 3}}, "did you mean model.width"),
        (
            {"model": dataclasses.asdict(SMALL) | {"ecg_heads": 5}},
            "model.width = 32 is not a multiple of",
        ),
        ({"model": dataclasses.asdict(SMALL) | {"mem_tap": 3}}, "model.mem_tap = 3; accepted: 0 to 2"),
    ],
)
def test_refused_configuration(saved, change, message):
    described = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match=message):
        DBeta.from_pretrained(saved)


def test_nothing_there(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="holds no model"):
        DBeta.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor on the hub"):
        DBeta.from_pretrained(tmp_path / "absent")
    (saved / "model.safetensors").write_bytes(b"torn\0")
    with pytest.raises(ValueError, match="cannot be read"):
        DBeta.from_pretrained(saved)


def test_pretrained_text_weights(model, tmp_path):
    """A folder as transformers writes it fills the text encoder and nothing else."""
    from transformers import T5Config, T5EncoderModel

    described = T5Config(
        d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, vocab_size=90, feed_forward_proj="gated-gelu"
    )
    theirs = T5EncoderModel(described)
    theirs.save_pretrained(tmp_path / "t5")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_text_weights(model, str(tmp_path / "t5"))
    assert torch.equal(model.text_encoder.embed_tokens.weight, theirs.shared.weight)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"text_encoder.{n}" for n in model.text_encoder.state_dict() if "norm" not in n}
    load_text_weights(model, "random")
    with pytest.raises(ValueError, match=r"text_weights is not set; use --set model\.text_weights=DIR"):
        load_text_weights(model, "")
    with pytest.raises(ValueError, match="of another shape"):
        load_text_weights(DBeta(dataclasses.replace(SMALL, text_ffn=44)), str(tmp_path / "t5"))


def test_another_text_encoder(tmp_path, ecg):
    """The ablation of Table 7: any encoder of transformers; the model folder describes it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    described = BertConfig(
        vocab_size=90, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(described).save_pretrained(tmp_path / "bert")
    config = dataclasses.replace(SMALL, text_encoder=str(tmp_path / "bert"))
    model = DBeta(config, tokenizer=train(TEXTS, 90)).eval()
    load_text_weights(model, str(tmp_path / "bert"))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "bert").rename(tmp_path / "gone")
    again = DBeta.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    alone = torch.cat([model.encode_text([text]) for text in TEXTS])
    torch.testing.assert_close(model.encode_text(TEXTS), alone)
    with pytest.raises(ValueError, match=r"use --set model\.text_width=24"):
        DBeta(dataclasses.replace(config, text_encoder=str(tmp_path / "gone"), text_width=32))


def test_initialisation():
    """MODEL section 9; its 0.02 at width 768 is 0.04 at a quarter of the width."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        ModelConfig(), width=192, ecg_heads=3, fusion_heads=3, ecg_layers=1, fusion_layers=1, mem_tap=0, text_layers=1,
        text_vocab=1000, text_width=192, text_heads=3, stem_width=128, ecg_ffn=384, fusion_ffn=384, text_ffn=128,
    )  # fmt: skip
    model = DBeta(config)
    ecg, mem = model.ecg_encoder, model.mem_head
    deviations = {
        ecg.stem.convs[0].weight: math.sqrt(2 / 24),
        ecg.stem.convs[1].weight: math.sqrt(2 / 256),
        ecg.input_projection.weight: 1 / math.sqrt(3 * 128),  # uniform within 1 / sqrt(fan in)
        ecg.positional.direction: math.sqrt(4 / (128 * 192)),
        ecg.cls: 1 / math.sqrt(12),
        ecg.layers[0].attention.qkv.weight: 0.04,
        ecg.layers[0].ffn_in.weight: 0.04,
        model.fusion.modality.weight: 0.04,
        model.fusion.text_layers[0].cross_attention.output.weight: 0.04,
        model.fused_text_pooler.dense.weight: 0.04,
        model.mlm_head.vocabulary.weight: 0.04,
        model.etm_head.weight: 0.04,
        mem.mask_token: 0.04,
        mem.output.weight: 0.04,
        mem.blocks[0].ffn_in.weight: 0.04,
        mem.blocks[0].attention.output.weight: 0.04,
        mem.blocks[0].attention.qkv.weight: math.sqrt(2 / (384 + 3 * 384)),
    }
    for parameter, deviation in deviations.items():
        assert parameter.std().item() == pytest.approx(deviation, rel=0.2 if parameter.numel() < 800 else 0.03)
    assert ecg.cls.min() >= 0 and ecg.cls.max() < 1
    folded = ecg.positional.direction * (ecg.positional.gain / ecg.positional.direction.norm(dim=(0, 1)))
    torch.testing.assert_close(folded, ecg.positional.direction)  # the gain starts as the norm
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "input_projection" not in name and "norm" not in name and "relative" not in name:
            assert not parameter.any(), name
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
