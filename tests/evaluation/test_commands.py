"""``dbeta evaluate`` from the command line on a real set: tasks to the end, files written, mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dbeta.cli import main
from dbeta.evaluation import commands
from dbeta.evaluation.evaluate import TASKS
from dbeta.evaluation.label_sets import label_set
from dbeta.evaluation.signals import LEAD_SETS


@pytest.fixture(scope="module")
def folder(model, shared, tmp_path_factory):
    """A model folder, and the ten real records of CPSC2018 as a corpus."""
    folder = tmp_path_factory.mktemp("commands")
    model.save_pretrained(folder / "model")
    root = shared / "data/cinc2021/cpsc_2018"
    done = CliRunner().invoke(
        main, ["prepare", "cpsc2018", str(root), "--out", str(folder / "cpsc2018"), "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    return folder


def run(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)], catch_exceptions=False)


def rows(out: Path):
    return json.loads((out / "results.json").read_text())["rows"]


def test_tasks_and_lead_sets_are_those_of_the_library():
    assert set(commands.TASKS) == {*TASKS, "all"} and tuple(LEAD_SETS) == commands.LEADS
    assert set(commands.OPTIONS) == {
        *commands.COMMON,
        *(name for _, names in commands.TASKS.values() for name in names),
    }


@pytest.mark.parametrize("task", ["zero-shot", "linear-probe", "finetune", "shift"])
def test_a_real_set(task, folder, shared):
    more = {"linear-probe": ["--fraction", "1", "--seed", "1", "--seed", "2", "--epochs", "2"]}
    more["finetune"] = ["--epochs", "1", "--leads", "P-2", "--seed", "3"]
    done = run(
        task, folder / "model", "--data", folder / "cpsc2018", "--splits", shared / "data/merl-splits", "--device",
        "cpu", "--set", "runtime.attention=sdpa", "--bootstrap", "20", *more.get(task, []),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "CPSC2018" in done.output and "meaningless" in done.output and "not run" in done.output
    mine = [row for row in rows(folder / "model" / "evaluation") if row["task"] == task and row["note"] != "not run"]
    assert mine and all(row["split"].startswith("derived by patient") for row in mine)
    assert all(row["left_out"] or row["value"] is not None for row in mine)


def test_figures_and_pairs_of_every_run_lie_together(folder, tmp_path):
    done = run("zero-shot", folder / "model", "--data", folder / "cpsc2018", "--out", tmp_path, "--pairs", "1")
    assert done.exit_code == 0, done.output
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"roc-cpsc2018-12.png", "pair-cpsc2018-0.png"}  # no t-SNE of so few, and the set has no reports


def test_all_as_a_module_says_what_it_cannot_run(folder, tmp_path):
    """A process of its own, as a user starts it."""
    words = ["all", folder / "model", "--data", folder / "cpsc2018", "--out", tmp_path, "--epochs", "1", "--seed", "1"]
    command = [sys.executable, "-m", "dbeta.cli", "evaluate", *map(str, words), "--bootstrap", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not run: identify: " in done.stderr and "needs two or more" in done.stderr
    assert {row["task"] for row in rows(tmp_path) if row["note"] != "not run"} == {"zero-shot", "linear-probe", "shift"}


def test_nothing_is_done_before_all_texts_are_there(folder, synthetic, tmp_path):
    """Prompts for one of two sets: refused before the other is scored."""
    (tmp_path / "p.json").write_text(json.dumps({"cpsc2018": dict.fromkeys(label_set("cpsc2018").labels, "x")}))
    words = ["--data", folder / "cpsc2018", "--data", synthetic.path, "--prompts", tmp_path / "p.json"]
    done = run("zero-shot", folder / "model", *words, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "of synthetic; give one for every class" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zero-shot", "nowhere/model", "--data", "{}/cpsc2018"], "is neither a folder nor on the hub"),
        (["zero-shot", "{}/model", "--data", "{}/none"], "is missing; make one with: dbeta prepare"),
        (["zero-shot", "{}/model", "--data", "{}/cpsc2018", "--sets", "csn"], "nothing to evaluate for zero-shot"),
        (["zero-shot", "{}/model", "--data", "{}/cpsc2018", "--prompts", "p.json"], "--prompts p.json"),
        (["finetune", "{}/model", "--data", "{}/cpsc2018", "--set", "optim.lr=1"], "only runtime.KEY"),
        (["identify", "{}/model", "--data", "{}/cpsc2018"], "identification needs two or more"),
        (["linear-probe", "{}/model", "--data", "{}/cpsc2018", "--fraction", "0"], "0<x<=1"),
        (["zero-shot", "{}/model"], "Missing option '--data'"),
    ],
)
def test_mistakes_are_one_line(words, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run(*(word.format(folder) for word in words))
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("Error")]) == 1
