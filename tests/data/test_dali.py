"""The DALI engine against the reference engine: same order, same bits, same state."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'dbeta[dali]'")

from dbeta.data.corpus import Corpus
from dbeta.data.corpus_writer import Options, Plan, write_corpus
from dbeta.data.loader import INVALID, SAMPLES, RawBatch, make_loader
from dbeta.data.prepare import prepare
from dbeta.data.records import Record
from dbeta.data.resample import filter_table
from dbeta_kernels import extension
from tests.csrc.conftest import current

RATES = (100, 128, 250, 257, 360, 400, 500, 1000, 1024)


@pytest.fixture(scope="module", autouse=True)
def operator():
    current("dbeta_dali")


def random_record(number: int, rate: float, dtype: type, seconds: float) -> Record:
    rng = np.random.default_rng(number)
    limit = 3000 if dtype is np.int16 else 10**7
    adc = rng.integers(-limit, limit, (12, max(1, int(seconds * rate)))).astype(dtype)
    adc[rng.random(adc.shape) < 0.01] = np.iinfo(dtype).min
    gain = rng.uniform(0.3, 1.5, 12) * limit / 3
    return Record(
        name=f"r{number}", adc=adc, rate_hz=rate, gain=gain, baseline=rng.integers(-300, 300, 12).astype(np.int32),
        subject=f"s{number}", report=f"report {number}", split="train",
    )  # fmt: skip


def write(records: list[Record], folder) -> Corpus:
    table = pa.table({"number": np.arange(len(records))})
    plan = Plan(table=table, read=lambda rows: (records[row["number"]] for row in rows), shuffle=False)
    write_corpus(plan, Options(source="random"), folder, workers=1)
    return Corpus.open(folder)


def make_corpus(folder, kinds, count) -> Corpus:
    """``count`` records with (rate, dtype, seconds) taken from ``kinds`` in turn."""
    return write([random_record(i, *kinds[i % len(kinds)]) for i in range(count)], folder)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """int16 at 500 Hz: exactly 10 s, shorter, longer, and a single sample."""
    kinds = [(500, np.int16, 10), (500, np.int16, 7.3), (500, np.int16, 12.5), (500, np.int16, 0.002)]
    return make_corpus(tmp_path_factory.mktemp("corpora") / "native", kinds, 90)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Every rate, both types, short and long."""
    kinds = [(rate, dtype, s) for rate in RATES for dtype, s in ((np.int16, 10), (np.int32, 6.1), (np.int16, 11.7))]
    return make_corpus(tmp_path_factory.mktemp("corpora") / "mixed", kinds, 54)


def same(got: RawBatch, expected: RawBatch) -> None:
    for name in ("records", "adc", "gain", "baseline"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    if expected.signal is not None:
        assert got.signal.shape == expected.signal.shape and got.signal.dtype == torch.float32
        assert (got.signal - expected.signal).abs().max() <= 1e-4  # mV


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": False}, {"repeat": False}, {"rank": 1, "world": 2}, {"workers": 1}]
)
@pytest.mark.parametrize("name", ["native", "mixed"])
def test_same_batches_as_the_reference(request, name, options):
    corpus = request.getfixturevalue(name)
    loaders = [make_loader(corpus, batch=16, seed=3, engine=e, **options) for e in ("dali", "reference")]
    seen = 0
    for _ in range(8):
        batches = [next(loader, None) for loader in loaders]
        assert (batches[0] is None) == (batches[1] is None)
        if batches[0] is None:
            break
        same(*batches)
        assert loaders[0].state_dict() == loaders[1].state_dict()
        seen += len(batches[0].records)
    assert seen == (len(corpus.split_ids("train")) if options == {"repeat": False} and name == "mixed" else seen) > 0
    for loader in loaders:
        loader.close()


def test_batches_outlive_the_pipeline(native):
    """Memory handed to PyTorch is not written again, however many batches follow or when the loader is closed."""
    loader = make_loader(native, batch=16, engine="dali")
    held = [next(loader) for _ in range(12)]
    copies = [batch.adc.clone() for batch in held]
    loader.close()
    del loader
    assert all(torch.equal(batch.adc, copy) for batch, copy in zip(held, copies))


