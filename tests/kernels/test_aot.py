"""Every tuned configuration compiles for sm_90 within its committed budget, on any machine."""

import json
import re

import pytest
import triton

from dbeta_kernels.aot import BUDGETS, budgets, compile_all, configurations

UPDATE = "if that is meant: python -m dbeta_kernels.aot --write"


def test_the_pinned_triton_has_budgets(pytestconfig):
    """So that the tests below are skipped under other versions only."""
    (pinned,) = re.findall(r"^triton==(\S+)$", (pytestconfig.rootpath / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned in json.loads(BUDGETS.read_text()), UPDATE


@pytest.fixture(scope="session")
def measured():
    return compile_all(slow=False)


def check(measured):
    allowed = budgets()
    if not allowed:
        pytest.skip(f"no budgets for Triton {triton.__version__}; {UPDATE}")
    assert set(measured) <= set(allowed), f"configurations without a budget; {UPDATE}"
    over = [
        f"{name}: {key} {value}, budget {allowed[name][key]}"
        for name, row in measured.items()
        for key, value in row.items()
        if (value < allowed[name][key] if key == "wgmma" else value > allowed[name][key])
    ]
    assert not over, "\n".join([*over, UPDATE])


def test_budgets_of_the_papers_sizes(measured):
    check(measured)


@pytest.mark.slow
def test_budgets_of_every_configuration():
    check(compile_all())


def test_committed_budgets_spill_nothing_unexplained():
    committed = budgets()
    if not committed:
        pytest.skip(f"no budgets for Triton {triton.__version__}; {UPDATE}")
    every = configurations()
    assert set(committed) == set(every), f"budgets and configurations differ; {UPDATE}"
    for name, (_, config) in every.items():
        row = committed[name]
        assert not row["spill_bytes"] or config.spill_reason, f"{name} spills {row['spill_bytes']} bytes"
        assert row["wgmma"] or not config.wgmma, f"{name} does not use wgmma"
        assert row["shared_bytes"] <= 232_448, f"{name} needs more shared memory than a block of sm_90 may have"
