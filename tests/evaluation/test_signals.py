"""What the model is shown: windows, segments and lead sets."""

import numpy as np
import pytest
import torch

from dbeta.data.records import LEADS
from dbeta.evaluation.features import FeatureCache
from dbeta.evaluation.signals import LEAD_SETS, SegmentStore, keep_leads, record_mv, windows


@pytest.mark.parametrize("name", LEAD_SETS)
def test_lead_set_zeroes_exactly_the_others(name):
    ecg = torch.randn(3, 12, 50)
    ecg[0, 5, 3] = float("nan")  # a missing lead is zero whatever it held
    kept = keep_leads(ecg, name)
    for index, lead in enumerate(LEADS):
        if lead in LEAD_SETS[name]:
            torch.testing.assert_close(kept[:, index], ecg[:, index], equal_nan=True)
        else:
            assert (kept[:, index] == 0).all()


def test_lead_sets_are_those_of_table_1():
    assert [len(leads) for leads in LEAD_SETS.values()] == [12, 6, 3, 2, 1]
    assert LEAD_SETS["P-3"] == ("I", "II", "V2") and set(LEAD_SETS["P-6"]) == set(LEADS[:6])
    with pytest.raises(ValueError, match="accepted: 12, P-6"):
        keep_leads(torch.zeros(1, 12, 5), "P-4")


def test_windows_are_the_first_seconds_then_zeros(synthetic):
    records = np.array([7, 3, 11])
    whole, cut = (torch.cat(list(windows(synthetic, records, window_s=s, batch=2))) for s in (10.0, 5.0))
    assert whole.shape == cut.shape == (3, 12, 5000)
    for row, record in enumerate(records):
        np.testing.assert_allclose(whole[row], record_mv(synthetic, record)[:, :5000], atol=1e-6)
    assert torch.equal(cut[..., :2500], whole[..., :2500]) and not cut[..., 2500:].any() and whole[..., 2500:].any()


def test_segments_tile_a_record_and_are_cut_once(synthetic, tmp_path):
    records = np.array([5, 2])
    store = SegmentStore.build(synthetic, records, 5.0, tmp_path / "a.i16")
    assert store.record.tolist() == [5, 5, 2, 2] and store.start.tolist() == [0, 2500, 0, 2500]
    joined = store.read(np.array([0, 1])).permute(1, 0, 2).reshape(12, 5000)
    np.testing.assert_allclose(joined, record_mv(synthetic, 5), atol=0.0006)
    before = (tmp_path / "a.i16").stat().st_mtime_ns
    SegmentStore.build(synthetic, records, 5.0, tmp_path / "a.i16")
    assert (tmp_path / "a.i16").stat().st_mtime_ns == before
    with (tmp_path / "a.i16").open("r+b") as file:
        file.truncate(1000)
    again = SegmentStore.build(synthetic, records, 5.0, tmp_path / "a.i16")  # damaged: cut again
    assert torch.equal(again.read(np.array([0, 1])).permute(1, 0, 2).reshape(12, 5000), joined)
    other = SegmentStore.build(synthetic, np.array([2]), 12.0, tmp_path / "a.i16")
    assert len(other) == 1 and not other.read(np.array([0]))[..., 5000:].any()  # shorter than a segment: zeros after it


def test_features_are_computed_once_and_belong_to_their_records(synthetic, model, tmp_path, monkeypatch):
    records = np.array([9, 1, 9, 4])
    cache = FeatureCache(model, tmp_path, batch=2)
    found = cache.features(synthetic, records, leads="P-2", window_s=5.0)
    ecg = torch.from_numpy(np.stack([record_mv(synthetic, record) for record in records]))
    ecg[..., 2500:] = 0
    ecg[:, 2:] = 0
    np.testing.assert_allclose(found, model.encode_ecg(ecg).numpy(), atol=1e-5)
    monkeypatch.setattr(model, "encode_ecg", None)
    np.testing.assert_array_equal(
        FeatureCache(model, tmp_path).features(synthetic, records, leads="P-2", window_s=5.0), found
    )
    with pytest.raises(TypeError):  # another lead set is not answered from the cache
        cache.features(synthetic, records, leads="12", window_s=5.0)