def test_short_records_are_padded_with_the_invalid_code(native):
    batch = next(make_loader(native, batch=90, engine="dali", shuffle=False))
    samples = native.column("samples")[batch.records.numpy()]
    for row, length in zip(batch.adc, samples):
        assert (row[:, min(length, SAMPLES) :] == INVALID).all()
    assert {1, 3650, 5000, 6250} == set(samples.tolist())


def test_four_ranks_cover_each_record_once_per_epoch(native):
    ids = native.split_ids("train")[:88]
    seen = []
    for rank in range(4):
        loader = make_loader(native, ids=ids, batch=8, engine="dali", seed=5, rank=rank, world=4)
        seen += [next(loader).records for _ in range(11)]
    assert sorted(torch.cat(seen).tolist()) == ids.tolist()


READ_ON = """
import hashlib, json, sys
from dbeta.data.corpus import Corpus
from dbeta.data.loader import make_loader
loader = make_loader(Corpus.open(sys.argv[1]), batch=50, seed=9, engine="dali")
loader.load_state_dict(json.loads(sys.argv[2]))
digest = hashlib.sha256()
for _ in range(20):
    batch = next(loader)
    signal = batch.signal if batch.adc is None else batch.adc
    digest.update(batch.records.numpy().tobytes() + signal.numpy().tobytes())
print(digest.hexdigest(), json.dumps(loader.state_dict()))
"""


@pytest.mark.parametrize("name", ["native", "mixed"])
def test_a_new_process_goes_on_with_the_same_thousand_records(request, name):
    corpus = request.getfixturevalue(name)
    loader = make_loader(corpus, batch=50, seed=9, engine="dali")
    for _ in range(7):
        next(loader)
    state = json.dumps(loader.state_dict())
    digest = hashlib.sha256()
    for _ in range(20):
        batch = next(loader)
        signal = batch.signal if batch.adc is None else batch.adc
        digest.update(batch.records.numpy().tobytes() + signal.numpy().tobytes())
    expected = f"{digest.hexdigest()} {json.dumps(loader.state_dict())}"
    command = [sys.executable, "-c", READ_ON, str(corpus.path), state]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip() == expected
    loader.load_state_dict(json.loads(state))  # and so does the same loader, taken back
    again = next(loader).records
    loader.load_state_dict(json.loads(state))
    assert torch.equal(again, next(loader).records)


def test_a_damaged_shard_is_an_error_that_names_the_record(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", [(500, np.int16, 10)], 20)
    shard = corpus.shard_path(0)
    shard.write_bytes(shard.read_bytes()[: int(corpus.column("offset")[13]) + 1000])
    loader = make_loader(corpus, ids=np.arange(20), batch=20, engine="dali", shuffle=False)
    with pytest.raises(
        ValueError, match=r"record 1[3-9]: format 16, 12 leads x 5000 .* need 120000 bytes, given \d+ \(trunc"
    ):
        next(loader)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("ptb-xl", "ptbxl"),
        ("cinc2021", "cinc2021"),
        ("cpsc2018", "cpsc2018-native"),
        ("code-15", "code15-sample"),
        ("sph", "sph"),
        ("ptb", "ptb"),
        ("csn", "cinc2021"),
    ],
)
def test_real_records(shared, tmp_path, source, folder):
    """Every record of the data set that ``prepare`` accepts, whatever its rate."""
    prepare(source, shared / "data" / folder, tmp_path / "corpus", workers=1)
    corpus = Corpus.open(tmp_path / "corpus")
    options = dict(split="all", batch=64, shuffle=False, repeat=False)
    seen = 0
    for got, expected in zip(*(make_loader(corpus, engine=engine, **options) for engine in ("dali", "reference"))):
        same(got, expected)
        seen += len(got.records)
    assert seen == len(corpus)


