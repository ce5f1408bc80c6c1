"""The benchmark of the loaders runs anywhere, and refuses to time an engine that is wrong."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from dbeta_bench import loader

QUICK = dict(records=64, turns=1, seconds=0.02, threads=(1,), say=lambda line: None)


def test_rows_of_a_resampled_rate():
    rows = loader.run(rates=(250,), engines=("reference",), **QUICK)
    assert [row["engine"] for row in rows] == ["copy", "reference"]
    assert rows[0]["of_copy"] == 1 and 0 < rows[1]["records_per_s"] < rows[0]["records_per_s"]


def test_only_what_is_read_in_its_turn_counts():
    """Three batches lay ready when the turn began."""

    class Loader:
        ahead, taken = deque([1, 2, 3]), 0

        def __next__(self):
            self.taken += 1
            return SimpleNamespace(records=range(64))

    batches = Loader()
    done, spent = loader._engine(batches, 0.01)
    assert done == 64 * (batches.taken - 3) > 0 and spent >= 0.01


@pytest.mark.slow
def test_rows_against_wfdb():
    rows = loader.run(rates=(500,), engines=("reference",), **QUICK)
    assert [(row["engine"], row["threads"]) for row in rows] == [
        ("copy", 1),
        ("wfdb", 1),
        ("wfdb", 2),
        ("reference", 1),
    ]
    assert rows[3]["x_wfdb_1"] > 1 and rows[3]["x_wfdb_2"] > 1


def test_without_dali_it_says_so(monkeypatch):
    def absent() -> None:
        raise ImportError("DALI cannot be imported")

    said = []
    monkeypatch.setattr(loader.extension, "load_dali", absent)
    rows = loader.run(rates=(250,), **{**QUICK, "say": said.append})
    assert {row["engine"] for row in rows} == {"copy", "reference"} and "without dali: DALI" in said[0]


def test_no_time_for_a_wrong_engine(monkeypatch):
    make = loader.make_loader

    def wrong(*arguments, engine, **options):
        batches = make(*arguments, engine="reference", **options)
        if engine == "dali":
            batches.gain = torch.full_like(batches.gain, 2)
        return batches

    monkeypatch.setattr(loader, "make_loader", wrong)
    monkeypatch.setattr(loader.extension, "load_dali", lambda: None)
    with pytest.raises(ArithmeticError, match=r"dali on cpu .* no time is printed"):
        loader.run(rates=(250,), engines=("dali",), **QUICK)
