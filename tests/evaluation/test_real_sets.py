"""Every command on every set whose signals are there, from raw records to results, with a smoke-size model (slow)."""

import csv

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from dbeta.cli import main
from dbeta.data.records import read_ecg
from dbeta.data.resample import resample
from dbeta.evaluation.audits import audit
from dbeta.evaluation.evaluate import find_corpora
from dbeta.evaluation.features import FeatureCache
from dbeta.evaluation.label_sets import all_label_sets
from dbeta.evaluation.results import read

pytestmark = pytest.mark.slow
ROOTS = {
    "ptb-xl": "ptbxl",
    "cpsc2018": "cinc2021/cpsc_2018",
    "csn": "cinc2021/chapman_shaoxing_ningbo",
    "cinc2021": "cinc2021",
    "code-15": "code15-sample",
    "sph": "sph",
    "ptb": "ptb",
}


@pytest.fixture(scope="module")
def data(shared, tmp_path_factory):
    """All corpora in one folder, CODE-test through an hdf5 made of real signals at 400 Hz."""
    folder = tmp_path_factory.mktemp("sets")
    roots = {source: shared / "data" / root for source, root in ROOTS.items()}
    roots["code-test"] = code_test(shared / "data", tmp_path_factory.mktemp("code-test"))
    for source, root in roots.items():
        command("prepare", source, root, "--out", folder / source)
    return folder


