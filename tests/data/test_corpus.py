"""The corpus folder: what is written, that it is what tar and DALI expect, and every way it can be unusable."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dbeta.data import corpus_writer
from dbeta.data.corpus import Corpus
from dbeta.data.corpus_writer import Options, Plan, drawn_split, write_corpus
from dbeta.data.pool import WorkerPool
from dbeta.data.records import Record, Rejection
from dbeta.data.shards import ShardWriter


def record(number: int, **more) -> Record:
    adc = np.random.default_rng(number).integers(-900, 900, (12, 40 + number % 3)).astype(np.int16)
    more = {"report": f"Report, {number % 4}!", "labels": (f"l{number % 3}",)} | more
    return Record(
        name=f"r{number}", adc=adc, rate_hz=500, gain=np.linspace(200, 1000, 12), subject=f"s{number // 2}",
        baseline=np.arange(12, dtype=np.int32), **more,
    )  # fmt: skip


def read(rows: list[dict]):
    """Every seventh record is rejected, every fifth repaired."""
    for row in rows:
        number = row["number"]
        if number % 7 == 6:
            yield Rejection(name=f"r{number}", reason="bad luck", detail=f"number {number}")
        else:
            yield record(number, notes=(("mended", "a little"),) if number % 5 == 4 else ())


def plan(count: int) -> Plan:
    return Plan(table=pa.table({"number": pa.array(np.arange(count))}), read=read)


OPTIONS = Options(source="test", validation=0.3)


@pytest.fixture(scope="module")
def small_shards():
    """Shards of 20 records."""
    before, corpus_writer.SHARD_RECORDS = corpus_writer.SHARD_RECORDS, 20
    yield
    corpus_writer.SHARD_RECORDS = before


@pytest.fixture(scope="module")
def corpus(small_shards, tmp_path_factory) -> Corpus:
    out = tmp_path_factory.mktemp("corpus") / "c"
    write_corpus(plan(100), OPTIONS, out, workers=1)
    return Corpus.open(out)


def test_contents(corpus):
    names, reports = corpus.column("name"), corpus.column("report")
    assert len(corpus) == len(names) == 86 and set(names) == {f"r{n}" for n in range(100) if n % 7 != 6}
    assert names != sorted(names, key=lambda name: int(name[1:]))  # permuted
    for row, name in enumerate(names):
        expected = record(int(name[1:]))
        np.testing.assert_array_equal(corpus.read_adc(row), expected.adc)
        np.testing.assert_array_equal(corpus.read_adc(row, 9), expected.adc[:, :9])
        assert corpus.reports[reports[row]] == f"report {int(name[1:]) % 4}"
    assert corpus.column("gain", [3, 1]).shape == (2, 12) and corpus.column("labels", [0])[0][0] in corpus.labels
    assert corpus.labels == ["l0", "l1", "l2"] and len(corpus.reports) == 4 and corpus.source == "test"
    counts = pq.read_table(corpus.path / "reports.parquet")["count"].to_pylist()
    assert counts == np.bincount(reports).tolist() and sum(counts) == 86
    lines = (corpus.path / "rejected.csv").read_text().splitlines()
    assert lines[0] == "name,reason,action,detail" and "r6,bad luck,rejected,number 6" in lines
    assert sum(",rejected," in line for line in lines) == corpus.info["rejected"] == 14
    assert sum(",repaired," in line for line in lines) == corpus.info["repaired"] == 18
    assert corpus.info["records"] + corpus.info["rejected"] == 100 and corpus.damage() == []


def test_splits_go_by_subject(corpus):
    subject = np.array(corpus.column("subject"))
    train, held = (set(subject[corpus.split_ids(split)]) for split in ("train", "validation"))
    assert train and held and not train & held and len(corpus.split_ids("test")) == 0
    assert all(drawn_split(s, 0, 0.3) == "validation" for s in held)
    assert len(corpus.split_ids("all")) == 86
    share = np.mean([drawn_split(str(i), 1, 0.05) == "validation" for i in range(20_000)])
    assert 0.045 < share < 0.055


def test_shards_are_what_tar_and_dali_expect(corpus):
    """Ids count up from 0 through all shards although records were rejected in each; the index is wds2idx's own."""
    seen = []
    for shard in corpus.info["shards"]:
        path = corpus.path / "shards" / shard["name"]
        assert path.stat().st_size == shard["bytes"]
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert len(members) == 2 * shard["records"]
            for identity, samples in zip(members[::2], members[1::2]):
                number = int.from_bytes(tar.extractfile(identity).read(), "little")
                assert (identity.name, samples.name) == (f"{number:08d}.id", f"{number:08d}.adc")
                assert samples.offset_data == corpus.column("offset")[number]
                assert tar.extractfile(samples).read() == corpus.read_adc(number).tobytes()
                seen.append(number)
    assert seen == list(range(86)) and len(corpus.info["shards"]) == 5


