"""The list of commands and options is a contract: a change here is a change of the interface."""

import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from dbeta.cli import main, pretrain
from dbeta.one_line import PathType
from dbeta_bench.cli import main as bench

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


@pytest.mark.parametrize("name", OPTIONS)
def test_no_path_may_be_empty(name):
    checked = [*commands()[name].params, *(p for part in bench.commands.values() for p in part.params)]
    assert all(isinstance(p.type, PathType) for p in checked if isinstance(p.type, click.Path))


def test_help_does_not_wait_for_torch():
    code = "import sys, dbeta.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (main, "--versoin", ("dbeta: No such option '--versoin'", "--version", "see dbeta --help")),
        (main, "emebd", ("dbeta: No such command 'emebd'", "see dbeta --help")),
        (main, "prepare", ("dbeta prepare: Missing argument", "ptb-xl", "synthetic", "see dbeta prepare --help")),
        (main, "prepare ptb-xl .", ("dbeta prepare: Missing option '--out'", "see dbeta prepare --help")),
        (main, "prepare ptb_xl . --out c", ("'ptb_xl' is not one of", "'ptb-xl'", "see dbeta prepare --help")),
        (main, "prepare ptb-xl . --out c --workers 0", ("'--workers': 0 is not in the range x>=1",)),
        (main, "export MODEL more --out e.pt2", ("dbeta export: Got unexpected extra argument (more)",)),
        (main, "evaluate", ("Usage: dbeta evaluate",)),
        (main, "evaluate all MODEL", ("Missing option '--data'", "see dbeta evaluate all --help")),
        (main, "evaluate al MODEL", ("dbeta evaluate: No such command 'al'", "see dbeta evaluate --help")),
        (main, "doctor ''", ("dbeta doctor: Invalid value for 'PATH': the path is empty", "see dbeta doctor --help")),
        (pretrain, "--out ''", ("dbeta-pretrain: Invalid value for '--out': the path is empty",)),
        (main, f"import-checkpoint x --out {__file__}", ("test_cli.py is no folder; choose another place",)),
        (pretrain, "--seed x", ("dbeta-pretrain: Invalid value for '--seed'", "see dbeta-pretrain --help")),
        (bench, "--device cpu", ("dbeta-bench: No such option '--device'", "see dbeta-bench --help")),
        (bench, "step --batch 0", ("dbeta-bench step: Invalid value for '--batch'", "see dbeta-bench step --help")),
        (bench, "step --workload uniform --device cpu", ("workload 'uniform'; accepted: real",)),
        (bench, "kernels --compile-only --out f", ("it takes no other option", "see dbeta-bench kernels --help")),
    ],
)
def test_mistakes_are_one_line(command, words, told):
    """Click's own, too: the command, what is wrong, and where to look; only a group alone shows its help."""
    name = {main: "dbeta", pretrain: "dbeta-pretrain", bench: "dbeta-bench"}[command]
    done = CliRunner().invoke(command, shlex.split(words), prog_name=name)
    assert done.exit_code == 2 and all(word in done.stderr for word in told), done.output
    if words != "evaluate":
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1 and not done.stdout.count("Usage")
