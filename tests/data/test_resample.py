"""The resampling filter: what it keeps, what it removes, and that ends and pieces make no difference."""

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from dbeta.data import resample as module
from dbeta.data.records import read_record
from dbeta.data.resample import filter_table, inputs_for, resample

RATES = (100, 128, 250, 257, 360, 400, 977, 1000, 2000)


def tone(hz: float, rate: float, seconds: float = 8) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)[None].astype(np.float32)


def decibels(signal: np.ndarray) -> float:
    """Amplitude of the middle of a tone, relative to 1."""
    middle = signal[0, 500:-500].astype(np.float64)
    return 10 * np.log10(2 * (middle**2).mean() + 1e-20)


@pytest.mark.parametrize("hz", [300, 400, 450])
def test_what_would_alias_is_removed(hz):
    assert decibels(resample(tone(hz, 1000), 1000)) < -50


@pytest.mark.parametrize(("rate", "hz"), [(1000, 200), (1000, 1), (1000, 100), (2000, 200), (400, 150), (257, 100),
                                          (250, 90), (100, 35), (360, 140), (977, 190)])  # fmt: skip
def test_what_matters_is_kept(rate, hz):
    """Within 0.1 %, and in place: the sample at time t is the tone at time t."""
    made = resample(tone(hz, rate), rate)
    assert abs(10 ** (decibels(made) / 20) - 1) < 1e-3
    expected = np.sin(2 * np.pi * hz * np.arange(made.shape[1]) / 500)
    assert np.abs(made[0, 500:-500] - expected[500:-500]).max() < 2e-3


@pytest.mark.parametrize("rate", RATES)
def test_a_constant_stays_constant_to_the_ends(rate):
    for samples in (1, 7, 300, 5000):
        made = resample(np.full((2, samples), 3.25), rate)
        assert made.shape == (2, int(np.ceil(samples * 500 / rate))) and made.dtype == np.float32
        np.testing.assert_allclose(made, 3.25, rtol=5e-7)


@pytest.mark.parametrize("rate", RATES)
def test_the_table_means_what_it_says(rate):
    """The equation of the module, written out; C++ reads the same table."""
    design, rng = filter_table(rate), np.random.default_rng(rate)
    signal = rng.standard_normal(333).astype(np.float32)
    assert design.table.dtype == np.float32 and design.table.shape[0] == design.up
    np.testing.assert_allclose(design.table.sum(1, dtype=np.float64), 1, atol=1e-6)
    made = resample(signal, rate)
    for n in rng.integers(0, len(made), 40):
        at = n * design.down // design.up + design.first + np.arange(design.table.shape[1])
        here = (at >= 0) & (at < len(signal))
        weights = design.table[n * design.down % design.up][here].astype(np.float64)
        assert made[n] == pytest.approx((weights * signal[at[here]]).sum() / weights.sum(), abs=2e-6)


def test_500_hz_is_left_alone():
    signal = np.random.default_rng(0).standard_normal((12, 5000)).astype(np.float32)
    assert filter_table(500.0) is None and inputs_for(5000, 500) == 5000
    np.testing.assert_array_equal(resample(signal, 500), signal)


def test_close_to_scipy_inside():
    """A second, independent filter agrees on a signal of ECG's bandwidth."""
    rng = np.random.default_rng(1)
    signal = scipy.signal.sosfiltfilt(scipy.signal.butter(8, 60, fs=1000, output="sos"), rng.standard_normal((3, 8000)))
    expected = scipy.signal.resample_poly(signal, 1, 2, axis=1)
    np.testing.assert_allclose(resample(signal, 1000)[:, 200:-200], expected[:, 200:-200], atol=3e-3 * signal.std())


REAL = {"ptbxl/records100": "*.hea", "ptb": "*.hea", "code15-sample": "*.mat"}  # 100, 1000, 400 Hz


@pytest.mark.parametrize("source", REAL)
def test_against_scipy_on_real_records(shared, source):
    """The differences that ``dbeta.data.resample`` states, as shares of a record's range."""
    for path in sorted((shared / "data" / source).rglob(REAL[source])):
        record = read_record(path)
        mv, design = record.to_mv().astype(np.float64), filter_table(record.rate_hz)
        made, most = resample(mv, record.rate_hz), max(design.up, design.down)
        same = scipy.signal.firwin(2 * 16 * most + 1, 1 / most, window=("kaiser", 6.8))
        ends = 2 * 16 * most // design.down
        for window, share in ((("kaiser", 5.0), 2e-3), (same, 1e-4)):
            theirs = scipy.signal.resample_poly(mv, design.up, design.down, axis=1, window=window)
            assert np.abs(made - theirs)[:, ends:-ends].max() < share * np.ptp(mv), path
        # At the ends scipy takes what lies beyond as 0 mV, so that a constant sags; here it stays.
        raised = resample(mv + 5, record.rate_hz) - 5
        np.testing.assert_allclose(raised, made, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RATES), st.integers(200, 3000), st.integers(1, 300))
def test_the_first_samples_need_no_more_than_said(rate, samples, outputs):
    signal = np.random.default_rng(samples).standard_normal((2, samples)).astype(np.float32)
    outputs = min(outputs, resample(signal, rate).shape[1])
    part = signal[:, : inputs_for(outputs, rate)]
    np.testing.assert_array_equal(resample(part, rate)[:, :outputs], resample(signal, rate)[:, :outputs])


@pytest.mark.parametrize("rate", [128, 257, 977, 1000])
def test_pieces_of_a_long_record_join(rate, monkeypatch):
    signal = np.random.default_rng(0).standard_normal((2, 13_003)).astype(np.float32)
    whole = resample(signal, rate)
    monkeypatch.setattr(module, "PIECE", 2000)
    np.testing.assert_array_equal(resample(signal, rate), whole)


def test_impossible_rates():
    for rate in (0, -500, 49, 20_000, float("nan")):
        with pytest.raises(ValueError, match="sampling rate"):
            resample(np.zeros((12, 100)), rate)
    with pytest.raises(ValueError, match="no samples"):
        resample(np.zeros((12, 0)), 250)
