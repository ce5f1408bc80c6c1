"""The fuzz targets: seconds here, minutes in the slow part, and the proof that a finding would be found."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fuzz import TARGETS

ROOT = Path(__file__).parents[1]


def fuzz(target: str, seconds: float, seed: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz", target, str(seconds), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 100, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["read"] > 0 and counts["refused"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_for_seconds(target):
    fuzz(target, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_for_two_minutes(target):
    fuzz(target, 120, int.from_bytes(os.urandom(3)))


def test_the_fuzzer_finds_what_is_wrong(monkeypatch, tmp_path):
    """A target that fails in the ways that count is found out."""
    from tests import fuzz as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(module, "SLOW_S", 0.05)
    import time

    for once in (lambda _: [][0], lambda _: time.sleep(0.1), lambda _: Path("../stray").write_text("")):
        monkeypatch.setitem(module.TARGETS, "broken", lambda _, once=once: once)
        assert module.main("broken", 5) == 1
    monkeypatch.chdir(tmp_path)