def test_dalis_own_reader_with_both_shuffles(native):
    """The shards and their index also serve DALI's webdataset reader, with our operator, over ranks, checkpointed."""
    from nvidia.dali import fn, pipeline_def, types

    extension.load_dali()
    tars = sorted((native.path / "shards").glob("*.tar"))

    @pipeline_def(batch_size=6, num_threads=1, device_id=None, enable_checkpointing=True)
    def pipeline(rank):
        record, adc = fn.readers.webdataset(
            paths=[str(tar) for tar in tars], index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=["id", "adc"], missing_component_behavior="error", random_shuffle=True, initial_fill=32,
            shuffle_after_epoch=True, shard_id=rank, num_shards=4, name="reader", seed=1, pad_last_batch=False,
            stick_to_shard=False, dont_use_mmap=False,
        )  # fmt: skip
        record = fn.reinterpret(record, dtype=types.INT64, shape=[1])
        samples = fn.cast(adc.shape()[0] // 24, dtype=types.INT32)
        return record, fn.wfdb_decode(
            adc, format=16, leads=12, samples=samples, planar=True, length=5000, dtype=types.INT16
        )

    seen = []
    for rank in range(4):
        reader = pipeline(rank)
        reader.build()
        size = reader.reader_meta("reader")["epoch_size"]
        low, high = rank * size // 4, (rank + 1) * size // 4
        while low < high:
            record, adc = (out.as_tensor() for out in reader.run())
            for number, row in list(zip(np.asarray(record).ravel(), np.asarray(adc)))[: high - low]:
                stored = native.read_adc(number)[:, :SAMPLES]
                assert np.array_equal(row[:, : stored.shape[1]], stored)
                seen.append(number)
                low += 1
        checkpoint = reader.checkpoint()
        after = [np.asarray(reader.run()[0].as_tensor()).tolist() for _ in range(3)]
        restored = pipeline(rank, checkpoint=checkpoint)
        restored.build()
        assert [np.asarray(restored.run()[0].as_tensor()).tolist() for _ in range(3)] == after
    assert sorted(seen) == list(range(len(native)))


def test_resampling_of_constants_and_tones(tmp_path):
    """A constant stays constant to the ends; what would alias goes, what would not stays (issue 5)."""
    rate, n = 1000, 10_000
    time = np.arange(n) / rate
    tones = {200: 0, 300: 1, 400: 2}
    records = []
    for number, other in enumerate(RATES):
        adc = np.full((12, int(10 * other)), 1000, np.int16)
        records.append(Record(name=f"c{number}", adc=adc, rate_hz=other, gain=np.full(12, 1000.0),
                              baseline=np.zeros(12, np.int32), subject="s", report="r", split="train"))  # fmt: skip
    adc = np.zeros((12, n), np.int32)
    for hz, lead in tones.items():
        adc[lead] = np.round(1e8 * np.sin(2 * np.pi * hz * time + 0.3))
    records.append(Record(name="tones", adc=adc, rate_hz=rate, gain=np.full(12, 1e8), baseline=np.zeros(12, np.int32),
                          subject="s", report="r", split="train"))  # fmt: skip
    corpus = write(records, tmp_path / "corpus")
    signal = next(
        make_loader(corpus, ids=np.arange(len(corpus)), batch=len(corpus), engine="dali", shuffle=False)
    ).signal
    assert (signal[:-1] - 1).abs().max() <= 1e-6
    tone = signal[-1, :, 100:-100].double()
    rms = tone.square().mean(-1).sqrt() * 2**0.5
    assert abs(rms[tones[200]] - 1) < 1e-3
    assert rms[tones[300]] < 10 ** (-50 / 20) and rms[tones[400]] < 10 ** (-50 / 20)
    assert filter_table(500) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native", "mixed"])
def test_the_gpu_back_end_equals_the_cpu_back_end(request, name):
    corpus = request.getfixturevalue(name)
    loaders = [make_loader(corpus, batch=16, seed=3, engine="dali", device=d) for d in ("cuda", "cpu")]
    for _ in range(8):
        got, expected = (next(loader) for loader in loaders)
        assert (got.signal if got.adc is None else got.adc).is_cuda
        same(got.to("cpu"), expected)
