"""The benchmark over ranks runs anywhere, and refuses to time what is not the loss of the whole batch."""

import json

import pytest
import torch
from click.testing import CliRunner

from dbeta.ets import ring_ets_loss
from dbeta_bench import ranks
from dbeta_bench.cli import main


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"WORLDS": (2,), "BATCHES": (4,), "WIDTH": 8}.items():
        monkeypatch.setattr(ranks, name, value)


def test_rows(tmp_path):
    outcome = CliRunner().invoke(main, ["ranks", "--device", "cpu", "--out", str(tmp_path / "rows.json")])
    assert outcome.exit_code == 0, outcome.output
    rows = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]["ranks"]
    assert [row["provider"] for row in rows] == list(ranks.PROVIDERS)
    assert all((row["world"], row["batch"], row["width"]) == (2, 4, 8) and row["peak_mb"] > 0 for row in rows)
    assert all(row["ratio"] == pytest.approx(row["ms"] / rows[0]["ms"]) for row in rows)


def steep(**inputs):
    """The ring's loss; its gradients are 1 % off."""
    loss = ring_ets_loss(**inputs)
    return 1.01 * loss - 0.01 * loss.detach()


def test_no_time_for_a_wrong_provider(monkeypatch):
    monkeypatch.setitem(ranks.PROVIDERS, "steep", steep)
    said = []
    with pytest.raises(ArithmeticError, match=r"steep over 2 ranks \(batch\).* no time is given"):
        ranks.run(say=said.append)
    assert not said


def test_one_gpu_is_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = []
    assert ranks.run(device="cuda", say=said.append) == [] and "NCCL wants one for each process" in said[0]
