"""Every task on every set whose signals are there, from raw records to results, with a model of smoke size (slow)."""

import csv

import h5py
import numpy as np
import pytest

from dbeta.data.prepare import prepare
from dbeta.data.records import read_ecg
from dbeta.data.resample import resample
from dbeta.evaluation.audits import audit_splits
from dbeta.evaluation.evaluate import Options, evaluate, find_corpora
from dbeta.evaluation.label_sets import all_label_sets

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
    for source, root in ROOTS.items():
        prepare(source, shared / "data" / root, folder / source, workers=2)
    prepare("code-test", code_test(shared / "data", tmp_path_factory.mktemp("code-test")), folder / "code-test")
    return folder


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
def results(data, model, shared, tmp_path_factory):
    options = Options(
        splits=shared / "data/merl-splits", scoring=shared / "data/cinc2021-scoring",
        annotations=shared / "data/code-test/annotations", epochs=1, bootstrap=50, seeds=(42, 43),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("results")
    return evaluate("all", model, data, out, options), out


def test_every_task_runs_on_every_set(results):
    found, out = results
    done = {(r.task, r.dataset) for r in found}
    none = {r.dataset for r in found if r.value is None}  # one or two test records: no class can be measured
    assert none <= {"sph", "code-15", "ptbxl-super>cpsc2018"}
    sets = set(all_label_sets())
    assert {d for t, d in done if t == "zero-shot"} >= sets
    assert {d for t, d in done if t == "linear-probe"} >= sets - {"code-test"}
    assert ("finetune", "cinc2021") in done and ("identify", "ptb-xl") in done
    assert len([1 for t, _ in done if t == "shift"]) == 6 and len([1 for t, _ in done if t == "experts"]) == 4
    tuned = [r for r in found if r.task == "finetune" and r.metric == "CinC 2021 score"]
    assert [r.leads for r in tuned] == ["12", "P-6", "P-3", "P-2", "P-1"] and all(r.paper for r in tuned)
    assert all("meaningless" in r.note for r in found if r.task != "experts")
    assert {r.split for r in found if r.dataset == "ptbxl-super"} == {"published"}
    assert (out / "results.csv").is_file() and (out / "results.png").is_file()


def test_what_is_not_measurable_is_named(results):
    found, _ = results
    rhythm = next(r for r in found if (r.task, r.dataset) == ("zero-shot", "ptbxl-rhythm"))
    assert "no positives" in rhythm.left_out and rhythm.classes < 12


def test_only_what_is_missing_is_done_again(results, data, model, shared, monkeypatch):
    found, out = results
    monkeypatch.setattr(model, "encode_ecg", None)
    options = Options(splits=shared / "data/merl-splits", epochs=1, bootstrap=50, seeds=(42, 43))
    again = evaluate("linear-probe", model, data, out, options)
    assert again == [r for r in found if r.task == "linear-probe"]


def test_clean_labels_and_bare_names(data, model, shared, tmp_path):
    options = Options(splits=shared / "data/merl-splits", labels="clean", prompts="names", sets=("csn",), bootstrap=50)
    (result,) = evaluate("zero-shot", model, data, tmp_path, options)
    assert result.dataset == "csn-clean" and result.prompts == "names" and result.paper is None


def test_corpora_are_found_by_source(data):
    assert set(find_corpora(data)) == {*ROOTS, "code-test"}


def test_audit_of_the_published_splits(shared):
    assert any(finding.kind == "labels by substring" for finding in audit_splits(shared / "data/merl-splits"))
