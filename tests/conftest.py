"""Shared fixtures: where the real records and the parity fixtures lie, and how a GPU test is skipped."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``../shared`` beside the project (or $DBETA_SHARED); the test is skipped where it is absent."""
    folder = Path(os.environ.get("DBETA_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set DBETA_SHARED")
    return folder


@pytest.fixture(autouse=True)
def _announce_again(monkeypatch):
    """What a process says once, each test may hear."""
    monkeypatch.setattr("dbeta.runtime._announced", set())


@pytest.fixture(autouse=True)
def _tf32_as_before():
    """What a run sets for its process must not reach the next test's float32."""
    owners = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [owner.allow_tf32 for owner in owners]
    yield
    for owner, value in zip(owners, before):
        owner.allow_tf32 = value


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not item.keywords, which hold the names of folders too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module")
def teams(tmp_path_factory):
    from tests.team import Team

    made: dict[int, Team] = {}

    def team(world: int) -> Team:
        if world not in made:
            made[world] = Team(world, tmp_path_factory.mktemp("team"))
        return made[world]

    yield team
    for one in made.values():
        one.end()
