"""``dbeta prepare`` for the evaluation data sets, on the real records of each and the traps in them."""

import csv
import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
import scipy.io

from dbeta.cli import SOURCES as COMMAND_SOURCES
from dbeta.data.corpus import Corpus
from dbeta.data.prepare import SOURCES, prepare
from dbeta.data.records import read_record
from dbeta.data.reports import join
from dbeta.data.sources import join_columns
from dbeta.data.wfdb_files import read_wfdb

CLASSES = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")


@pytest.fixture
def made(tmp_path, capsys):
    """``made(source, root)``: the corpus and the rows of its rejected.csv."""

    def make(source: str, root: Path, **more) -> tuple[Corpus, list[dict]]:
        out = tmp_path / f"corpus-{source}"
        prepare(source, root, out, workers=1, **more)
        with (out / "rejected.csv").open() as file:
            return Corpus.open(out), list(csv.DictReader(file))

    return make


def test_every_source_of_the_command_exists():
    assert set(COMMAND_SOURCES) == {*SOURCES, "synthetic"}


@pytest.mark.parametrize("cells", [["a", "b"], ["", ""], [" a ", "", "c\t"], ["", "", "x"], ["a b", " ", ""]])
def test_report_columns_join_as_text_does(cells):
    """Arrow's vectorised join is that of ``reports.join``, also where all cells of a row are empty."""
    rows = [cells, ["", *cells[1:]], [""] * len(cells), cells[::-1]]
    columns = [pa.chunked_array([column[:1], column[1:]]) for column in map(list, zip(*rows))]
    assert join_columns(columns).to_pylist() == [join(row) for row in rows]


def test_cinc2021(made, shared):
    root = shared / "data" / "cinc2021"
    corpus, rows = made("cinc2021", root)
    headers = [path for path in root.rglob("*.hea")]
    assert len(corpus) + corpus.info["rejected"] == len(headers)
    rejected = {row["name"]: row["reason"] for row in rows if row["action"] == "rejected"}
    assert len(rejected) == 10 and set(rejected.values()) == {"missing signal file"}
    assert all(name.startswith("quirks/st_petersburg") for name in rejected)
    repaired = {(row["name"].rpartition("/")[2], row["reason"]) for row in rows if row["action"] == "repaired"}
    assert {("E00001", "gain"), ("E00271", "record line")} <= repaired
    where = {name: i for i, name in enumerate(corpus.column("name"))}
    early, later = where["quirks/gain-4880-early-release/E00001"], where["georgia/E00001"]
    np.testing.assert_array_equal(corpus.read_adc(early), corpus.read_adc(later))
    assert (corpus.column("gain", [early, later]) == 1000).all()
    for name in ("chapman_shaoxing_ningbo/JS00001", "cpsc_2018/A0001", "ptb-xl/HR00001"):
        expected = scipy.io.loadmat(root / f"{name}.mat")["val"]
        np.testing.assert_array_equal(corpus.read_adc(where[name]), expected)
    assert corpus.column("labels", [where["ptb-xl/HR00001"]]) == [["251146004", "426783006"]]
    assert corpus.column("labels", [early]) == [[]] and corpus.reports == [""]
    flat = corpus.column("flat")
    assert (flat.any(1) == [read_wfdb(root / name).adc.std(1).min() == 0 for name in where]).all()


def test_csn_and_limit(made, shared):
    corpus, _ = made("csn", shared / "data" / "cinc2021", limit=30)
    assert len(corpus) == 30 and all("/JS" in name for name in corpus.column("name"))
    assert len(set(corpus.column("subject"))) == 30


def test_cpsc2018_in_both_forms(made, shared, tmp_path):
    root = shared / "data" / "cpsc2018-native"
    corpus, _ = made("cpsc2018", root)
    assert len(corpus) == 4 and corpus.info["rounding_uv"] == 0.5
    with (root / "REFERENCE_training.csv").open() as file:
        table = {row["Recording"]: row["First_label"] for row in csv.DictReader(file)}
    for row, name in enumerate(corpus.column("name")):
        assert table[name] in corpus.column("labels", [row])[0]
        exact = scipy.io.loadmat(root / f"{name}.mat")["ECG"]["data"][0, 0]
        assert np.abs(corpus.read_adc(row) / 1000 - exact).max() <= 0.000501
    shutil.rmtree(corpus.path)
    corpus, _ = made("cpsc2018", shared / "data" / "cinc2021" / "cpsc_2018")
    assert len(corpus) == 10 and "59118001" in corpus.labels and "rounding_uv" not in corpus.info


def test_ptb(made, shared, tmp_path):
    folder = tmp_path / "ptbdb" / "patient001"
    folder.mkdir(parents=True)
    for path in (shared / "data" / "ptb").iterdir():
        (folder / path.name).symlink_to(path)
    corpus, _ = made("ptb", tmp_path / "ptbdb")
    assert corpus.column("subject") == ["patient001"] and corpus.labels == ["Myocardial infarction"]
    assert corpus.read_adc(0).shape == (12, 38400) and corpus.column("rate_hz")[0] == 1000