def test_index_is_that_of_wds2idx(corpus, tmp_path):
    maker = pytest.importorskip("wds2idx", reason="DALI is not installed")
    for shard in corpus.info["shards"]:
        path = corpus.path / "shards" / shard["name"]
        creator = maker.IndexCreator(str(path), str(tmp_path / "x.idx"), verbose=False)
        creator.create_index()
        creator.close()
        assert (tmp_path / "x.idx").read_text() == path.with_suffix(".idx").read_text()


def same(left, right) -> None:
    """Every file byte for byte."""
    files = [sorted(p.relative_to(r).as_posix() for p in r.rglob("*") if p.is_file()) for r in (left, right)]
    assert files[0] == files[1] and len(files[0]) > 5
    for name in files[0]:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_the_bytes_depend_on_the_seed_alone(corpus, small_shards, tmp_path):
    write_corpus(plan(100), OPTIONS, tmp_path / "again", workers=1)
    same(corpus.path, tmp_path / "again")
    write_corpus(plan(100), Options(source="test", validation=0.3, seed=1), tmp_path / "other", workers=1)
    assert Corpus.open(tmp_path / "other").column("name") != corpus.column("name")


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up after it."""


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [(os, "replace", (0, 1, 2, 5, 10, 15, 18)), (os, "fsync", (0, 4, 20, 33)), (ShardWriter, "_append", (0, 13, 333)),
     (shutil, "rmtree", [0])],
)  # fmt: skip
def test_stopped_anywhere_it_goes_on(where, name, calls, corpus, small_shards, tmp_path, monkeypatch):
    """Stopped at one call of a function after another; every time, the same command finishes the same corpus."""
    real = getattr(where, name)
    for at in calls:
        out, countdown = tmp_path / str(at), iter(range(at, -1, -1))

        def stopping(*arguments, countdown=countdown, **more):
            if next(countdown) == 0:
                raise Killed
            return real(*arguments, **more)

        monkeypatch.setattr(where, name, stopping)
        with pytest.raises(Killed):
            write_corpus(plan(100), OPTIONS, out, workers=1)
        monkeypatch.undo()
        if (out / "corpus.json").exists():  # stopped while tidying up
            shutil.rmtree(out / "parts")
        else:
            with pytest.raises(ValueError, match=r"unfinished|is no corpus"):
                Corpus.open(out)
            write_corpus(plan(100), OPTIONS, out, workers=1)
        same(corpus.path, out)


def test_worker_processes_write_the_same(corpus, small_shards, tmp_path):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "from pathlib import Path\n"
        "from dbeta.data import corpus_writer; corpus_writer.SHARD_RECORDS = 20\n"
        "from test_corpus import OPTIONS, plan\n"
        "corpus_writer.write_corpus(plan(100), OPTIONS, Path(sys.argv[3]), workers=2)\n"
    )
    here, root = os.path.dirname(__file__), os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    subprocess.run([sys.executable, "-c", code, here, root, str(tmp_path / "c")], check=True, timeout=120)
    same(corpus.path, tmp_path / "c")


def test_an_unfinished_corpus_is_only_continued_with_its_options(small_shards, tmp_path, monkeypatch):
    out = tmp_path / "c"
    monkeypatch.setattr(corpus_writer, "_finish", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        write_corpus(plan(40), OPTIONS, out, workers=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another seed, cleaning"):
        write_corpus(plan(40), Options(source="test", validation=0.3, seed=2, cleaning="released"), out, workers=1)
    with corpus_writer._claimed(out, OPTIONS), pytest.raises(ValueError, match="another dbeta prepare"):
        write_corpus(plan(40), OPTIONS, out, workers=1)
    write_corpus(plan(40), OPTIONS, out, workers=1)
    with pytest.raises(ValueError, match="already a corpus"):
        write_corpus(plan(40), OPTIONS, out, workers=1)


def test_a_killed_worker_is_named():
    with pytest.raises(ValueError, match="--workers"), WorkerPool(2) as pool:
        list(pool(os._exit, [(9,), (9,)]))


def rejecting(rows: list[dict]):
    for row in rows:
        reason = "flat" if row["number"] % 3 else "wrong rate"
        yield Rejection(name=f"r{row['number']:02d}", reason=reason, detail=f"number {row['number']}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_without_a_record_is_an_error(small_shards, tmp_path, workers, monkeypatch):
    """Also of a run that was killed; rejected.csv stays, and the same folder takes the repaired records."""
    out, table = tmp_path / "c", plan(30).table
    said = (
        "test: 30 records found and all rejected, 20 of them for: flat (such as r01: number 1); "
        f"see {out}/rejected.csv, put the records right or give another ROOT, and repeat the command"
    )
    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(corpus_writer, "_none_kept", lambda *_: (_ for _ in ()).throw(Killed()))
        write_corpus(Plan(table=table, read=rejecting), OPTIONS, out, workers=workers)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            write_corpus(Plan(table=table, read=rejecting), OPTIONS, out, workers=workers)
        assert [path.name for path in out.iterdir()] == ["rejected.csv"]
        lines = (out / "rejected.csv").read_text().splitlines()
        assert len(lines) == 31 and lines[1] == "r00,wrong rate,rejected,number 0"
    write_corpus(plan(30), Options(source="test", seed=5), out, workers=workers)
    assert len(Corpus.open(out)) == 26


def test_a_users_rejected_csv_is_not_taken(tmp_path):
    for content in ("name,reason,action,details\n", "years of work"):
        (tmp_path / "rejected.csv").write_text(content)
        with pytest.raises(ValueError, match="is not empty and not an unfinished corpus"):
            write_corpus(plan(5), OPTIONS, tmp_path, workers=1)
        assert [path.name for path in tmp_path.iterdir()] == ["rejected.csv"]
        assert (tmp_path / "rejected.csv").read_text() == content


@pytest.fixture
def copy(corpus, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_unusable_folders(copy, tmp_path):
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Corpus.open(copy)

    info = json.loads((copy / "corpus.json").read_text())
    for change, match in (
        ({"version": 2}, "format version 2, dbeta reads up to 1"), ({"format": "zarr"}, "not a dbeta corpus"),
        ({"records": 0}, "empty"), ({"records": 85}, "damaged"), ({"shards": None}, "damaged"),
    ):  # fmt: skip
        (copy / "corpus.json").write_text(json.dumps(info | change))
        refused(match)
    for text in ("", "[]", "{", '{"format": "dbeta-corpus"}'):
        (copy / "corpus.json").write_text(text)
        refused("damaged|not a dbeta corpus")
    (copy / "corpus.json").write_text(json.dumps(info))
    for name in ("shards/00002.tar", "records.parquet", "reports.parquet"):
        whole = (copy / name).read_bytes()
        for part in (whole[:-1], whole[: len(whole) // 2], None):
            (copy / name).unlink() if part is None else (copy / name).write_bytes(part)
            refused("damaged")
        (copy / name).write_bytes(whole)
    Corpus.open(copy)
    with pytest.raises(ValueError, match="is missing; make one with: dbeta prepare"):
        Corpus.open(tmp_path / "nowhere")
    (copy / "corpus.json").unlink()
    refused("no corpus")


@pytest.mark.parametrize("name", ["shards/00001.tar", "records.parquet", "reports.parquet", "rejected.csv"])
def test_a_flipped_bit_is_found_by_checksums(name, copy):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 3] ^= 1
    (copy / name).write_bytes(content)
    corpus = Corpus(copy, json.loads((copy / "corpus.json").read_text()))
    assert corpus.damage() == [name]


def test_shared_by_processes_and_threads(corpus):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(corpus.read_adc, (5,)), corpus.read_adc(5))
