"""The decoder, through its PyTorch operator, against wfdb on random records of every format."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wfdb_files import BITS, FORMATS, File, pack, random_file

from dbeta.data.resample import filter_table, resample

wfdb = pytest.importorskip("wfdb", reason="not on a machine that is lent with its GPU only")

SHORT = (16, 61, 80, 160, 212, 310, 311)  # fit int16


def decode(wfdb_decode, file: File, **options):
    samples, leads = file.codes.shape
    return wfdb_decode(
        torch.frombuffer(bytearray(file.data), dtype=torch.uint8), file.fmt, leads, samples,
        gain=torch.tensor(file.gain), baseline=torch.tensor(file.baseline, dtype=torch.int32),
        skew=torch.tensor(file.skew, dtype=torch.int32), initial=torch.tensor(file.initial, dtype=torch.int32),
        offset=file.offset, record="rec", **options,
    )  # fmt: skip


@pytest.mark.parametrize("fmt", FORMATS)
@given(
    leads=st.integers(1, 15),
    samples=st.integers(1, 70),
    offset=st.sampled_from([0, 1, 2, 3, 24, 25]),
    skewed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20, deadline=None)
def test_equals_wfdb(wfdb_decode, tmp_path_factory, fmt, leads, samples, offset, skewed, seed):
    rng = np.random.default_rng(seed)
    file = random_file(rng, fmt, leads, samples, offset=offset, skewed=skewed and fmt != 8)  # wfdb cannot skew format 8
    record = wfdb.rdrecord(file.write(tmp_path_factory.mktemp("rec")), physical=True)
    expected = record.p_signal.T.astype(np.float32)
    got = decode(wfdb_decode, file).numpy()
    assert got.dtype == np.float32 and got.shape == (leads, samples)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    one_ulp = np.spacing(np.abs(expected), where=~np.isnan(expected), out=np.zeros_like(expected))
    assert np.all((np.abs(got - expected) <= one_ulp) | np.isnan(expected))
    codes = decode(wfdb_decode, file, dtype=torch.int32).numpy()
    stored = wfdb.rdrecord(record_name=file.write(tmp_path_factory.mktemp("rec")), physical=False).d_signal.T
    np.testing.assert_array_equal(codes, np.where(np.isnan(expected), np.iinfo(np.int32).min, stored))
    if fmt in SHORT:
        short = decode(wfdb_decode, file, dtype=torch.int16).numpy()
        np.testing.assert_array_equal(short, np.where(np.isnan(expected), -32768, stored))


@pytest.mark.parametrize("fmt", [16, 24, 32, 80, 212])
def test_bytes_are_those_that_wfdb_writes(tmp_path, fmt):
    """The hand-made files of these tests equal wfdb's own, in the formats that it writes."""
    file = random_file(np.random.default_rng(fmt), fmt, 3, 71)
    wfdb.wrsamp("rec", 500, ["mV"] * 3, ["a", "b", "c"], d_signal=file.codes, fmt=[str(fmt)] * 3, adc_gain=[1.0] * 3,
                baseline=[0] * 3, write_dir=str(tmp_path))  # fmt: skip
    assert (tmp_path / "rec.dat").read_bytes() == pack(file.codes, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_uneven_skew_and_window(wfdb_decode, fmt):
    """wfdb fails on leads of different skews, and on format 8 with any: shifted, cropped and padded, in numpy."""
    file = random_file(np.random.default_rng(0), fmt, 4, 50, offset=1)
    file.skew = np.array([0, 3, 50, 9])
    none = np.iinfo(np.int32).min
    stored = file.initial + np.cumsum(file.codes, axis=0) if fmt == 8 else file.codes
    stored = stored if fmt == 8 else np.where(stored == -(1 << BITS[fmt] - 1), none, stored)
    for start, length in ((0, 50), (0, 60), (7, 20), (45, 20), (60, 5)):
        got = decode(wfdb_decode, file, dtype=torch.int32, start=start, length=length).numpy()
        for c, skew in enumerate(file.skew):
            expected = np.full(length, none)
            part = stored[skew:, c][start : start + length]
            expected[: len(part)] = part
            np.testing.assert_array_equal(got[c], expected)


@given(fmt=st.sampled_from(FORMATS), start=st.integers(0, 60), length=st.integers(0, 80), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_window_crops_and_pads(wfdb_decode, fmt, start, length, seed):
    file = random_file(np.random.default_rng(seed), fmt, 3, 41, offset=1)
    whole = decode(wfdb_decode, file, invalid=0.0).numpy()
    assert not np.isnan(whole).any()
    expected = np.zeros((3, length), np.float32)
    part = whole[:, start : start + length]
    expected[:, : part.shape[1]] = part
    np.testing.assert_array_equal(decode(wfdb_decode, file, invalid=0.0, start=start, length=length).numpy(), expected)


def test_planar_is_the_corpus_order(wfdb_decode):
    adc = np.random.default_rng(0).integers(-32768, 32767, (12, 501), dtype=np.int16)
    data = torch.from_numpy(adc.reshape(-1).view(np.uint8).copy())
    options = dict(planar=True, dtype=torch.int16, record="r")
    np.testing.assert_array_equal(wfdb_decode(data, 16, 12, 501, **options).numpy(), adc)
    padded = wfdb_decode(data, 16, 12, 501, length=600, **options).numpy()
    np.testing.assert_array_equal(padded[:, :501], adc)
    assert (padded[:, 501:] == -32768).all()
    cropped = wfdb_decode(data, 16, 12, 501, start=100, length=300, **options).numpy()
    np.testing.assert_array_equal(cropped, adc[:, 100:400])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("samples", [30, 31, 32])
def test_wrong_sizes_name_record_and_bytes(wfdb_decode, fmt, samples):
    file = random_file(np.random.default_rng(1), fmt, 5, samples, offset=3)
    whole = torch.frombuffer(bytearray(file.data), dtype=torch.uint8)
    least = len(whole)
    with pytest.raises(ValueError, match=rf"record rec: format {fmt}.* need {least}\b.* given {least - 1} \(truncated"):
        wfdb_decode(whole[:-1], fmt, 5, samples, offset=3, record="rec")
    longer = torch.cat([whole, whole[:4]])
    with pytest.raises(ValueError, match=rf"record rec: .* need {least}\b.* given {least + 4} \(oversized\)"):
        wfdb_decode(longer, fmt, 5, samples, offset=3, record="rec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=508), "record rec: format 508 is not read; accepted: 8, 16, 24, 32, 61, 80, 160, 212, 310, 311"),
        (dict(gain=torch.tensor([1.0, 0.0])), "record rec: lead 1 has gain 0"),
        (dict(gain=torch.tensor([1.0, float("nan")])), "record rec: lead 1 has gain nan"),
        (dict(skew=torch.tensor([-1, 0])), "record rec: lead 0 has skew -1"),
        (dict(offset=-1), "record rec: byte offset -1;"),
        (dict(leads=33), "leads, format, down or first is out of range"),
        (dict(samples=-1), "record rec: -1 samples per lead"),
        (dict(start=-1), r"record rec: window \[-1"),
        (dict(dtype=torch.float64), "record rec: dtype is float32"),
        (dict(gain=torch.ones(3)), "record rec: gain has to be"),
    ],
)
def test_refusals(wfdb_decode, change, message):
    options = dict(format=16, leads=2, samples=3, record="rec") | change
    for name, dtype in (("gain", torch.float64), ("skew", torch.int32)):
        if name in options:
            options[name] = options[name].to(dtype)
    with pytest.raises(ValueError, match=message):
        wfdb_decode(torch.zeros(12, dtype=torch.uint8), options.pop("format"), options.pop("leads"),
                    options.pop("samples"), **options)  # fmt: skip


def test_operator_contract(wfdb_decode):
    """Schema, fake and real agree (torch.library.opcheck), with and without a filter."""
    data = torch.zeros(240, dtype=torch.uint8)
    for options in (
        {},
        {"table": torch.ones(2, 4) / 4, "first": -1},
        {"start": 3, "length": 9, "invalid": 0.0},
        {"dtype": torch.int32},
    ):
        torch.library.opcheck(torch.ops.dbeta.wfdb_decode.default, (data, 16, 12, 10), options)


@pytest.mark.parametrize("rate", [100, 128, 250, 257, 360, 400, 1000, 1024])
@pytest.mark.parametrize("seconds", [0.02, 3.7])
def test_resampling_is_the_reference_filter(wfdb_decode, rate, seconds):
    """The table of dbeta.data.resample, to its last and first sample, cropped or whole, short records included."""
    adc = np.random.default_rng(rate).integers(-3000, 3000, (3, max(1, int(rate * seconds))), dtype=np.int16)
    expected = resample(adc / np.float32(1000), rate)
    design = filter_table(rate)
    data = torch.from_numpy(adc.reshape(-1).view(np.uint8).copy())
    options = dict(planar=True, gain=torch.full((3,), 1000.0, dtype=torch.float64))
    options |= dict(table=torch.from_numpy(design.table), down=design.down, first=design.first)
    got = wfdb_decode(data, 16, 3, adc.shape[1], **options).numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2e-6)  # mV; sums of up to 66 products of 3 mV in float32
    part = wfdb_decode(data, 16, 3, adc.shape[1], start=5, length=700, invalid=0.0, **options).numpy()
    np.testing.assert_allclose(part[:, : expected.shape[1] - 5], expected[:, 5:705], atol=2e-6)
    assert (part[:, max(0, expected.shape[1] - 5) :] == 0).all()