def test_sph(made, shared):
    corpus, _ = made("sph", shared / "data" / "sph")
    assert sorted(corpus.column("name"))[0] == "SPH00001" and {"22", "23"} <= set(corpus.labels)
    assert all(subject.startswith("S") for subject in corpus.column("subject"))


def test_code_15_sample(made, shared):
    root = shared / "data" / "code15-sample"
    corpus, rows = made("code-15", root)
    assert len(corpus) + corpus.info["rejected"] == 10 and len(corpus) == len(list(root.glob("*.mat"))) == 7
    assert {row["reason"] for row in rows if row["action"] == "rejected"} == {"missing signal file"}
    assert (corpus.column("rate_hz") == 400).all() and set(corpus.labels) <= set(CLASSES)


@pytest.fixture
def exams(shared) -> np.ndarray:
    """Real CODE-15 exams as CODE stores them, float32 [7, 4096, 12] mV, zero-padded at both ends."""
    tracings = np.zeros((7, 4096, 12), np.float32)
    for exam, path in enumerate(sorted((shared / "data" / "code15-sample").glob("*.mat"))):
        mv = read_record(path).to_mv()
        start = (4096 - mv.shape[1]) // 2
        tracings[exam, start : start + mv.shape[1]] = mv.T
    return tracings


def test_code_15_parts(made, exams, tmp_path):
    ids = [11, 12, 13, 14, 15, 16, 17]
    for part, rows in ((0, slice(0, 4)), (1, slice(4, 7))):
        with h5py.File(tmp_path / f"exams_part{part}.hdf5", "w") as file:
            file["tracings"], file["exam_id"] = exams[rows], ids[rows]
    with (tmp_path / "exams.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["exam_id", "age", "patient_id", *CLASSES])
        writer.writerows([i, 50, 100 + i // 2, *(k == i % 6 for k in range(6))] for i in [*ids, 99])
    corpus, rows = made("code-15", tmp_path)
    assert len(corpus) == 7 and rows == [
        {"name": "99", "reason": "missing signal file", "action": "rejected", "detail": "in no exams_part*.hdf5"}
    ]
    for row, name in enumerate(corpus.column("name")):
        mv = exams[ids.index(int(name))].T
        used = np.flatnonzero((np.rint(mv * 1000) != 0).any(0))
        assert np.abs(corpus.read_adc(row) / 1000 - mv[:, used[0] : used[-1] + 1]).max() <= 0.000501
        assert corpus.column("labels", [row])[0] == [CLASSES[int(name) % 6]]


@pytest.mark.parametrize("stored", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5, 3], [0, 1, 2, 3, 5, 4]])
def test_code_test_lead_order_by_einthoven(stored, made, exams, shared, tmp_path):
    """Whichever order aVR, aVL and aVF are stored in, they come out in the canonical one."""
    with h5py.File(tmp_path / "ecg_tracings.hdf5", "w") as file:
        file["tracings"] = exams[:, :, [*stored, *range(6, 12)]] * 10  # 1e-4 V
    (tmp_path / "annotations").mkdir()
    gold = (shared / "data" / "code-test" / "annotations" / "gold_standard.csv").read_text().splitlines()
    (tmp_path / "annotations" / "gold_standard.csv").write_text("\n".join(gold[:8]) + "\n")
    corpus, _ = made("code-test", tmp_path)
    assert corpus.column("split") == ["test"] * 7 and corpus.read_adc(0).shape == (12, 4096)
    for row, name in enumerate(corpus.column("name")):
        np.testing.assert_allclose(corpus.read_adc(row) / 1000, exams[int(name)].T, atol=0.0006)
        wanted = dict(zip(gold[0].split(","), gold[1 + int(name)].split(",")))
        assert corpus.column("labels", [row])[0] == [k for k in CLASSES if wanted[k] == "1"]


def test_code_test_of_noise_is_refused(made, tmp_path):
    with h5py.File(tmp_path / "ecg_tracings.hdf5", "w") as file:
        file["tracings"] = np.random.default_rng(0).standard_normal((40, 500, 12))
    (tmp_path / "gold_standard.csv").write_text(",".join(CLASSES) + "\n" + "0,0,0,0,0,0\n" * 40)
    with pytest.raises(ValueError, match="no order of the limb leads fits"):
        made("code-test", tmp_path)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_root_of_something_else(source, made, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="ROOT"):
        made(source, tmp_path / "root")


def test_columns_that_are_missing(made, tmp_path):
    (tmp_path / "ptbxl_database.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column patient_id, report"):
        made("ptb-xl", tmp_path)