def command(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def code_test(data, root, exams=40):
    """A CODE-test folder: the first ``exams`` of the positive and normal exams' labels, PTB-XL signals in 1e-4 V."""
    with (data / "code-test/annotations/gold_standard.csv").open() as file:
        header, *rows = list(csv.reader(file))
    rows = sorted(rows, key=lambda row: "1" not in row)[: exams * 3 // 4] + rows[: exams // 4]
    with (root / "gold_standard.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    paths = sorted((data / "ptbxl/records500/00000").glob("*.hea"))[: len(rows)]
    tracings = np.zeros((len(rows), 4096, 12), np.float32)
    for tracing, path in zip(tracings, paths):
        at_400 = resample(read_ecg(path), 625.0)  # 500 Hz read as 625 Hz gives 4 samples for every 5
        tracing[48:4048] = at_400.T * 10
    with h5py.File(root / "ecg_tracings.hdf5", "w") as file:
        file["tracings"] = tracings
    return root


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model folder."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(shared):
    """The options that every task of the real sets needs."""
    data = shared / "data"
    return {
        "sets": ["--splits", data / "merl-splits"],
        "finetune": ["--scoring", data / "cinc2021-scoring"],
        "identify": ["--patients", data / "ptbxl/ptbxl_database.csv"],
        "zero-shot": ["--annotations", data / "code-test/annotations"],
        "training": ["--epochs", "1", "--seed", "42", "--seed", "43"],
    }


@pytest.fixture(scope="module")
def results(data, folder, given):
    """Of ``dbeta evaluate all``, and what it printed."""
    words = [word for part in given.values() for word in part]
    printed = command("evaluate", "all", folder, "--data", data, "--bootstrap", "50", *words)
    return read(folder / "evaluation")[1], printed


def test_every_task_runs_on_every_set(results, folder):
    found, printed = results
    done = {(r.task, r.dataset) for r in found}
    none = {r.dataset for r in found if r.value is None}  # one or two test records: no class can be measured
    assert none <= {"sph", "code-15", "ptbxl-super>cpsc2018"}
    sets = set(all_label_sets())
    assert {d for t, d in done if t == "zero-shot"} == {*sets, "average"}
    assert {d for t, d in done if t == "linear-probe"} == sets - {"code-test"}
    assert ("finetune", "cinc2021") in done and ("identify", "ptb-xl") in done
    assert len([1 for t, _ in done if t == "shift"]) == 6
    assert {r.dataset: round(r.value, 5) for r in found if r.task == "experts"} == {
        "Cardio Resident": 0.92077, "Emergency Resident": 0.90514, "Medical Student": 0.93611, "DNN": 0.96600,
    }  # fmt: skip
    tuned = [r for r in found if r.task == "finetune" and r.metric == "CinC 2021 score"]
    assert [r.leads for r in tuned] == ["12", "P-6", "P-3", "P-2", "P-1"] and all(r.paper for r in tuned)
    assert all("meaningless" in r.note for r in found if r.task != "experts")
    assert {r.split for r in found if r.dataset == "ptbxl-super"} == {"published"}
    assert {r.split for r in found if r.dataset == "cpsc2018"} == {"derived by patient"}
    assert "the published split is empty" in printed and "meaningless" in printed
    assert "not run: identify: " in printed and "cinc2021: 1 test patients with two records" in printed
    names = {path.name for path in (folder / "evaluation").iterdir()}
    assert {"results.csv", "results.json", "results.png"} <= names
    roc = {path.name for path in (folder / "evaluation/figures").glob("roc-*")}
    assert roc == {f"roc-{key}-12.png" for key in sets}


def test_what_is_not_measurable_is_named(results):
    rhythm = next(r for r in results[0] if (r.task, r.dataset) == ("zero-shot", "ptbxl-rhythm"))
    assert "no positives" in rhythm.left_out and rhythm.classes < 12


@pytest.mark.parametrize("task", ["zero-shot", "linear-probe", "finetune", "identify", "shift"])
def test_each_command_alone(task, data, folder, given, tmp_path):
    """One epoch, two lead sets where there are five; fine-tuning on the sets that ``all`` leaves out, too."""
    words = given["sets"] if task != "identify" else []
    words = words + given.get(task, []) + (["--leads", "P-6", "--leads", "P-1"] if task != "shift" else [])
    words += ["--epochs", "1", "--seed", "1"] if task in ("linear-probe", "finetune", "identify") else []
    printed = command("evaluate", task, folder, "--data", data, "--out", tmp_path, "--bootstrap", "20", *words)
    found = [r for r in read(tmp_path)[1] if r.task == task]
    assert {r.leads for r in found} == ({"12"} if task == "shift" else {"P-6", "P-1"})
    counts = {"zero-shot": 9, "linear-probe": 8, "finetune": 8, "identify": 1, "shift": 6}
    assert len({r.dataset for r in found}) >= counts[task] and f"{task}, " in printed


def test_only_what_is_missing_is_done_again(results, data, folder, given, monkeypatch):
    def again(*_, **__):
        pytest.fail("features that were there are extracted again")

    monkeypatch.setattr(FeatureCache, "_extract", again)
    words = [*given["sets"], *given["identify"], *given["training"], "--bootstrap", "50"]
    command("evaluate", "linear-probe", folder, "--data", data, *words)
    assert read(folder / "evaluation")[1] == results[0]


def test_clean_labels_and_bare_names(data, folder, given, tmp_path):
    words = [*given["sets"], "--labels", "clean", "--prompts", "names", "--sets", "csn", "--out", tmp_path]
    command("evaluate", "zero-shot", folder, "--data", data, *words)
    (result,) = read(tmp_path)[1]
    assert result.dataset == "csn-clean" and result.prompts == "names" and result.paper is None
    command("evaluate", "shift", folder, "--data", data, *words)
    shifted = {r.dataset for r in read(tmp_path)[1] if r.task == "shift"}
    assert shifted == {"ptbxl-super>csn-clean", "cpsc2018>csn-clean"}


def test_corpora_are_found_by_source(data):
    assert set(find_corpora(data)) == {*ROOTS, "code-test"}


def test_the_audit_finds_what_the_real_files_hold(data, shared):
    found = audit(list(find_corpora(data).values()), shared / "data/merl-splits")
    kinds = {finding.kind for finding in found}
    assert {"labels by substring", "counts", "class without positives", "same signal twice"} <= kinds
    assert "patient in two splits" not in kinds
    pairs = [finding.where for finding in found if finding.kind == "same signal twice"]
    assert f"{data / 'cinc2021'} and {data / 'csn'}" in pairs and f"{data / 'cinc2021'}" in pairs
