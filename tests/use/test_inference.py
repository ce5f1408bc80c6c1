"""Features of real and odd records: every format, batch, order, length, lead set; reconstruction."""

import h5py
import numpy as np
import pytest
import torch

from dbeta import DBeta, read_ecg
from dbeta.data.records import LEADS, read_raw
from dbeta.models.inference import window_starts
from tests.use.conftest import TEXTS


def test_every_format_gives_features(model, paths):
    kinds = {"WFDB .dat": "WFDB", "WFDB .mat": "WFDB"}
    assert {name: read_raw(path)[0] for name, path in paths.items()} == {name: kinds.get(name, name) for name in paths}
    ecgs = [read_ecg(path) for path in paths.values()]
    features = model.encode_ecg(ecgs, lengths="crop")
    assert features.shape == (5, 768) and features.isfinite().all() and features.abs().max() < 1
    assert not features.requires_grad
    distances = torch.cdist(features, features) + torch.eye(5)
    assert distances.min() > 1e-4, "different records have different features"


def test_batch_size_order_and_company_do_not_matter(model, paths):
    ecg = torch.stack([torch.tensor(read_ecg(path)[:, :2500]).repeat(1, 2) for path in paths.values()])
    whole = model.encode_ecg(ecg)
    order = torch.tensor([3, 1, 4, 0, 2])
    for batch in (1, 2, 5, 64):
        torch.testing.assert_close(model.encode_ecg(ecg[order], batch=batch), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_ecg(ecg.numpy().astype(np.float64)), whole, rtol=0, atol=1e-5)
    texts = [*TEXTS, "a much longer text than all the others " * 5]
    alone = torch.cat([model.encode_text([text]) for text in texts])
    torch.testing.assert_close(model.encode_text(texts), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_text(texts[::-1] * 20)[:4], alone.flip(0), rtol=0, atol=1e-5)
    assert model.encode_text(["!?"]).isfinite().all(), "a text of which nothing is left"


def test_a_gigabyte_of_input_is_never_there_at_once(model):
    """A lazy sequence is read record by record: at most ``batch`` windows are held."""

    class Lazy(list):
        held = 0

        def __iter__(self):
            for _ in range(7):
                type(self).held += 1
                yield torch.zeros(12, 5000)

    seen = []
    original = model.ecg_features
    model.ecg_features = lambda ecg: (seen.append((len(ecg), Lazy.held)), original(ecg))[1]
    try:
        model.encode_ecg(Lazy([None] * 7), batch=3)
    finally:
        del model.ecg_features
    assert seen == [(3, 3), (3, 6), (1, 7)]


def test_other_lengths(model):
    ecg = torch.randn(12, 15_000, generator=torch.Generator().manual_seed(0)) * 0.3
    whole = lambda *starts: torch.stack([ecg[:, s : s + 5000] for s in starts])  # noqa: E731
    short = torch.nn.functional.pad(ecg[:, :3500], (0, 1500))  # 7 s
    for how in ("crop", "mean"):
        torch.testing.assert_close(model.encode_ecg([ecg[:, :3500]], lengths=how), model.encode_ecg(short[None]))
    torch.testing.assert_close(model.encode_ecg([ecg], lengths="crop"), model.encode_ecg(whole(0)))
    windows = model.encode_ecg(whole(0, 5000, 10_000)).mean(0, keepdim=True)  # 30 s
    torch.testing.assert_close(model.encode_ecg(ecg[None], lengths="mean", batch=2), windows, rtol=0, atol=1e-5)
    assert window_starts(16_000, 5000) == [0, 3667, 7333, 11_000] and window_starts(5000, 5000) == [0]
    with pytest.raises(ValueError, match=r'15000 samples.*lengths="crop" or lengths="mean"'):
        model.encode_ecg([ecg])
    with pytest.raises(ValueError, match="accepted: exact, crop, mean"):
        model.encode_ecg([ecg], lengths="long")


def test_fewer_leads_by_name(model):
    ecg = torch.randn(2, 12, 5000, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(ecg)
    kept[:, [LEADS.index("II"), LEADS.index("V2")]] = ecg[:, [1, 7]]
    torch.testing.assert_close(model.encode_ecg(ecg[:, [7, 1]], leads=["v2", "II"]), model.encode_ecg(kept))
    for leads in (["I", "I"], ["I", "MCL1"], "II"):
        with pytest.raises(ValueError, match="accepted: different names of I II III aVR"):
            model.encode_ecg(ecg[:, :2], leads=leads)
    with pytest.raises(ValueError, match="with 2 leads named"):
        model.encode_ecg(ecg, leads=["I", "II"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invalid_samples_are_refused(model, bad):
    ecg = torch.zeros(1, 12, 5000)
    ecg[0, 3, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.encode_ecg(ecg)


def test_reconstruction_fills_hidden_patches_only(model):
    ecg = torch.randn(3, 12, 5000, generator=torch.Generator().manual_seed(0)) * 0.3 + 1
    rebuilt, hidden = model.reconstruct(ecg, TEXTS, batch=2)
    assert hidden.shape == (3, 312) and (hidden.sum(1) == 312 - 78).all()
    same = (rebuilt == ecg).all(1)[:, : 312 * 16].unflatten(1, (312, 16)).all(-1)
    assert torch.equal(same, ~hidden) and torch.equal(rebuilt[..., 4992:], ecg[..., 4992:])
    torch.testing.assert_close(model.reconstruct(ecg, TEXTS, batch=1)[0], rebuilt, rtol=0, atol=1e-4)
    assert not torch.equal(model.reconstruct(ecg, hidden_leads=["V2"])[0], model.reconstruct(ecg)[0])
    with pytest.raises(ValueError, match="2 texts for 3 ECGs"):
        model.reconstruct(ecg, TEXTS[:2])


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_near(folder, paths):
    ecgs = [read_ecg(path) for path in paths.values()]
    near = DBeta.from_pretrained(folder, device="cuda").encode_ecg(ecgs, lengths="crop")
    assert near.is_cuda and near.dtype == torch.float32
    exact = DBeta.from_pretrained(folder).encode_ecg(ecgs, lengths="crop")
    torch.testing.assert_close(near.cpu(), exact, rtol=0, atol=0.05)


def test_exams_of_a_code_file(tmp_path, shared):
    """CODE-15 in mV with its padding cut; CODE-test in 1e-4 V with its leads in the order that fits."""
    ecg = read_ecg(shared / "data/ptbxl/records100/00000/00001_lr.dat")[:, :2934]
    stored = np.zeros((3, 4096, 12), np.float32)
    stored[1, 581:3515] = ecg.T
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file["tracings"], file["exam_id"] = stored, [11, 12, 13]
    swapped = np.tile(ecg[[0, 1, 2, 4, 5, 3, *range(6, 12)]].T, (3, 1, 1)) * 10
    with h5py.File(tmp_path / "ecg_tracings.hdf5", "w") as file:
        file["tracings"] = swapped
    for name in ("exams_part0.hdf5", "ecg_tracings.hdf5"):
        found = read_ecg(f"{tmp_path / name}#1")
        assert found.shape == (12, 3668)  # 2934 samples at 400 Hz
        np.testing.assert_allclose(found[:, 10:3000:5], ecg[:, 8:2400:4], atol=2e-3)  # every fifth is a stored sample
        with pytest.raises(ValueError, match=rf"several exams: it holds 3; name one, {name}#0 to {name}#2"):
            read_ecg(tmp_path / name)
        with pytest.raises(ValueError, match="no exam 3"):
            read_ecg(f"{tmp_path / name}#3")
