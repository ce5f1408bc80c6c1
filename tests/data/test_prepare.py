"""`dbeta prepare` on MIMIC-IV-ECG and PTB-XL: good records bit for bit, every other one named with its reason."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dbeta.cli import main
from dbeta.data.corpus import Corpus
from dbeta.data.prepare import prepare
from dbeta.data.records import LEADS

wfdb = pytest.importorskip("wfdb", reason="not on a machine that is lent with its GPU only")

MIMIC_ORDER = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")


class Mimic:
    """A tree in MIMIC-IV-ECG's form: header style, lead order, folders and the two tables."""

    def __init__(self, root: Path):
        self.root, self.list, self.measurements = root, [], []
        self.signals: dict[str, np.ndarray] = {}  # path -> int16 [12, 5000], canonical order

    def add(self, number: int, adc: np.ndarray, report: tuple[str, ...] = ("Sinus rhythm", "", "Normal ECG"), **header):
        """``adc`` int16 [12, 5000] in canonical order; ``header`` overrides parts of what is written."""
        subject, study = 10_000_000 + number // 2, 40_000_000 + number
        path = f"files/p{str(subject)[:4]}/p{subject}/s{study}/{study}"
        stem = self.root / path
        stem.parent.mkdir(parents=True)
        leads = header.get("leads", MIMIC_ORDER)
        stored = np.stack([adc[LEADS.index(lead)] for lead in leads])
        stored.T.astype("<i2").tofile(f"{stem}.dat")
        gain, rate = header.get("gain", "200.0(0)/mV"), header.get("rate", 500)
        lines = [f"{study} {len(leads)} {rate} {adc.shape[1]} 08:44:00 23/07/2180"]
        for lead, samples in zip(leads, stored):
            lines.append(f"{study}.dat 16 {gain} 16 0 {samples[0]} {int(samples.sum()) & 0xFFFF} 0 {lead}")
        Path(f"{stem}.hea").write_text("\n".join([*lines, f"# <subject_id>: {subject}"]) + "\n")
        self.row(subject, study, path, report)
        self.signals[path] = adc
        return stem

    def row(self, subject: int, study: int, path: str, report: tuple[str, ...]):
        self.list.append([subject, study, study, "2180-07-23 08:44:00", path])
        self.measurements.append([subject, study, 6848296, "2180-07-23 08:44:00", *report, *[""] * (18 - len(report))])

    def write(self):
        for name, header, rows in (
            ("record_list.csv", ["subject_id", "study_id", "file_name", "ecg_time", "path"], self.list),
            (
                "machine_measurements.csv",
                ["subject_id", "study_id", "cart_id", "ecg_time", *(f"report_{i}" for i in range(18))],
                self.measurements,
            ),
        ):
            with (self.root / name).open("w", newline="") as file:
                csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def signals(shared) -> list[np.ndarray]:
    """Real PTB-XL signals as MIMIC would store them, int16 [12, 5000] at 200 per mV."""
    paths = sorted((shared / "data" / "ptbxl").glob("records500/*/*.hea"))
    records = [wfdb.rdrecord(str(path.with_suffix("")), physical=False) for path in paths[:24]]
    return [np.rint(record.d_signal.T / 5).astype(np.int16) for record in records]


