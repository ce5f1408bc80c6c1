"""The grid of ablations is made of settings that exist."""

from pathlib import Path

from dbeta.config import Config
from dbeta.evaluation.ablations import GRID, commands
from dbeta.evaluation.paper import ABLATIONS, ZERO_SHOT_ABLATIONS


def test_every_ablation_is_a_valid_configuration_and_changes_something():
    default = Config.load("paper")
    for name, settings in GRID.items():
        changed = Config.load("paper", settings)
        assert (changed == default) == (name == "default")


def test_every_row_of_the_paper_has_a_run():
    assert set(GRID) == {*ABLATIONS, *ZERO_SHOT_ABLATIONS}
    lines = list(commands("paper", "mimic", "sets", Path("runs")))
    assert sum(line.startswith("dbeta-pretrain") for line in lines) == len(GRID)
    assert "# without-etm: paper, zero-shot: ptbxl-super 73.2" in "\n".join(lines)
    assert "--set loss.mlm=0 --set loss.mem=0" in lines[lines.index(next(x for x in lines if "mlm-mem" in x)) + 1]
