"""The benchmark's command, timing, comparison and tables."""

import dataclasses
import itertools
import json
import time

import pytest
import torch
from click.testing import CliRunner

from dbeta_bench import results, timing
from dbeta_bench.cli import BENCHMARKS, main
from dbeta_kernels.registry import specs
from tools import readme_tables

CPU = torch.device("cpu")


def test_commands_and_options():
    assert set(main.commands) == {*BENCHMARKS, "all"}
    own = {"kernels": {"compile_only", "operators"}, "step": {"workloads", "providers", "batch"}}
    own["negatives"] = {"reports", "whole"}
    for name, command in main.commands.items():
        assert {p.name for p in command.params} == {"out", "against", "device", *own.get(name, ())}


def test_interleaved_providers_take_turns_and_are_ordered():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    calls = {"slow": sleeper("slow", 0.02), "fast": sleeper("fast", 0.001)}
    taken = timing.interleave(calls, device=CPU, repeats=4, warmup=0)
    assert order == ["slow", "fast", "fast", "slow"] * 2
    assert taken["slow"]["median"] > 0.02 > taken["fast"]["low"] >= 0.001
    assert taken["slow"]["low"] <= taken["slow"]["median"] <= taken["slow"]["high"]
    assert taken["slow"]["timed"] == "clock"


def test_no_time_for_a_wrong_operator(monkeypatch, tmp_path):
    from dbeta_bench import kernels, roofline

    monkeypatch.setattr(roofline, "measure", lambda device: roofline.Roofline(1e9, {torch.float32: 1e9}))
    monkeypatch.setattr(timing, "interleave", lambda *_, **__: pytest.fail("a wrong operator was timed"))
    exact = specs()["mem_loss"]
    wrong = lambda **given: 1.01 * exact.function(**given)  # noqa: E731
    spec = dataclasses.replace(exact, cpu={"B=1": {"records": 1, "masked": 3}}, function=wrong)
    monkeypatch.setattr(kernels, "specs", lambda: {"mem_loss": spec})
    outcome = CliRunner().invoke(main, ["kernels", "--device", "cpu", "--operator", "mem_loss"])
    assert outcome.exit_code == 1
    assert "out0" in outcome.output and "error" in outcome.output


def test_no_time_for_a_wrong_peer(monkeypatch):
    from dbeta_bench import kernels, roofline

    monkeypatch.setattr(roofline, "measure", lambda device: roofline.Roofline(1e9, {torch.float32: 1e9}))
    exact = specs()["mem_loss"]
    peers = {"right": exact.reference, "wrong": lambda **given: 1.01 * exact.reference(**given)}
    spec = dataclasses.replace(exact, cpu={"B=1": {"records": 1, "masked": 3}}, peers=peers)
    monkeypatch.setattr(kernels, "specs", lambda: {"mem_loss": spec})
    said = []
    rows = kernels.run(device="cpu", repeats=1, say=said.append)
    assert [row["provider"] for row in rows][-3:] == ["eager", "compiled", "right"]
    assert any("wrong is not timed, it is wrong: out0" in line for line in said)


def test_unknown_operator_is_a_usage_error():
    outcome = CliRunner().invoke(main, ["kernels", "--device", "cpu", "--operator", "softmax"])
    assert outcome.exit_code == 2
    assert "softmax; accepted are ets_loss" in outcome.output


def test_results_are_compared_row_by_row(tmp_path):
    row = {"operator": "ets_loss", "case": "B=8", "median": 2.0, "timed": "clock"}
    old = results.document("cpu", {"kernels": [row]})
    results.save(tmp_path / "old.json", old)
    new = results.document("cpu", {"kernels": [row | {"median": 1.0}, row | {"case": "B=9"}]})
    lines = list(results.compare(new, results.load(tmp_path / "old.json")))
    assert lines == [
        "kernels ets_loss B=8: median 2 -> 1 (0.50x)",
        "kernels ets_loss B=9: not in the older results",
    ]
    assert {"device", "driver", "date", "commit", "packages"} <= set(new)
    other = new | {"device": "another"}
    assert "different devices" in next(iter(results.compare(other, old)))


@pytest.mark.parametrize("content", [b"[]", b"# A document", b"\xff\x00"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    with pytest.raises(ValueError, match="holds no benchmark results"):
        results.load(tmp_path / "other.json")


def test_tables_come_from_results(tmp_path):
    rows = [{"operator": "a", "ms": 1.23456, "median": 1e-3, "peak_mb": None}, {"operator": "b", "ms": 20.0}]
    path = tmp_path / "bench" / "results" / "cpu.json"
    results.save(path, results.document("cpu", {"kernels": rows}))
    text = "before\n<!-- table:cpu/kernels -->\nold\n<!-- /table -->\nafter\n"
    new = readme_tables.filled(text, tmp_path)
    assert "| operator | ms |\n|---|---|\n| a | 1.235 |\n| b | 20 |\n<!-- /table -->\nafter" in new
    assert json.loads(path.read_text())["commit"] in new
    assert "old" not in new
    assert readme_tables.filled(new, tmp_path) == new
    with pytest.raises(SystemExit, match=r"gpu/kernels.*does not exist"):
        readme_tables.filled(text.replace("cpu/", "gpu/"), tmp_path)


def test_inputs_rotate_on_a_gpu_only():
    made = itertools.count()
    source = timing.rotation(lambda seed: {"seed": seed, "n": next(made)}, CPU)
    assert [source()["seed"] for _ in range(3)] == [0, 0, 0]


def test_features_are_timed_only_where_they_agree(monkeypatch):
    from dbeta_bench import encode

    sizes = {
        "width": 48,
        "stem_width": 16,
        "ecg_layers": 1,
        "ecg_heads": 4,
        "ecg_ffn": 48,
        "fusion_heads": 4,
        "pos_kernel": 8,
    }
    rows = encode.run(batches=(1, 2), repeats=2, say=lambda line: None, **sizes)
    assert [(row["encoder"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in ("encode_ecg", "torch.export")
    ]
    assert all(row["records_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3) for row in rows)
    monkeypatch.setattr(encode, "TOLERANCE", -1.0)
    with pytest.raises(ArithmeticError, match="no time is given"):
        encode.run(batches=(1,), repeats=2, say=lambda line: None, **sizes)
