"""The map between our parameter names and the released ones, and what the importer refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbeta.config import LossConfig, ModelConfig
from dbeta.losses import pretraining_losses
from dbeta.models.dbeta import DBeta
from dbeta.models.released import config_of, from_released, import_checkpoint, to_released

WEIGHTS = "tiny_seedA_weights.safetensors"
# What the released JSON says of the fixture; its sizes come from the tensors.
SETTINGS = {
    "encoder_attention_heads": 4, "num_heads": 4, "mem_layer": 2, "mem_decoder_num_heads": 2,
    "conv_feature_layers": "[(16, 2, 2)] * 4",
}  # fmt: skip


@pytest.fixture
def released(parity):
    return load_file(parity / WEIGHTS)


def test_full_model_has_the_released_parameters(parity):
    """645 names and shapes, 321,387,330 parameters under released settings; one logit less has 1,537 fewer."""
    with torch.device("meta"):
        model, single = DBeta(ModelConfig(etm_logits=2)), DBeta(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 321_387_330
    assert sum(p.numel() for p in single.parameters()) == 321_387_330 - 1537
    listed = json.loads((parity / "state_dict_keys.json").read_text())["state_dict"]
    shapes = {name: list(tensor.shape) for name, tensor in to_released(model.state_dict()).items()}
    assert shapes == {entry["key"]: entry["shape"] for entry in listed}
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_map_goes_both_ways(released, tiny_model):
    again = to_released(tiny_model.state_dict())
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], released[name]) for name in released)


def test_pt_and_json_give_the_same_model(released, tiny_model, tmp_path):
    torch.save({"model": {**released, "ecg_encoder.mask_emb": torch.zeros(48)}}, tmp_path / "m.pt")
    (tmp_path / "m.json").write_text(json.dumps(SETTINGS))
    model = import_checkpoint(tmp_path / "m.pt", tmp_path / "m.json")
    assert model.config == tiny_model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny_model.state_dict().values()))


def test_two_logits_become_one_exactly(parity, tiny, tiny_model):
    single = import_checkpoint(parity / WEIGHTS, etm_logits=1)
    inputs = tiny["in/ecg"], tiny["in/text_ids"], tiny["in/text_attention_mask"].bool()
    with torch.no_grad():
        one, two = (
            single.double()(inputs[0].double(), *inputs[1:]),
            tiny_model.double()(inputs[0].double(), *inputs[1:]),
        )
    torch.testing.assert_close(one.etm_logits[:, 0].sigmoid(), two.etm_logits.softmax(-1)[:, 1], rtol=0, atol=1e-7)
    back = to_released(single.state_dict())["itm_head.fc.weight"]
    assert back.shape == (2, 96) and torch.equal(back[0], torch.zeros(96))


def test_mimic_lead_order_permutes_input_and_reconstruction(parity, tiny_batch, tiny_model):
    """The permuted model on canonical leads does what the plain one does on MIMIC's order."""
    order = [0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10, 11]  # I II III aVR aVF aVL V1-V6
    permuted = import_checkpoint(parity / WEIGHTS, lead_order="mimic")
    batch = tiny_batch()
    plain = pretraining_losses(permuted, batch, LossConfig())
    for name in ("ecg", "signal", "mean", "rstd"):
        setattr(batch, name, getattr(batch, name)[:, order])
    shuffled = pretraining_losses(tiny_model, batch, LossConfig())
    for name in ("mlm", "mem", "etm", "ets"):
        torch.testing.assert_close(getattr(plain, name), getattr(shuffled, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("class_embedding"), "no tensor class_embedding"),
        (lambda r: r.pop("mlm_head.bias"), "1 missing: mlm_head.bias"),
        (lambda r: r.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda r: r.update({"mlm_head.bias": torch.zeros(7)}), r"mlm_head.bias is \[7\], the model has \[200\]"),
        (
            lambda r: r.update({"language_encoder.shared.weight": torch.zeros(200, 48)}),
            "two different token embeddings",
        ),
    ],
)
def test_strict(released, tmp_path, change, message):
    change(released)
    save_file(released, tmp_path / "m.safetensors", metadata={"cfg": json.dumps(SETTINGS)})
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "m.safetensors")


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_refused_files(released, tmp_path, capsys):
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 40)
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 not an archive")
    torch.save({"model": released, "payload": Payload()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("torn.safetensors", "torn.pt", "code.pt", "list.pt", "absent.pt"):
        with pytest.raises(ValueError, match=name):
            import_checkpoint(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "stem", ["[(16, 2, 2)] * 3", "[(16, 3, 2)] * 4", "[(16, 2, 2)] * 4 + [(8, 2, 2)]", "__import__('os').getcwd()"]
)
def test_stem_that_does_not_fit(released, stem):
    with pytest.raises(ValueError, match="conv_feature_layers"):
        config_of(released, SETTINGS | {"conv_feature_layers": stem})


def test_stem_may_be_listed(released):
    listed = {**SETTINGS, "conv_feature_layers": "[(16, 2, 2)] + [(16,2,2), (16,2,2)] + [(16, 2, 2)] * 1"}
    assert config_of(released, listed) == config_of(released, SETTINGS)


def test_meta_model_keeps_no_random_weight(released):
    config = config_of(released, SETTINGS)
    with torch.device("meta"):
        model = DBeta(config)
    model.load_state_dict(from_released(released, model), assign=True)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
