"""The benchmark of negatives runs anywhere, and refuses to time a search that is wrong."""

import json

import pytest
import torch
from click.testing import CliRunner

from dbeta.data import farthest
from dbeta_bench import negatives
from dbeta_bench.cli import main


@pytest.fixture(autouse=True)
def tiny_t5(monkeypatch):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=4096)
    monkeypatch.setattr(negatives, "_small_t5", lambda: T5EncoderModel(config).eval())
    monkeypatch.setattr(negatives, "WIDTH", 16)


def test_rows_of_every_stage():
    rows = negatives.run(reports=(300,), queries=64, k=8, engines=("torch",), say=lambda line: None)
    stages = [row["stage"] for row in rows]
    assert stages == ["embed", "search", "embed", "hubness", "hubness", "hubness", "draw", "draw"]
    table, released = rows[-2:]
    assert 0 < table["us_per_negative"] < released["us_per_negative"]


def test_the_sizes_are_those_of_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(negatives, "whole_table", lambda count, *_: {"stage": "whole table", "reports": count})
    options = ["--reports", "130", "--reports", "140", "--whole", "--out", str(tmp_path / "rows.json")]
    outcome = CliRunner().invoke(main, ["negatives", "--device", "cpu", *options])
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]["negatives"]
    assert {row["reports"] for row in rows if row["stage"] == "whole table"} == {130, 140}
    assert [row["reports"] for row in rows if row.get("encoder") == "hashing"] == [130, 140]


def test_unique_reports_are_unique_and_repeatable():
    texts = negatives.unique_reports(500)
    assert len(set(texts)) == 500 and texts[:100] == negatives.unique_reports(100)


def test_no_time_for_a_wrong_search(monkeypatch):
    monkeypatch.setitem(
        farthest.ENGINES, "torch", (lambda q, k, n: (q @ k.T).topk(n, largest=True), lambda keys: 4096)
    )  # the nearest, not the farthest
    with pytest.raises(ArithmeticError, match="no time is printed"):
        negatives._search_rows(farthest_vectors(), ("torch",), 64, 8)


def farthest_vectors() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), dim=1)
