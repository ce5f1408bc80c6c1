"""The main job from its command line: it trains, it survives kill -9, and its mistakes are one line each."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dbeta import checkpoint
from dbeta.cli import main, pretrain

QUICK = (
    "train.steps=14", "train.batch=16", "train.log_every=5", "train.eval_every=7", "train.checkpoint_every=4",
    "train.eval_records=24", "data.workers=1", "model.dropout=0.1",
)  # fmt: skip
TIMES = {"records_per_s"}
SHARD = "shard-00001.safetensors"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "synthetic"
    result = CliRunner().invoke(main, ["prepare", "synthetic", "--out", str(folder), "--limit", "160"])
    assert result.exit_code == 0, result.output
    return folder


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    settings = [word for value in QUICK for word in ("--set", value)]
    return ["--preset", "smoke", "--device", "cpu", "--data", str(corpus), "--out", str(out), *settings, *more]


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    result = CliRunner().invoke(pretrain, command(corpus, out), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def test_run_folder(run):
    lines = metrics(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [5, 10, 14]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [7, 14]
    assert all(abs(value) < 1e4 for line in lines for value in line.values() if isinstance(value, float))
    assert {"mlm", "mem", "etm", "ets", "etm_accuracy", "recall_at_1", "zero_shot_auc"} <= set(lines[-1])
    assert json.loads((run / "config.json").read_text())["train"]["batch"] == 16
    assert "torch" in json.loads((run / "environment.json").read_text())["packages"]
    page = (run / "report.html").read_text()
    assert page.count("<img") == 3 and "http" not in page.replace("<!doctype html>", "")
    assert len(checkpoint.whole(run / "checkpoints")) == 2


def test_killed_and_resumed_equals_uninterrupted(run, corpus, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "dbeta.pretrain", *command(corpus, out)], env=os.environ)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "step-00000008").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before step 8"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = CliRunner().invoke(pretrain, command(corpus, out, "--resume"), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert metrics(out) == metrics(run)
    found, wanted = (checkpoint.latest(folder / "checkpoints") / SHARD for folder in (out, run))
    assert found.read_bytes() == wanted.read_bytes()


def test_damaged_newest_checkpoint_falls_back(run, corpus, tmp_path, capfd):
    newest = checkpoint.whole(run / "checkpoints")[-1]
    for name in (SHARD, "state.json", "manifest.json"):
        whole = (newest / name).read_bytes()
        try:
            (newest / name).write_bytes(whole[: len(whole) // 2])
            assert checkpoint.damage(newest)
            assert checkpoint.latest(run / "checkpoints") == checkpoint.whole(run / "checkpoints")[-2]
        finally:
            (newest / name).write_bytes(whole)
    assert "is damaged" in capfd.readouterr().err


def test_a_run_killed_before_its_report_writes_it_when_resumed(run, corpus, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "report.html").unlink()
    result = CliRunner().invoke(pretrain, command(corpus, copy, "--resume"), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    wanted = (run / "report.html").read_text()
    assert (copy / "report.html").read_text() == wanted.replace(str(run), str(copy))


def fails(arguments: list[str], *words: str) -> None:
    result = CliRunner().invoke(pretrain, arguments)
    assert result.exit_code == 2, result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and "Traceback" not in result.output
    assert all(word in last for word in words), last


def test_mistakes_are_one_line(corpus, run, tmp_path):
    fails(["--set", "train.stesp=3"], "train.stesp", "train.steps")
    fails(["--preset", "papre"], "papre", "paper")
    fails(command(tmp_path / "none", tmp_path / "out"), "none", "dbeta prepare")
    fails(command(corpus, run), "--resume")
    fails(command(corpus, tmp_path / "new", "--resume"), "holds no run")
    fails(command(corpus, run, "--resume", "--set", "model.width=48"), "model.width")
    (tmp_path / "file").write_text("")
    fails(command(corpus, tmp_path / "file" / "out"), "cannot be written")
    fails(command(corpus, tmp_path / "big", "--set", "train.batch=4096"), "4096")


def test_corpora_that_cannot_be_used(corpus, tmp_path):
    stored = json.loads((corpus / "corpus.json").read_text())
    for name, change, word in (
        ("newer", {"version": 99}, "99"),
        ("other", {"format": "x"}, "corpus"),
        ("empty", {"records": 0}, "empty"),
    ):
        shutil.copytree(corpus, tmp_path / name)
        (tmp_path / name / "corpus.json").write_text(json.dumps(stored | change))
        fails(command(tmp_path / name, tmp_path / "out"), word)


def test_checkpoint_of_another_shape(run, corpus, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["width"], config["model"]["ecg_heads"] = 48, 4
    (copy / "config.json").write_text(json.dumps(config))
    fails(["--data", str(corpus), "--out", str(copy), "--resume"], "does not fit the model", "the model has")


@pytest.mark.parametrize("preset", ["paper", "released", "hopper"])
def test_real_presets_never_train_a_random_text_encoder(preset, corpus, tmp_path):
    fails(
        ["--preset", preset, "--device", "cpu", "--data", str(corpus), "--out", str(tmp_path / "out")],
        "model.text_weights=DIR|random", "dbeta negatives", "--encoder DIR|hashing",
    )  # fmt: skip
