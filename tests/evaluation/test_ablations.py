"""The grid of ablations is made of settings that exist, its lines parse, results are summed up as the paper does."""

import shlex

import pytest
from click.testing import CliRunner

from dbeta.cli import main, pretrain
from dbeta.config import Config
from dbeta.evaluation import results
from dbeta.evaluation.ablations import GRID, commands
from dbeta.evaluation.paper import ABLATIONS, VALUES, ZERO_SHOT_ABLATIONS
from dbeta.evaluation.results import METRICS, Result


def test_every_ablation_is_a_valid_configuration_and_changes_something():
    default = Config.load("paper")
    for name, settings in GRID.items():
        changed = Config.load("paper", settings)
        assert (changed == default) == (name == "default")


def test_every_row_of_the_paper_has_a_run(tmp_path):
    assert set(GRID) == {*ABLATIONS, *ZERO_SHOT_ABLATIONS}
    lines = list(commands("paper", "mimic", "sets", tmp_path))
    assert sum(line.startswith("dbeta-pretrain") for line in lines) == len(GRID)
    assert "# without-etm: paper, zero-shot: ptbxl-super 73.2" in "\n".join(lines)
    assert "--set loss.mlm=0 --set loss.mem=0" in lines[lines.index(next(x for x in lines if "mlm-mem" in x)) + 1]


def test_every_line_of_the_command_is_one_that_the_commands_understand(tmp_path):
    given = ["--corpus", "my corpus", "--splits", "s", "--patients", "p.csv", "--scoring", "w", "--out", str(tmp_path)]
    shown = CliRunner().invoke(main, ["evaluate", "ablations", *given])
    lines = [shlex.split(line) for line in shown.output.splitlines() if not line.startswith("#")]
    assert shown.exit_code == 0 and len(lines) == 9 * 4 + 2 * 2
    for name, *words in lines:
        command = pretrain
        if name == "dbeta":
            group, task, *words = words
            command = main.commands[group].commands[task]
        context = command.make_context(name, words)  # raises for an unknown option or value
        if name == "dbeta-pretrain":
            assert str(context.params["data"]) == "my corpus"
        else:
            assert str(context.params["splits"]) == "s" and str(context.params["patients"]) == "p.csv"


def test_results_at_hand_are_summed_up_as_the_papers(tmp_path):
    """The paper's own values of Tables 1-3, as if they were ours, give the default row of Table 6."""
    rows = [
        Result(task=task, dataset=dataset, title="", leads=leads, fraction=fraction, value=value / 100,
               metric=METRICS.get(task, "macro AUC"), prompts="names" if task == "zero-shot" else "")
        for (task, dataset, leads, fraction), (_, value) in VALUES.items()
    ]  # fmt: skip
    results.write(rows, tmp_path / "default" / "evaluation", model="m", checksum="1")
    line = next(line for line in commands("paper", "c", "d", tmp_path) if "ours" in line)
    (tuned, spread), (probed, other), _ = ABLATIONS["default"]
    assert f"fine-tuning {tuned} +- {spread}, linear probe 1 % {probed} +- {other}, zero-shot by names 77.2" in line


def test_an_unfinished_run_is_not_summed_up(tmp_path):
    rows = [Result(task="finetune", dataset="cinc2021", title="", leads="12", value=0.8, metric=METRICS["finetune"])]
    results.write(rows, tmp_path / "default" / "evaluation", model="m", checksum="1")
    assert not any("ours" in line for line in commands("paper", "c", "d", tmp_path))
    (tmp_path / "default" / "evaluation" / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        list(commands("paper", "c", "d", tmp_path))