def test_mimic(signals, tmp_path):
    tree = Mimic(tmp_path / "mimic")
    for number, adc in enumerate(signals):
        report = ("Sinus rhythm", f"Possible EKG finding {number % 5}.", "", "Borderline ECG")
        tree.add(number, adc, report)
    good = dict(tree.signals)
    adc, spare = signals[0], iter(range(100, 200, 2))
    bad = {}

    def damage(reason: str, **header):
        stem = tree.add(next(spare), header.pop("adc", adc), header.pop("report", ("Sinus rhythm",)), **header)
        bad[str(stem.relative_to(tree.root))] = reason
        return stem

    damage("missing signal file").with_suffix(".dat").unlink()
    flipped = damage("checksum").with_suffix(".dat")
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x55")
    longer = damage("signal file does not fit").with_suffix(".dat")
    longer.write_bytes(longer.read_bytes() + bytes(24))
    cut = damage("truncated signal file").with_suffix(".dat")
    cut.write_bytes(cut.read_bytes()[:70_001])
    with_nan = adc.copy()
    with_nan[3, 17] = -32768
    damage("invalid samples", adc=with_nan)
    damage("flat", adc=np.zeros_like(adc))
    damage("missing leads", leads=MIMIC_ORDER[:-1])
    damage("wrong rate", rate=250)
    damage("empty report", report=("", " "))
    damage("bad gain", gain="0(0)/mV")
    damage("bad gain", gain="-200(0)/mV")
    damage("bad units", gain="200(0)/mmHg")
    damage("unreadable header").with_suffix(".hea").write_text("not a header\n")
    damage("no header").with_suffix(".hea").unlink()
    damage("duplicate lead", leads=(*MIMIC_ORDER[:-1], "V5"))
    swapped = adc[[1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    damage("limb leads contradict each other", adc=swapped)
    outside = damage("unreadable header")
    header = outside.with_suffix(".hea")
    header.write_text(header.read_text().replace(f"{outside.name}.dat", "../../../../../secret.dat"))
    first = tree.list[0]
    tree.list.append(first)  # the same study twice
    unknown = damage("empty report")
    del tree.measurements[-1]
    outside = [*tree.list[-2][:4], "../outside/40000999"]
    outside[1] = 40_000_999
    tree.list.append(outside)
    tree.measurements.append([outside[0], outside[1], 1, "", "Sinus rhythm", *[""] * 17])
    bad[outside[4]] = "path outside the data set"
    random.Random(0).shuffle(tree.measurements)  # the two tables need not be in one order
    tree.write()

    info = prepare("mimic-iv-ecg", tree.root, tmp_path / "corpus", workers=1)
    corpus = Corpus.open(tmp_path / "corpus")
    assert len(corpus) == len(good) == info["records"]
    for record, name in enumerate(corpus.column("name")):
        np.testing.assert_array_equal(corpus.read_adc(record), good[name])
    with (tmp_path / "corpus" / "rejected.csv").open() as file:
        rows = list(csv.DictReader(file))
    reasons = {row["name"]: row["reason"] for row in rows if row["reason"] != "duplicate study"}
    assert reasons == bad
    assert [row["name"] for row in rows if row["reason"] == "duplicate study"] == [first[4]]
    assert info["rejected"] == len(bad) + 1 == len(rows)
    assert info["records"] + info["rejected"] == len(tree.list)
    assert corpus.reports[corpus.column("report")[0]].startswith("sinus rhythm possible ecg finding")
    assert info["reports"] == 5 and (corpus.column("gain") == 200).all() and corpus.uniform
    assert corpus.damage() == []
    details = {row["name"]: row["detail"] for row in rows}
    assert details[str(unknown.relative_to(tree.root))] == "not in machine_measurements.csv"


def test_splits_keep_subjects_apart(tmp_path):
    prepare("synthetic", None, tmp_path / "corpus", limit=300, workers=1)
    corpus = Corpus.open(tmp_path / "corpus")
    subjects = np.array(corpus.column("subject"))
    train, held = (set(subjects[corpus.split_ids(split)]) for split in ("train", "validation"))
    assert train and held and not train & held


def test_ptb_xl(shared, tmp_path):
    root = shared / "data" / "ptbxl"
    result = CliRunner().invoke(main, ["prepare", "ptb-xl", str(root), "--out", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 228 and len(corpus.reports) == 146 and corpus.info["rejected"] == 0
    assert corpus.source == "ptb-xl" and {"NORM", "SR"} <= set(corpus.labels)
    for record in (0, 100, 227):
        path = root / corpus.column("name")[record]
        np.testing.assert_array_equal(corpus.read_adc(record), wfdb.rdrecord(str(path), physical=False).d_signal.T)


def test_killed_preparation_goes_on(tmp_path):
    """kill -9 between shards: the same command finishes, and the corpus is that of an undisturbed run."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = ["prepare", "synthetic", "--limit", "1100", "--workers", "1", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "dbeta.cli", *command, str(killed)])
    deadline = time.monotonic() + 120
    while not (killed / "parts" / "00000.parquet").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="unfinished"):
        Corpus.open(killed)
    whole = os.stat(killed / "shards" / "00000.tar").st_ino
    for out in (killed, undisturbed):
        prepare("synthetic", None, out, limit=1100, workers=1)
    assert os.stat(killed / "shards" / "00000.tar").st_ino == whole  # not written again
    for path in undisturbed.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (killed / path.relative_to(undisturbed)).read_bytes()


def test_workers_end_with_a_killed_parent():
    code = (
        "import time; from dbeta.data.pool import WorkerPool\n"
        "with WorkerPool(2) as pool:\n"
        "    for _ in pool(time.sleep, [(0.01,), (0.01,), (0.01,), (0.01,), (60,)]):\n"
        "        print(*pool.__self__.executor._processes, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(Path(f"/proc/{worker}").exists() for worker in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ptb-xl"], "ROOT is not given"),
        (["ptb-xl", "nowhere"], "nowhere is no folder"),
        (["mimic-iv-ecg", "."], "machine_measurements.csv is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["prepare", *arguments, "--out", str(tmp_path / "c")])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def nothing_kept(*arguments, out: Path) -> str:
    result = CliRunner().invoke(main, ["prepare", *map(str, arguments), "--out", str(out)])
    assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    return result.output


def test_a_data_set_of_which_nothing_is_kept(tmp_path):
    """Signals that were not downloaded; fewer of them with --limit; refused by the tables; and no row at all."""
    tree = Mimic(tmp_path / "mimic")
    for number in range(4):
        stem = tree.add(number, np.zeros((12, 5000), np.int16))
        if number < 3:
            stem.with_suffix(".dat").unlink()
    tree.write()
    out = tmp_path / "c"
    said = nothing_kept("mimic-iv-ecg", tree.root, out=out)
    assert f"mimic-iv-ecg in {tree.root}: 4 records found and all rejected, 3 of them for: missing signal file" in said
    assert "40000000.dat" in said and f"see {out}/rejected.csv" in said
    with (out / "rejected.csv").open() as file:
        assert Counter(row["reason"] for row in csv.DictReader(file)) == {"missing signal file": 3, "flat": 1}
    assert "the first 2 records (--limit) found" in nothing_kept("mimic-iv-ecg", tree.root, "--limit", 2, out=out)
    tree.measurements = [[*row[:4], *[""] * 18] for row in tree.measurements]
    tree.write()
    assert "4 of them for: empty report" in nothing_kept("mimic-iv-ecg", tree.root, out=out)
    tree.list.clear()
    tree.write()
    assert "its tables list no record" in nothing_kept("mimic-iv-ecg", tree.root, out=out)
    assert (out / "rejected.csv").read_text().splitlines() == ["name,reason,action,detail"]  # not of the run before


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out in ("mine", "mine/thesis.txt/c"):
        result = CliRunner().invoke(main, ["prepare", "synthetic", "--limit", "2", "--out", str(tmp_path / out)])
        assert result.exit_code == 2, result.output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert Counter(p.name for p in tmp_path.iterdir()) == {"mine": 1}
