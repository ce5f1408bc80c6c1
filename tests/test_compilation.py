"""Compilation of the step: room for every shape of text, few shapes, no graph break, bf16 beside float32."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dbeta import compilation
from dbeta.config import Config, LossConfig, RuntimeConfig
from dbeta.data.batch import TEXT_BUCKETS, BatchMaker, TextVocabulary
from dbeta.data.reports import TokenTable
from dbeta_bench.step import workload

CPU = torch.device("cpu")


@pytest.fixture
def compile_quickly(monkeypatch):
    """Dynamo alone, without a compiler behind it."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def test_every_shape_gets_its_graph(compile_quickly):
    """More shapes than torch allows a function by default; with fullgraph one too many would be an error."""
    step = compilation.compiled(torch.sin, RuntimeConfig(compile=True), CPU)
    for size in range(2, 22):
        step(torch.ones(size))
    assert "20 graphs" in (said := compilation.report()) and "0 graph breaks" in said


def test_the_cache_of_cpp_dies_with_the_process(tmp_path):
    """A kill leaves half a library in it, which would end every later run; one that is asked for is kept."""
    code = "import os, torch; from dbeta import compilation as c; from dbeta.config import RuntimeConfig as R\n"
    code += "c.compiled(torch.sin, R(compile=True), torch.device('cpu')); f = os.environ['TORCHINDUCTOR_CACHE_DIR']\n"
    code += "print(f, os.path.isdir(f))"
    environ = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}

    def folder(**more):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environ | more, capture_output=True, text=True, check=True)
        return done.stdout.split()

    name, there = folder()
    assert "dbeta-compiled-" in name and there == "True" and not Path(name).exists()
    asked = tmp_path / "asked"
    assert folder(TORCHINDUCTOR_CACHE_DIR=str(asked)) == [str(asked), "True"] and asked.is_dir()


def test_not_compiled_as_it_is():
    assert compilation.compiled(torch.sin, RuntimeConfig(), CPU) is torch.sin


def test_a_graph_break_is_an_error(compile_quickly):
    def reads(x):
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compilation.compiled(reads, RuntimeConfig(compile=True), CPU)(torch.ones(3))


@pytest.mark.parametrize(
    ("config", "device", "used"),
    [
        (RuntimeConfig(compile=True), "cuda", True),
        (RuntimeConfig(compile=True), "cpu", False),
        (RuntimeConfig(compile=True, cuda_graphs=False), "cuda", False),
        (RuntimeConfig(), "cuda", False),
        (RuntimeConfig(compile=True, compile_scope="layers"), "cuda", False),
    ],
)
def test_where_graphs_are_used(config, device, used):
    assert compilation.uses_graphs(config, torch.device(device)) == used
    assert not compilation.uses_graphs(config, torch.device(device), alone=False)


def shapes(name: str, batch: int = 128, steps: int = 60):
    """The shapes of steps on reports with the lengths of ``name``, and those that are just large enough."""
    lengths = workload(name)
    draw = np.random.default_rng(0)
    ids = torch.from_numpy(draw.integers(3, 90, lengths.sum(), dtype=np.int32))
    table = TokenTable(ids, torch.from_numpy(np.concatenate([[0], lengths.cumsum()])))
    maker = BatchMaker(
        torch.arange(len(lengths)), table, None, TextVocabulary(size=90, mask=2, special=(0,)), Config().data,
        LossConfig(), seed=0, batch=batch, ecg_tokens=312,
    )  # fmt: skip
    for step in range(steps):
        records = torch.from_numpy(draw.integers(0, len(lengths), batch))
        yield [maker.shape(records, step, torch.arange(batch), bucketed=b) for b in (True, False)]


@pytest.mark.parametrize(("name", "most"), [("real", 8), ("uniform40", 1), ("uniform64", 1)])
def test_shapes_are_few_and_hold_the_batch(name, most):
    seen = set()
    for shape, least in shapes(name):
        assert shape.length in TEXT_BUCKETS
        assert shape.length >= least.length and shape.slots >= least.slots and shape.tokens >= least.tokens
        assert shape.tokens < 1.25 * least.tokens and shape.slots < 1.5 * least.slots  # and little is computed in vain
        seen.add(shape)
    assert 1 <= len(seen) <= most


def pretrain(tmp_path, *settings: str, compiled: bool = False) -> subprocess.CompletedProcess:
    chosen = [word for value in settings for word in ("--set", value)]
    corpus = ["--data", str(tmp_path / "corpus")] if (tmp_path / "corpus").is_dir() else []
    command = [sys.executable, "-m", "dbeta.pretrain", "--preset", "smoke", "--device", "cpu", *corpus, *chosen]
    command += ["--compile"] * compiled
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)


@pytest.mark.slow
def test_pretraining_compiles_without_a_graph_break(tmp_path):
    done = pretrain(tmp_path, "train.steps=20", "data.synthetic_records=600", "train.eval_records=32", compiled=True)
    assert ", 0 graph breaks, " in done.stderr


def curves(tmp_path, steps: int, *settings: str) -> list[np.ndarray]:
    """The smoke preset's mean total loss over every 25 steps, for each setting; the same seed and corpus."""
    subprocess.run(
        [sys.executable, "-m", "dbeta.cli", "prepare", "synthetic", "--limit", "1000", "--out", tmp_path / "corpus"],
        check=True, capture_output=True,
    )  # fmt: skip
    found = []
    for setting in settings:
        pretrain(tmp_path, f"train.steps={steps}", "train.log_every=25", "train.eval_records=32", setting)
        (path,) = tmp_path.glob("runs/*/metrics.jsonl")
        lines = map(json.loads, path.read_text().splitlines())
        found.append(np.array([line["total"] for line in lines if line["kind"] == "train"]))
        (tmp_path / "runs").rename(tmp_path / setting)
    assert all(len(curve) == steps // 25 and curve[-1] < 0.9 * curve[0] for curve in found)
    return found


@pytest.mark.slow
def test_bf16_trains_as_float32_does(tmp_path):
    """200 steps: every mean within 3 %."""
    exact, rounded = curves(tmp_path, 200, "runtime.precision=fp32", "runtime.precision=bf16")
    assert not np.array_equal(exact, rounded), "bf16 was not used"
    np.testing.assert_allclose(rounded, exact, rtol=0.03)


@pytest.mark.slow
def test_removals_train_as_the_dense_network_does(tmp_path):
    """100 steps: the same curve to float32's rounding."""
    dense, removed = curves(tmp_path, 100, "runtime.removals=false", "runtime.removals=true")
    np.testing.assert_allclose(removed, dense, rtol=1e-5)
