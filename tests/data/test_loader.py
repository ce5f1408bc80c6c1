"""The reference loader: every record, in an order that depends on the seed alone, and exactly resumed."""

import time

import numpy as np
import pytest
import torch

from dbeta.data.loader import RawBatch, make_loader
from dbeta.data.records import Record
from dbeta.data.resample import resample


def record(number: int, *, rate_hz: float = 500.0, samples: int = 5000, dtype: type = np.int16) -> Record:
    adc = np.random.default_rng(number).integers(-900, 900, (12, samples)).astype(dtype)
    adc[:, 0] = number
    return Record(
        name=f"r{number}", adc=adc, rate_hz=rate_hz, gain=np.linspace(200, 1000, 12), subject=f"s{number // 2}",
        baseline=np.arange(12, dtype=np.int32), report=f"report {number % 7}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(corpus_of):
    return corpus_of([record(i) for i in range(53)], validation=0.0)


def take(loader, count: int) -> list[RawBatch]:
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def reference(corpus, **more):
    return make_loader(corpus, engine="reference", **{"batch": 8, "seed": 3, **more})


def test_batches_are_the_records(corpus):
    for batch in take(reference(corpus), 8):
        assert batch.adc.shape == (8, 12, 5000) and batch.adc.dtype == torch.int16 and batch.signal is None
        assert batch.records.dtype == torch.int64 and batch.gain.dtype == batch.baseline.dtype == torch.float32
        for row, number in enumerate(batch.records.tolist()):
            expected = record(int(corpus.column("name")[number][1:]))
            np.testing.assert_array_equal(batch.adc[row].numpy(), expected.adc)
            np.testing.assert_allclose(batch.gain[row], expected.gain, rtol=1e-7)
            np.testing.assert_array_equal(batch.baseline[row], expected.baseline)


def test_an_epoch_has_each_record_once_and_epochs_differ(corpus):
    ids = torch.stack([batch.records for batch in take(reference(corpus, batch=10), 10)])
    first, second = ids[:5].flatten().tolist(), ids[5:].flatten().tolist()
    assert len(set(first)) == len(set(second)) == 50 and first != second  # 3 of 53 are left over in each
    assert first != take(reference(corpus, batch=50, seed=4), 1)[0].records.tolist()


def test_evaluation_order_is_whole(corpus):
    loader = reference(corpus, shuffle=False, repeat=False)
    batches = list(loader)
    loader.close()
    assert torch.cat([batch.records for batch in batches]).tolist() == list(range(53))
    chosen = reference(corpus, ids=np.array([5, 3, 9]), batch=2, shuffle=False, repeat=False)
    assert [batch.records.tolist() for batch in chosen] == [[5, 3], [9]]
    chosen.close()


@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_do_not_depend_on_the_ranks(corpus, world):
    alone = take(reference(corpus), 14)
    ranks = [take(reference(corpus, rank=rank, world=world), 14) for rank in range(world)]
    for whole, *parts in zip(alone, *ranks):
        assert torch.equal(whole.records, torch.cat([part.records for part in parts]))
        assert torch.equal(whole.adc, torch.cat([part.adc for part in parts]))


@pytest.mark.parametrize(("workers", "done"), [(1, 3), (2, 0), (3, 6), (2, 7), (2, 20)])
def test_resumed_exactly(corpus, workers, done):
    """The state is that of the batches handed out, however far the workers have read ahead; epochs end at 6."""
    loader = reference(corpus, workers=2)
    for _ in range(done):
        next(loader)
    state = loader.state_dict()
    expected = take(loader, 9)
    other = reference(corpus, workers=workers)
    next(other)
    other.load_state_dict(state)
    for left, right in zip(expected, take(other, 9)):
        assert torch.equal(left.records, right.records) and torch.equal(left.adc, right.adc)


def test_a_state_of_other_records_is_refused(corpus):
    loader = reference(corpus)
    for change in ({"records": 52}, {"batch": 4}, {"seed": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            loader.load_state_dict(loader.state_dict() | change)
    loader.close()


def test_other_rates_and_lengths(corpus_of):
    """Resampled, cut to 10 s or padded; a corpus with one such record hands out millivolts only."""
    kinds = [(500, 5000), (1000, 30_000), (257, 2570), (100, 400), (500, 72_000)]
    records = [record(i, rate_hz=rate, samples=samples) for i, (rate, samples) in enumerate(kinds)]
    records[4] = record(4, samples=6000, dtype=np.int32)
    records[0].adc[2] = -32768  # a lead that is missing
    loader = reference(corpus_of(records, validation=0.0), batch=5, shuffle=False, repeat=False)
    (batch,) = loader
    loader.close()
    assert batch.adc is None and batch.signal.dtype == torch.float32 and batch.signal.shape == (5, 12, 5000)
    for made, raw in zip(batch.signal.numpy(), records):
        expected = resample(raw.to_mv(), raw.rate_hz)[:, :5000]
        np.testing.assert_allclose(made[:, : expected.shape[1]], expected, rtol=1e-6, atol=1e-6)
        assert (made[:, expected.shape[1] :] == 0).all()
    assert (batch.signal[0, 2] == 0).all()


def test_integer_records_of_other_lengths(corpus_of):
    loader = reference(corpus_of([record(0, samples=7500), record(1, samples=3000)], validation=0.0), batch=2,
                       shuffle=False)  # fmt: skip
    (batch,) = take(loader, 1)
    np.testing.assert_array_equal(batch.adc[0].numpy(), record(0, samples=7500).adc[:, :5000])
    np.testing.assert_array_equal(batch.adc[1, :, :3000].numpy(), record(1, samples=3000).adc)
    assert (batch.adc[1, :, 3000:] == -32768).all()


def test_mistakes(corpus, monkeypatch):
    for more, word in (({"batch": 54}, "53 records"), ({"batch": 6, "world": 4}, "4 ranks"), ({"split": "dev"}, "dev")):
        with pytest.raises(ValueError, match=word):
            reference(corpus, **more)
    monkeypatch.setitem(__import__("sys").modules, "dbeta.data.dali", None)
    with pytest.raises(ValueError, match=r"data\.engine=dali"):
        make_loader(corpus, batch=8, engine="dali")
    with pytest.raises(ValueError, match="accepted: auto, dali, reference"):
        make_loader(corpus, batch=8, engine="fast")


def test_auto_falls_back_announced(corpus, monkeypatch, capfd):
    from dbeta import runtime

    monkeypatch.setattr(runtime, "_announced", set())
    monkeypatch.setitem(__import__("sys").modules, "dbeta.data.dali", None)
    for _ in range(2):
        take(make_loader(corpus, batch=8, seed=3), 1)
    assert capfd.readouterr().err.count("reference engine") == 1


def test_a_damaged_shard_is_an_error_not_a_hang(corpus_of):
    corpus = corpus_of([record(i) for i in range(20)], validation=0.0)
    path = corpus.shard_path(0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    loader = reference(corpus)
    start = time.monotonic()
    with pytest.raises(ValueError, match="dbeta doctor"):
        take(loader, 8)
    loader.close()
    loader.close()  # twice is fine
    assert time.monotonic() - start < 10
    with pytest.raises(ValueError, match="damaged"):
        type(corpus).open(corpus.path)


def test_parts_of_a_batch(corpus):
    (batch,) = take(reference(corpus), 1)
    part = batch.rows(slice(2, 5)).to("cpu")
    assert torch.equal(part.adc, batch.adc[2:5]) and torch.equal(part.records, batch.records[2:5])
    assert part.signal is None and part.gain.shape == (3, 12)
