"""The session on a GPU: no part takes another with it, and all of them run (rehearsed on a CPU); the profile."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_session
from tools.profile_step import profile

SLOW = """
import time

def test_right(): pass
def test_wrong(): assert 1 == 2
def test_slow(): time.sleep(100)
"""
SCRIPT = Path(gpu_session.__file__)
BROKEN = """
import sys, time
sys.path.insert(0, {root!r})
from tools import gpu_session

def good(rehearse): yield {{"way": "good"}}
def raises(rehearse): yield {{"way": "first"}}; raise RuntimeError("the device is lost")
def hangs(rehearse): yield {{"way": "kept"}}; time.sleep(100)
def dies(rehearse):
    import os
    os.abort()
    yield

gpu_session.PARTS = {{"a": (raises, 5), "b": (hangs, 1), "c": (dies, 5), "d": (good, 5)}}
gpu_session.__file__ = __file__
gpu_session._shown = lambda name, row: row.get("way", "")
gpu_session.main()
"""


def test_no_part_takes_another_with_it(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(root=str(SCRIPT.parents[1])))
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--limit", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    parts = json.loads((tmp_path / "out" / "session.json").read_text())["parts"]
    assert [part["state"].split()[0] for part in parts.values()] == ["failed", "stopped", "failed", "done"]
    assert [part["rows"] for part in parts.values()] == [
        [{"way": w}] if w else [] for w in ("first", "kept", "", "good")
    ]
    assert "the device is lost" in (tmp_path / "out" / "a.log").read_text()
    assert "good" in done.stdout.splitlines()[-1]


def test_it_ends_in_ten_minutes():
    assert sum(seconds for _, seconds in gpu_session.PARTS.values()) <= 560


@pytest.mark.parametrize("names", [list(gpu_session.PARTS), ["step", "training"]])
def test_parts_share_the_limit(names, tmp_path, monkeypatch):
    """Time does not pass here: what a part leaves comes to the next, so the last could have all of it."""
    given = []
    monkeypatch.setattr(gpu_session.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(gpu_session, "_run", lambda name, out, rehearse, seconds: given.append(seconds) or "done")
    gpu_session.session(tmp_path, names, 560, rehearse=False)
    assert given == sorted(given) and given[-1] == pytest.approx(560)
    assert given[names.index("step")] > (350 if len(names) == 2 else 170)


def test_the_tests_report_what_they_had_time_for(tmp_path, monkeypatch):
    """The limit comes before the end: pytest is interrupted, also in the background, and what it has is read."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_slow.py").write_text(SLOW)
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_session, "GPU_TESTS", "not nothing")
    monkeypatch.setattr(gpu_session, "_has", lambda module: False)
    monkeypatch.setenv("DBETA_SESSION_OUT", str(tmp_path))
    monkeypatch.setenv("DBETA_SESSION_SECONDS", str(gpu_session.WINDING_UP + 10))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        counts, wrong = gpu_session.tests(rehearse=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (counts["passed"], counts["failures"]) == (1, 1)
    assert wrong["failed"].endswith("::test_wrong") and "1 == 2" in wrong["message"]


def test_no_slow_test_takes_the_session_s_time(pytestconfig):
    """pytest's last -m counts, so the session has to leave them out itself."""
    assert "not slow" in pytestconfig.getini("addopts")[-1] and "not slow" in gpu_session.GPU_TESTS


@pytest.mark.slow
def test_rehearsal(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    parts = json.loads((tmp_path / "session.json").read_text())["parts"]
    assert list(parts) == list(gpu_session.PARTS)
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done"), done.stdout
    assert all(part["rows"] for part in parts.values())


def test_profile():
    tiny = ("model.samples=640", "model.text_vocab=600")
    found = profile(device="cpu", workload="uniform9", provider="fused", batch=2, preset="smoke", overrides=tiny)
    assert len(found["rows"]) == 10 and found["launches"] > 100
    times = [row["ms"] for row in found["rows"]]
    assert times == sorted(times, reverse=True) and times[0] > 0
    assert sum(times) < found["kernels_ms"] <= 3 * found["step_ms"]
    assert sum(row["share"] for row in found["rows"]) < 1
