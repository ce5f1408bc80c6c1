"""The network against recorded values of the released code: float64 to 1e-10, float32 to 5e-5 (MODEL section 16)."""

import numpy as np
import pytest
import torch

from dbeta.config import LossConfig, RuntimeConfig
from dbeta.losses import pretraining_losses
from dbeta.models.attention import Rows
from dbeta.models.dbeta import DBeta
from dbeta.models.released import import_checkpoint, to_released
from dbeta_kernels.lead_mask import lead_mask

TOLERANCE = {"f64": 1e-10, "f32": 5e-5}
DTYPE = {"f64": torch.float64, "f32": torch.float32}
ENGINES = {
    "dense": RuntimeConfig(removals=False, kernels="reference", attention="reference"),
    "removals": RuntimeConfig(removals=True),
}


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    return request.param


@pytest.fixture
def check(tiny, precision):
    """Compare a value with the recorded one of this precision."""

    def compare(name: str, value: torch.Tensor) -> None:
        expected = tiny[f"{precision}/{name}"]
        torch.testing.assert_close(value.detach().to(expected.dtype), expected, rtol=0, atol=TOLERANCE[precision])

    return compare


def with_engine(parity, engine: str, precision: str) -> DBeta:
    imported = import_checkpoint(parity / "tiny_seedA_weights.safetensors")
    model = DBeta(imported.config, ENGINES[engine])
    model.load_state_dict(imported.state_dict())
    return model.eval().to(DTYPE[precision])


@pytest.fixture
def model(parity, precision):
    return with_engine(parity, "dense", precision)


@pytest.fixture
def inputs(tiny, precision):
    return tiny["in/ecg"].to(DTYPE[precision]), tiny["in/text_ids"], tiny["in/text_attention_mask"].bool()


@torch.no_grad()
def test_ecg_encoder(model, inputs, check):
    ecg = inputs[0]
    check("conv_feats", model.ecg_encoder.stem(ecg).transpose(1, 2))
    check("embeddings", model.ecg_encoder.embed(ecg))
    check("ecg_encoder_out_nomask", model.ecg_encoder(ecg))
    check("ecg_feats", model.encode_ecg(ecg))


@torch.no_grad()
def test_text_encoder(model, inputs, tiny, check):
    _, ids, mask = inputs
    encoder, everything = model.text_encoder, torch.ones_like(mask)
    check("t5_batch_no_attention_mask", encoder(ids, Rows(everything)))
    check("text_feats_batch", model.text_features(ids, mask))
    check("t5_batch_with_attention_mask_NOT_USED_OFFICIALLY", encoder(ids, Rows(mask)))
    long = tiny["in/t5_long_ids"]
    check("t5_long", encoder(long, Rows(torch.ones_like(long).bool())))
    features = []
    for row, length in enumerate(tiny["in/text_lens"].tolist()):
        alone = ids[row : row + 1, :length]
        check(f"t5_single_{row}", encoder(alone, Rows(everything[:1, :length])))
        features.append(model.text_features(alone, everything[:1, :length]))
    check("text_feats_single", torch.cat(features))


@torch.no_grad()
def test_unmasked_forward(model, inputs, check):
    out = model(*inputs)
    check("fwd_nomask/uni_modal_ecg_feats", out.ecg_features)
    check("fwd_nomask/uni_modal_text_feats", out.text_features)
    check("fwd_nomask/multi_modal_text_feats", out.text_states)
    check("fwd_nomask/multi_modal_ecg_feats", out.ecg_states)
    check("fwd_nomask/multi_modal_cls_feats", out.fused)
    check("fwd_nomask/etm_logits", out.etm_logits)


@torch.no_grad()
def test_masked_forward(model, inputs, tiny, check):
    out = model(*inputs, noise=tiny["in/noise"])
    check("fwd_mask/uni_modal_ecg_feats", out.ecg_features)
    check("fwd_mask/uni_modal_text_feats", out.text_features)
    check("fwd_mask/multi_modal_text_feats", out.text_states)
    check("fwd_mask/multi_modal_ecg_feats", out.ecg_states)
    check("fwd_mask/multi_modal_text_feats_2", out.tap_text)
    check("fwd_mask/multi_modal_ecg_feats_2", out.tap_ecg)
    check("fwd_mask/multi_modal_cls_feats", out.fused)
    check("fwd_mask/etm_logits", out.etm_logits)
    check("fwd_mask/mlm_logits", model.mlm_head.vocabulary(out.mlm_hidden).view(3, 20, -1))
    every = torch.arange(312).expand(3, -1)
    restore = tiny["f32/fwd_mask/mem_ids_restore"]
    check("fwd_mask/mem_logits", model.mem_head(out.tap_ecg, restore, every, pruned=False).view(3, 312, 12, 16))
    masks = torch.zeros(3, 312).scatter(1, out.mem_patches, 1.0)
    assert torch.equal(masks, tiny["f32/fwd_mask/mem_masks"])


def test_mem_target(tiny):
    """What lead_mask measures of a record makes the recorded target, lead by lead within each patch."""
    ecg = tiny["in/ecg"]
    _, mean, rstd = lead_mask(ecg, seed=0, step=0, rows=torch.arange(3), keep_probability=1.0)
    target = (ecg[..., : 312 * 16] - mean[..., None]) * rstd[..., None]
    target = target.unflatten(2, (312, 16)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(target, tiny["f32/target/mem_target_pix1"], rtol=0, atol=TOLERANCE["f32"])


@pytest.mark.parametrize("engine", ["dense", "removals"])
@pytest.mark.parametrize("pix", [0, 1])
def test_losses_and_gradients(parity, tiny, tiny_batch, precision, check, engine, pix):
    model = with_engine(parity, engine, precision)
    losses = pretraining_losses(
        model, tiny_batch(DTYPE[precision], normalise=bool(pix), text_tokens=41), LossConfig(ets_reduction="mean")
    )
    values = (losses.mlm, losses.mem, losses.etm, losses.ets, losses.total)
    check(f"loss/pix{pix}", torch.stack(values))
    counts = (losses.mlm_correct, losses.mlm_count, losses.etm_correct, torch.tensor(3.0))
    assert torch.stack(counts).tolist() == tiny[f"{precision}/loss/pix{pix}_counts"].tolist()

    losses.total.backward()
    gradients = to_released({name: p.grad for name, p in model.named_parameters()})
    recorded = [name for name in tiny if name.startswith(f"{precision}/grad/pix{pix}/")]
    assert len(recorded) == 41 or (precision, pix) == ("f32", 0)
    for name in recorded:
        check(name.removeprefix(f"{precision}/"), gradients[name.split("/")[-1]])
    with np.load(parity / "tiny_seedA.npz") as file:
        names = file["grad_names"].tolist()
    assert len(names) == 329 and set(gradients) - set(names) == {"language_encoder.encoder.embed_tokens.weight"}
    check(f"gradnorm/pix{pix}", torch.stack([gradients[name].norm() for name in names]))
    if precision == "f32":
        with np.load(parity / "tiny_seedA_allgrads_f32.npz") as file:
            for name in names:
                expected = torch.from_numpy(file[f"pix{pix}/{name}"])
                torch.testing.assert_close(gradients[name], expected, rtol=0, atol=TOLERANCE["f32"])
