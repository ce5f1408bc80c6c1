"""The list of commands and options is a contract: a change here is a change of the interface."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from dbeta.cli import main, pretrain

EVALUATE = {"--data", "--out", "--untrained", "--bootstrap", "--device", "--set"}
SETS = {"--splits", "--derive", "--patients", "--sets", "--labels"}
OPTIONS = {
    "pretrain": {
        "--preset", "--data", "--out", "--resume", "--compile", "--device", "--seed", "--set", "--show-examples",
    },
    "prepare": {"--out", "--workers", "--limit", "--seed", "--cleaning"},
    "import-checkpoint": {"--config", "--lead-order", "--tokenizer", "--out"},
    "embed": {"--out", "--column", "--lengths", "--batch", "--workers", "--device"},
    "ask": {"--prompts", "--out", "--tokenizer", "--column", "--lengths", "--batch", "--workers", "--device"},
    "doctor": {"--checksums", "--splits", "--against", "--json", "--limit"},
    "export": {"--out"},
    "negatives": {"--encoder", "--k", "--device", "--engine", "--remedy"},
    "evaluate zero-shot": {
        *EVALUATE, *SETS, "--prompts", "--leads", "--annotations", "--figures", "--pairs",
    },
    "evaluate linear-probe": {*EVALUATE, *SETS, "--leads", "--fraction", "--seed", "--epochs"},
    "evaluate finetune": {*EVALUATE, *SETS, "--leads", "--scoring", "--seed", "--epochs", "--lr"},
    "evaluate identify": {*EVALUATE, "--leads", "--patients", "--seed", "--epochs", "--lr"},
    "evaluate shift": {*EVALUATE, *SETS, "--prompts"},
    "evaluate all": {
        *EVALUATE, *SETS, "--prompts", "--leads", "--annotations", "--figures", "--pairs", "--fraction", "--seed",
        "--epochs", "--lr", "--scoring",
    },
    "evaluate ablations": {"--preset", "--corpus", "--data", "--splits", "--patients", "--scoring", "--out"},
}  # fmt: skip


def commands():
    found = {"pretrain": pretrain}
    for name, command in main.commands.items():
        group = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {inner}": part for inner, part in group.items()} or {name: command}
    return found


def test_commands():
    assert set(commands()) == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    declared = {p.opts[0] for p in commands()[name].params if p.param_type_name == "option"} - {"--help"}
    assert declared == OPTIONS[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_help_explains_every_option(name):
    assert CliRunner().invoke(commands()[name], ["--help"]).exit_code == 0
    options = [p for p in commands()[name].params if p.param_type_name == "option"]
    assert all(option.help for option in options)


def test_help_does_not_wait_for_torch():
    code = "import sys, dbeta.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
