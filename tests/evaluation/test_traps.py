"""Traps of the evaluation sets on their real files; those of the raw formats are in tests/data/test_sources.py."""

import csv

import h5py
import numpy as np
import pytest
import scipy.signal
import torch

from dbeta.data.corpus import Corpus
from dbeta.data.prepare import prepare
from dbeta.data.records import read_ecg, read_record
from dbeta.evaluation.datasets import load_dataset
from dbeta.evaluation.experts import read_annotations
from dbeta.evaluation.label_sets import label_set
from dbeta.evaluation.metrics import macro_auc
from dbeta.evaluation.signals import windows


def test_the_index_column_of_dnn_csv_is_not_a_class(shared):
    """Read by position, the columns move by one and the network falls from 0.966 below chance."""
    folder = shared / "data/code-test/annotations"
    gold, labels = read_annotations(folder / "gold_standard.csv"), label_set("code-test").labels
    with (folder / "dnn.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header[0] == "" and tuple(header[1:]) == labels
    by_position = np.array([[float(cell) for cell in row[:6]] for row in rows])
    found = [macro_auc(s, gold, labels, bootstrap=0).macro for s in (by_position, read_annotations(folder / "dnn.csv"))]
    assert found == pytest.approx([0.487, 0.966], abs=5e-4)


def test_code_test_is_shown_as_published(shared, tmp_path):
    """4096 zero-padded samples at 400 Hz become the first 5000 of 5120, as ``scipy.signal.resample`` has them."""
    paths = sorted((shared / "data/code15-sample").glob("*.mat"))
    tracings = np.zeros((len(paths), 4096, 12), np.float32)
    for tracing, path in zip(tracings, paths):
        mv = read_record(path).to_mv()
        start = (4096 - mv.shape[1]) // 2
        tracing[start : start + mv.shape[1]] = mv.T
    with h5py.File(tmp_path / "ecg_tracings.hdf5", "w") as file:
        file["tracings"] = tracings * 10
    gold = (shared / "data/code-test/annotations/gold_standard.csv").read_text().splitlines()
    (tmp_path / "gold_standard.csv").write_text("\n".join(gold[: 1 + len(paths)]) + "\n")
    prepare("code-test", tmp_path, tmp_path / "corpus", workers=1)
    corpus = Corpus.open(tmp_path / "corpus")
    shown = torch.cat(list(windows(corpus, np.arange(len(corpus))))).numpy()
    published = scipy.signal.resample(tracings, 5120, axis=1).transpose(0, 2, 1)[..., :5000]
    for row, name in enumerate(corpus.column("name")):
        expected = published[int(name)]
        error = np.sqrt(np.square(shown[row] - expected).mean() / np.square(expected).mean())
        assert error < 0.02, (name, error)  # the filters differ near 200 Hz and at the edges of the padding


def test_cpsc2018_is_its_first_five_seconds(shared, tmp_path):
    root = shared / "data/cinc2021/cpsc_2018"
    prepare("cpsc2018", root, tmp_path / "corpus", workers=1)
    corpus = Corpus.open(tmp_path / "corpus")
    lengths = corpus.column("samples") / corpus.column("rate_hz")
    assert lengths.min() >= 6 and lengths.max() > 10  # of 6 to 144 s
    rows = load_dataset(label_set("cpsc2018"), corpus, shared / "data/merl-splits").splits["train"]
    shown = torch.cat(list(windows(corpus, rows.records, window_s=label_set("cpsc2018").window_s))).numpy()
    for ecg, name in zip(shown, rows.names):
        np.testing.assert_allclose(ecg[:, :2500], read_ecg(root / f"{name}.hea")[:, :2500], atol=1e-5)
        assert not ecg[:, 2500:].any()
