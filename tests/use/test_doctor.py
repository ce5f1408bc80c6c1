"""``dbeta doctor`` on real folders with known traps, on planted ones, and on a corpus."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from dbeta.cli import main
from dbeta.data.prepare import prepare
from dbeta.data.records import LEADS
from dbeta.use.doctor import examine, text_statistics

wfdb = pytest.importorskip("wfdb", reason="not on a machine that is lent with its GPU only")


def run(*arguments):
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def write(folder, name, mv, leads=LEADS, rate=500, gain=1000):
    folder.mkdir(exist_ok=True)
    wfdb.wrsamp(
        name, fs=rate, units=["mV"] * len(leads), sig_name=list(leads), p_signal=mv.T, fmt=["16"] * len(leads),
        adc_gain=[gain] * len(leads), baseline=[0] * len(leads), write_dir=str(folder), comments=["Dx: 1, 2"],
    )  # fmt: skip


@pytest.fixture
def ecg():
    generator = np.random.default_rng(0)
    first, second = np.cumsum(generator.normal(size=(2, 5000)), -1) * 0.01
    limb = [first, second, second - first, -(first + second) / 2, first - second / 2, second - first / 2]
    chest = np.cumsum(generator.normal(size=(6, 5000)), -1) * 0.01
    return np.concatenate([limb, chest])


def test_planted_traps(ecg, tmp_path):
    folder = tmp_path / "records"
    write(folder, "good", ecg)
    write(folder, "twin", ecg, gain=500)
    write(folder, "swapped", ecg[:, ::-1], ["II", "I", *LEADS[2:]])
    order = [0, 1, 2, 3, 5, 4, *range(6, 12)]
    write(folder, "ordered", np.roll(ecg, 700, 1)[order], [LEADS[i] for i in order])
    write(folder, "short", ecg[:2, :3500] + 1, LEADS[:2], rate=250)
    loud = ecg[:, 1000:].copy()
    loud[0] = 0
    write(folder, "micro", loud * 1000, gain=1)
    missing = ecg[:, 500:].copy()
    missing[7, 9] = np.nan
    write(folder, "gap", missing)
    (folder / "bad.hea").write_text("bad")
    outcome = run(folder, "--json", tmp_path / "new" / "found.json")
    assert outcome.exit_code == 1 and "something would be rejected" in outcome.output
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["records"] == 8 and not found["sound"] and list(found["rejected"]) == ["unreadable header"]
    noticed = {reason: {line.partition(".hea")[0] for line in lines} for reason, lines in found["noticed"].items()}
    assert noticed["limb leads contradict each other"] == {"swapped"}
    assert noticed["leads put in order by name"] == {"ordered", "swapped"}
    assert noticed["missing leads"] == {"short"} and noticed["flat leads"] == {"micro"}
    assert noticed["invalid samples"] == {"gap"} and "micro" in noticed["units"] and "good" not in noticed["units"]
    assert found["rates_hz"] == {"500": 6, "250": 1} and found["labels"] == {"1": 7, "2": 7}
    assert [f["detail"] for f in found["findings"]] == ["good.hea = twin.hea"]
    (folder / "bad.hea").unlink()
    assert run(folder).exit_code == 0


def test_real_folder(shared):
    survey = examine(shared / "data/cinc2021/quirks")
    assert set(survey.rejected) == {"missing signal file"} and len(survey.rejected["missing signal file"]) == 10
    assert survey.units_per_mv["4880"] == 1 and len(survey.noticed["record line"]) == 5 and not survey.sound
    whole = examine(shared / "data/sph")
    assert whole.sound and whole.records == 7 and whole.formats == {"SPH .h5": 7}
    assert examine(shared / "data/sph", limit=2).records == 2


def test_corpus(tmp_path):
    prepare("synthetic", None, tmp_path / "corpus", limit=60, workers=1)
    outcome = run(tmp_path / "corpus", "--checksums", "--json", tmp_path / "found.json")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kind"] == "corpus" and found["records"] == 60 and sum(found["splits"].values()) == 60
    assert found["text"]["records with text"] == 60 and found["labels"]
    shutil.copytree(tmp_path / "corpus", tmp_path / "copy")
    leaks = examine(tmp_path / "corpus", against=[tmp_path / "copy"]).findings
    assert any(f.kind == "same signal twice" and " and " in f.where for f in leaks)
    shard = tmp_path / "copy" / "shards" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    outcome = run(tmp_path / "copy", "--checksums")
    assert outcome.exit_code == 1 and "shards/00000.tar" in outcome.output
    shard.write_bytes(content[:-512])
    assert run(tmp_path / "copy").exit_code == 1


def test_published_splits_are_audited(shared):
    survey = examine(shared / "data/sph", splits=shared / "data/merl-splits")
    assert any(finding.kind == "labels by substring" for finding in survey.findings)


def test_wrong_options(shared, tmp_path):
    assert "is no corpus" in run(shared / "data/sph", "--checksums").output
    outcome = run(tmp_path / "nothing")
    assert outcome.exit_code == 2 and "nothing is not there" in outcome.output


def test_text_statistics_show_no_text():
    told = text_statistics(["a b c", "secret", ""], np.array([3, 1, 5]))
    assert told["records with text"] == 4 and told["different texts"] == 2 and told["words, 50 %"] == 3
    assert "secret" not in str(told) and text_statistics([]) == {"records with text": 0}


def test_json_is_checked_before_the_records_are_read(tmp_path):
    outcome = run(tmp_path, "--json", tmp_path)
    assert outcome.exit_code == 2 and f"--json {tmp_path} is a folder" in outcome.output
