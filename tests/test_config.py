"""Configuration: presets load, overrides are typed, and a mistake names the key and the nearest valid one."""

import dataclasses
import json

import pytest

from dbeta.config import PRESETS, Config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = Config.load(name)
    assert Config.from_dict(json.loads(config.to_json())) == config


def test_paper_values():
    config = Config.load("paper")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2, config.optim.eps) == (5e-5, 0.9, 0.98, 1e-6)
    assert (config.train.steps, config.train.batch, config.optim.weight_decay) == (300_000, 128, 0.01)
    assert (config.model.etm_logits, config.loss.ets_reduction, config.loss.mem_target) == (1, "batch", "original")


def test_released_reads_the_release():
    config = Config.load("released")
    assert (config.model.etm_logits, config.loss.ets_reduction, config.loss.mem_target) == (2, "mean", "input")
    assert config.model.text_mask is False


def test_overrides_are_typed():
    config = Config.load("smoke", ["train.steps=1_000", "optim.lr=1e-4", "model.etm_logits=2", "runtime.compile=true"])
    assert (config.train.steps, config.optim.lr, config.model.etm_logits) == (1000, 1e-4, 2)
    assert config.runtime.compile is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "did you mean train.steps"),
        ("train.steps=many", "train.steps = 'many' is not of type int"),
        ("trian.steps=3", "unknown configuration key trian; did you mean train"),
        ("runtime.kernels=fast", "accepted: auto, fused, reference"),
        ("steps=3", "write section.key=value"),
        ("runtime.compile=1", "runtime.compile = '1' is not of type bool"),
        ("preset.x=3", "is not of type str"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        Config.load("smoke", ["train.batch=2", override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.ecg_layers=1000000000", "accepted: 1 to 256"),
        ("model.width=0", "accepted: 1 to 1,048,576"),
        ("model.samples=1000000000000", "accepted: 1 to 1,048,576"),
        ("model.stem_layers=40", "leave no token of 5000 samples"),
        ("data.workers=1000000", "accepted: 1 to 1,024"),
        ("train.seed=-1", "accepted: 0 to"),
        ("runtime.timeout_s=-1", "accepted: 0.001 to"),
        ("optim.lr=-1", "accepted: 0 or more"),
        ("optim.final_scale=0", "accepted: 1e-09 to 1"),
        ("optim.beta2=1", "accepted: 0 to 0.999999"),
        ("loss.ets=-1", "accepted: 0 or more"),
        ("model.dropout=1.5", "accepted: 0 to 1"),
        ("model.leads=8", "accepted: 12$"),
    ],
)
def test_sizes_have_limits(override, message):
    with pytest.raises(ValueError, match=f"{override.partition('=')[0]} = .*{message}"):
        Config.load("smoke", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.warmup=0.6", "optim.hold=0.6"],
            r"optim.warmup \+ optim.hold \+ optim.decay = 1.5; accepted: at most 1",
        ),
        (["loss.mlm_mask=0.7", "loss.mlm_random=0.5"], r"loss.mlm_mask \+ loss.mlm_random = 1.2; accepted: at most 1"),
    ],
)
def test_shares_of_one_whole(overrides, message):
    with pytest.raises(ValueError, match=message):
        Config.load("smoke", overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mem_width": 49, "mem_heads": 7}, "model.mem_width = 49; accepted: even numbers"),
        ({"samples": 10_000}, "model.samples = 10000 are 625 tokens .*at most 511"),
    ],
)
def test_sizes_that_the_reconstruction_head_cannot_take(change, message):
    from dbeta.models.dbeta import check_config

    with pytest.raises(ValueError, match=message):
        check_config(dataclasses.replace(Config.load("paper").model, **change))


def test_preset_files(tmp_path):
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 7\n")
    assert Config.load(str(tmp_path / "mine.toml")).train.steps == 7
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        Config.load(str(tmp_path / "bad.toml"))
    with pytest.raises(ValueError, match="neither one of smoke, paper, released, hopper"):
        Config.load("papr")
