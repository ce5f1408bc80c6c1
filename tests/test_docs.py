"""What the documents promise: the lines a reader pastes work, commands exist, generated pages are current."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from dbeta.cli import main, pretrain
from dbeta_bench.cli import main as bench
from tests.use.conftest import folder, model, paths  # noqa: F401 (fixtures)
from tools import api_reference, readme_tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return [content for kind, content in FENCE.findall(text) if kind == language]


@pytest.mark.parametrize("document", ["README.md", "docs/use.md"])
def test_the_five_lines_give_features_of_every_format(document, folder, paths):  # noqa: F811
    (lines,) = [block for block in blocks(document, "python") if "from_pretrained" in block]
    assert len([line for line in lines.splitlines() if line]) == 5
    found = {"PATHS": [str(path) for path in paths.values()]}
    exec(lines.replace("MODEL", str(folder)), found)  # the text of a document of ours
    assert found["features"].shape == (5, 768) and np.isfinite(found["features"].numpy()).all()
    assert found["scores"].shape[0] == 5


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist_with_these_options(document):
    lines = [line.strip().partition("  #")[0] for block in blocks(document, "") for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line)
        if words and words[0] in ("dbeta", "dbeta-bench"):
            group = main if words[0] == "dbeta" else bench
            assert words[1] in group.commands, line
            _parse(group.commands[words[1]], words[2:], line)
        elif words and words[0] == "dbeta-pretrain":
            _parse(pretrain, words[1:], line)


def _parse(command, arguments, line):
    missing = [a for a in arguments if a == "mine.json"]  # --against wants a file that is there
    if missing and "--against" in arguments:
        at = arguments.index("--against")
        arguments = arguments[:at] + arguments[at + 2 :]
    assert command.make_context(command.name, list(arguments)), line


def test_api_reference_is_current():
    assert (ROOT / "docs/api.md").read_text() == api_reference.reference(), "run python tools/api_reference.py"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_what_was_measured(document):
    text = (ROOT / document).read_text()
    assert readme_tables.filled(text) == text, "run python tools/readme_tables.py"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text()):
        assert target.startswith("http") or (ROOT / document).parent.joinpath(target).exists(), target
