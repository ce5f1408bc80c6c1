"""The audits find what is planted, and what really lies in the published files and in two releases of a record."""

import numpy as np
import pytest
from fakes import FakeCorpus

from dbeta.data.records import read_record
from dbeta.evaluation.audits import audit, audit_splits, duplicate_signals, shared_patients, unmeasurable_classes
from dbeta.evaluation.datasets import Rows
from dbeta.evaluation.label_sets import synthetic_set


class Signals(FakeCorpus):
    """Records in memory."""

    def __init__(self, path, records):
        super().__init__("x", list(records), [[]] * len(records), path=path)
        self.columns["rate_hz"] = [rate for _, rate in records.values()]
        self.adc = [adc for adc, _ in records.values()]

    def read_adc(self, record):
        return self.adc[record]


def rows(names, groups, targets):
    return Rows(names=names, groups=groups, targets=np.array(targets, bool))


def test_published_files(shared):
    found = audit_splits(shared / "data/merl-splits")
    kinds = {finding.kind for finding in found}
    assert "labels by substring" in kinds and "class with fewer than 4 positives" in kinds
    assert not kinds & {"patient in two splits", "record in two splits", "counts", "class without positives"}
    substring = next(f for f in found if f.kind == "labels by substring" and "train" in f.where)
    assert {part.split()[0] for part in substring.detail.split(", ")} == {"ST", "SA", "AF", "VB", "2AVB", "AVB", "CR"}
    assert "VB 665 (true 3)" in substring.detail
    assert any(f.where == "PTBXL-Form test" and "PRC(S) (1)" in f.detail for f in found)


def test_a_corpus_is_audited_whole(shared):
    """A patient in two splits, classes without positives, counts, and a signal that is there twice."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=(12, 5000)), -1)
    signal = (walk * 100).astype(np.int16)
    corpus = Signals("c", {name: (signal, 500.0) for name in "abc"})
    corpus.source, corpus.labels = "ptb-xl", ["NORM"]
    corpus.columns |= {"labels": [["NORM"]] * 3, "subject": list("ppq"), "split": ["train", "test", "validation"]}
    found = audit([corpus])
    kinds = [finding.kind for finding in found]
    assert kinds[0] == "patient in two splits" and kinds[-1] == "same signal twice" and found[-1].detail.count("=") == 3
    assert {"counts", "class without positives", "class without negatives"} <= set(kinds)
    assert any(finding.kind == "label set" and "ptbxl-form" in finding.detail for finding in found)
    assert "same signal twice" not in {finding.kind for finding in audit([corpus], signals=False)}
    assert "labels by substring" in {finding.kind for finding in audit([], shared / "data/merl-splits")}


def test_patients_and_records_in_two_splits():
    parts = {"train": rows(["a", "b"], ["p", "q"], [[1], [0]]), "test": rows(["b", "c"], ["q", "r"], [[1], [1]])}
    found = {finding.kind: finding.detail for finding in shared_patients(parts, "set")}
    assert found == {"patient in two splits": "q", "record in two splits": "b"}
    kinds = [(f.kind, f.where) for f in unmeasurable_classes(parts, synthetic_set(["A"]))]
    assert ("class without negatives", "synthetic test") in kinds


def test_the_same_signal_is_found_through_gain_offset_and_rounding():
    generator = np.random.default_rng(0)
    walk = np.cumsum(generator.normal(size=(3, 12, 5000)), -1) * 100
    first, other, third = walk.astype(np.int16)
    scaled = np.rint(first * 0.51 + 30).astype(np.int32)
    one = Signals("one", {"r1": (first, 500.0), "r2": (other, 500.0)})
    two = Signals("two", {"s1": (scaled, 500.0), "s2": (third, 500.0), "s3": (other, 1000.0)})
    found = duplicate_signals([one, two])
    assert [(f.where, f.detail) for f in found] == [("one and two", "r1 = s1")]


def test_flat_and_missing_leads_are_no_evidence():
    flat = np.zeros((12, 5000), np.int16)
    missing = np.full((12, 5000), np.iinfo(np.int16).min, np.int16)
    assert duplicate_signals([Signals("one", {"a": (flat, 500.0), "b": (flat, 500.0), "c": (missing, 500.0)})]) == []


def test_real_duplicates_across_releases(shared):
    """PTB-XL's own form and the challenge's; a Georgia record at gain 4880 and at 1000."""
    data = shared / "data"
    folders = {
        "ptb-xl": [data / f"ptbxl/records500/00000/{n:05d}_hr.hea" for n in range(1, 6)],
        "challenge": [data / "cinc2021/ptb-xl/HR00001.hea", data / "cinc2021/georgia/E00001.hea"],
        "early": [data / "cinc2021/quirks/gain-4880-early-release/E00001.hea"],
    }
    corpora = []
    for name, paths in folders.items():
        records = [(path, read_record(path)) for path in paths]
        corpora.append(Signals(name, {path.stem: (record.adc, record.rate_hz) for path, record in records}))
    found = {finding.where: finding.detail for finding in duplicate_signals(corpora)}
    assert found == {"challenge and ptb-xl": "HR00001 = 00001_hr", "challenge and early": "E00001 = E00001"}


def test_no_splits(tmp_path):
    with pytest.raises(ValueError, match="holds no published split"):
        audit_splits(tmp_path)
