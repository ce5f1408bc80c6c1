"""Label sets and splits against the published files and the data sets' own tables."""

import csv

import numpy as np
import pytest
from fakes import FakeCorpus

from dbeta.evaluation.datasets import count_notes, derive_split, load_dataset, read_published, record_stem
from dbeta.evaluation.experts import expert_tables
from dbeta.evaluation.label_sets import all_label_sets, label_set, synthetic_set

PUBLISHED = ("ptbxl-super", "ptbxl-sub", "ptbxl-form", "ptbxl-rhythm", "cpsc2018", "csn")
CLASSES = {"ptbxl-super": 5, "ptbxl-sub": 23, "ptbxl-form": 19, "ptbxl-rhythm": 12, "cpsc2018": 9, "csn": 38}


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_splits_have_the_counts_of_table_9(shared, key):
    labels = label_set(key)
    rows = read_published(shared / "data/merl-splits", labels)
    assert tuple(map(len, rows.values())) == labels.counts and count_notes(labels, rows) == []
    assert len(labels.labels) == CLASSES[key]
    names = [name for part in rows.values() for name in part.names]
    assert len(set(names)) == len(names)
    patients = [set(part.groups) for part in rows.values()]
    assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])


@pytest.mark.parametrize("key", PUBLISHED)
def test_every_published_column_is_a_class(shared, key):
    labels = label_set(key)
    with (shared / "data/merl-splits" / labels.splits.format(split="test")).open() as file:
        header = next(csv.reader(file))
    first = {"csn": 3, "cpsc2018": 7}.get(key, 6)
    assert set(header[first:]) == set(labels.labels)


def test_columns_are_read_by_name_where_their_order_differs_between_splits(shared):
    """ISC and AVB stand in another order in the subclass training file than in the validation and test files."""
    rows = read_published(shared / "data/merl-splits", label_set("ptbxl-sub"))
    column = label_set("ptbxl-sub").labels.index("AVB")
    assert [int(part.targets[:, column].sum()) for part in rows.values()] == [658, 83, 82]


def test_csn_labels_by_substring_and_by_whole_diagnosis(shared):
    counts = {}
    for kind in ("merl", "clean"):
        labels = label_set("csn", labels=kind)
        rows = read_published(shared / "data/merl-splits", labels)
        total = sum(part.targets.sum(0) for part in rows.values())
        counts[kind] = dict(zip(labels.labels, map(int, total)))
    wrong = {"VB": (916, 3), "AVB": (913, 176), "AF": (4753, 3340), "ST": (6338, 5154), "SA": (2828, 2107)}
    wrong |= {"CR": (216, 75), "2AVB": (38, 22)}
    for label, count in counts["merl"].items():
        assert (count, counts["clean"][label]) == wrong.get(label, (count, count)), label
    assert {k: counts["clean"][k] for k in ("SB", "LVQRSAL", "IDC")} == {"SB": 3903, "LVQRSAL": 751, "IDC": 412}
    assert "SB" not in counts["merl"]


def test_one_acronym_means_two_things():
    names = {key: label_set(key).names for key in all_label_sets()}
    assert names["csn"]["AF"] == "atrial flutter" and names["code-test"]["AF"] == "atrial fibrillation"
    assert names["csn"]["STE"] != "st elevation" and names["csn"]["STTU"] == names["cpsc2018"]["STE"] == "st elevation"
    assert label_set("csn").codes["AF"] == label_set("cinc2021").codes["AFL"]


def test_codes_of_ptbxl_are_those_of_its_statement_table(shared):
    with (shared / "data/ptbxl/scp_statements.csv").open() as file:
        statements = {row[""]: row for row in csv.DictReader(file)}
    for key, column in (("ptbxl-super", "diagnostic_class"), ("ptbxl-sub", "diagnostic_subclass")):
        expected = {}
        for code, row in statements.items():
            if row["diagnostic"]:
                expected.setdefault(row[column].strip("_"), set()).add(code)
        assert {label: set(codes) for label, codes in label_set(key).codes.items()} == expected
    for key in ("form", "rhythm"):
        codes = {code for held in label_set(f"ptbxl-{key}").codes.values() for code in held}
        assert codes == {code for code, row in statements.items() if row[key]}


def test_targets_from_scp_codes_agree_with_the_published_targets(shared):
    with (shared / "data/ptbxl/ptbxl_database.csv").open() as file:
        records = {row["ecg_id"]: row["scp_codes"] for row in csv.DictReader(file)}
    for key in PUBLISHED[:4]:
        labels, compared = label_set(key), 0
        for part in read_published(shared / "data/merl-splits", labels).values():
            for name, targets in zip(part.names, part.targets):
                text = records.get(str(int(name.split("_")[0])))
                if text is not None:
                    held = {item.split("'")[1] for item in text.split(",")}
                    assert labels.targets_of(held) == list(targets), (key, name)
                    compared += 1
        assert compared > 50


def test_sph_codes_are_the_aha_codes_of_the_statement_table(shared):
    with (shared / "data/ptbxl/scp_statements.csv").open() as file:
        statements = {row[""]: row["AHA code"] for row in csv.DictReader(file)}
    assert {label: codes for label, codes in label_set("sph").codes.items()} == {
        label: (statements[label],) for label in label_set("sph").labels
    }
    corpus = FakeCorpus("sph", "abc", [["22+308", "1"], ["106"], ["50"]])
    dataset = load_dataset(label_set("sph"), corpus)
    held = {row.names[0]: set(np.flatnonzero(row.targets[0])) for row in dataset.splits.values()}
    assert held["a"] == {label_set("sph").labels.index("SBRAD"), label_set("sph").labels.index("NORM")}


def test_challenge_codes_are_the_scored_table(shared):
    with (shared / "data/cinc2021-scoring/weights.csv").open() as file:
        classes = {frozenset(cell.split("|")) for cell in next(csv.reader(file))[1:]}
    assert {frozenset(codes) for codes in label_set("cinc2021").codes.values()} == classes
    with (shared / "data/cinc2021-scoring/dx_mapping_scored.csv").open() as file:
        abbreviations = {row["SNOMEDCTCode"]: row["Abbreviation"] for row in csv.DictReader(file)}
    for label, codes in label_set("cinc2021").codes.items():
        assert {abbreviations[code] for code in codes} == set(label.split("|"))


def test_csn_codes_agree_with_real_headers(shared):
    """The code list of a header holds the code of every acronym the split files give the same record."""
    published = {}
    labels = label_set("csn", labels="clean")
    for part in read_published(shared / "data/merl-splits", labels).values():
        published |= dict(zip(part.names, part.targets))
    compared = 0
    with (shared / "data/cinc2021/RECORDS.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["record"] in published:
                mine = labels.targets_of(set(row["dx_snomed"].split(",")))
                extra = {n for n, a, b in zip(labels.labels, mine, published[row["record"]]) if a != b}
                assert extra <= {"1AVB"}, (row["record"], extra)  # JS00005 gained a code in the later release
                compared += 1
    assert compared > 30


def test_experts_of_table_5(shared):
    tables = expert_tables(shared / "data/code-test/annotations", bootstrap=200)
    found = {name: round(table.macro, 5) for name, table in tables.items()}
    assert found == {
        "Cardio Resident": 0.92077,
        "Emergency Resident": 0.90514,
        "Medical Student": 0.93611,
        "DNN": 0.966,
    }
    assert all(table.interval[0] < table.macro < table.interval[1] for table in tables.values())


def test_published_split_is_matched_by_record_name(shared):
    labels = label_set("cpsc2018")
    published = read_published(shared / "data/merl-splits", labels)
    names = [part.names[0] for part in published.values()]
    corpus = FakeCorpus("cpsc2018", [f"g1/{name}.mat" for name in reversed(names)], [["426783006"]] * 3)
    dataset = load_dataset(labels, corpus, shared / "data/merl-splits")
    assert dataset.origin == "published"
    assert [list(rows.records) for rows in dataset.splits.values()] == [[2], [1], [0]]
    assert all(list(rows.targets[0]) == list(published[split].targets[0]) for split, rows in dataset.splits.items())
    assert any("6,874 of 6,877 published records are not in" in note for note in dataset.notes)


def test_a_split_by_patient_is_derived_where_the_published_one_is_empty(shared):
    names = [f"X{i}" for i in range(40)]
    corpus = FakeCorpus("cpsc2018", names, [["164889003"], []] * 20, subjects=[f"p{i // 4}" for i in range(40)])
    dataset = load_dataset(label_set("cpsc2018"), corpus, shared / "data/merl-splits")
    assert dataset.origin == "derived by patient" and "another one by patient is used" in " ".join(dataset.notes)
    assert sum(map(len, dataset.splits.values())) == 20  # records without a label of the set are dropped
    patients = [set(rows.groups) for rows in dataset.splits.values()]
    assert all(patients) and sum(map(len, patients)) == 10


def test_a_derived_split_has_the_proportions_of_table_9(shared):
    corpus = FakeCorpus("cinc2021", [f"E{i:05d}" for i in range(100)], [[]] * 100)
    parts = load_dataset(label_set("cinc2021"), corpus).splits
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 80, "validation": 10, "test": 10}


def test_patients_of_the_challenges_ptbxl_records_stay_together(shared, tmp_path):
    """Their headers name no patient; PTB-XL's own table does."""
    table = shared / "data/ptbxl/ptbxl_database.rows1-500.csv"
    with table.open() as file:
        patient = {f"ptb-xl/HR{int(row['ecg_id']):05d}": row["patient_id"] for row in csv.DictReader(file)}
    corpus = FakeCorpus("cinc2021", patient, [["426783006"]] * len(patient))
    for given, crossing in ((table, 0), (None, 1)):
        dataset = load_dataset(label_set("cinc2021"), corpus, patients=given)
        groups = [{patient[name] for name in rows.names} for rows in dataset.splits.values()]
        assert (sum(map(len, groups)) > len(set.union(*groups))) == crossing
        assert any("--patients ptbxl_database.csv" in note for note in dataset.notes) == crossing
    (tmp_path / "one-line.json").write_text('{"ecg_id": 1}')
    for wrong in (shared / "data/sph/metadata.csv", tmp_path / "one-line.json"):
        with pytest.raises(ValueError, match=r"give PTB-XL's ptbxl_database\.csv"):
            load_dataset(label_set("cinc2021"), corpus, patients=wrong)


def test_csn_without_its_columns_says_so(shared):
    corpus = FakeCorpus("csn", "abc", [["426783006"]] * 3)
    for kind, said in (("merl", True), ("clean", False)):
        notes = load_dataset(label_set("csn", labels=kind), corpus).notes
        assert any("not the published columns" in note for note in notes) == said


def test_the_corpus_split_is_used_where_there_is_no_published_one():
    splits = ["train", "train", "validation", "test"]
    dataset = load_dataset(synthetic_set(["A"]), FakeCorpus("synthetic", "abcd", [["A"]] * 4, splits=splits))
    assert dataset.origin == "corpus" and [len(rows) for rows in dataset.splits.values()] == [2, 1, 1]


def test_records_that_may_have_been_trained_on_are_not_tested():
    """A corpus without a test part: half of the held-out patients are tested, no training record ever is."""
    splits = ["train"] * 20 + ["validation"] * 12
    subjects = [f"p{i // 2}" for i in range(32)]
    corpus = FakeCorpus("synthetic", range(32), [["A"]] * 32, subjects=subjects, splits=splits)
    dataset = load_dataset(synthetic_set(["A"]), corpus)
    assert dataset.origin.startswith("corpus") and [len(rows) for rows in dataset.splits.values()] == [20, 6, 6]
    assert set(dataset.splits["train"].records) == set(range(20))
    assert not set(dataset.splits["test"].groups) & set(dataset.splits["validation"].groups)
    fresh = load_dataset(synthetic_set(["A"]), corpus, derive=True)
    assert fresh.origin == "derived by patient" and len(fresh.splits["test"]) == 6


def test_code_test_is_all_test_and_keeps_normal_records():
    dataset = load_dataset(label_set("code-test"), FakeCorpus("code-test", ["1", "2"], [["AF"], []]))
    assert [len(rows) for rows in dataset.splits.values()] == [0, 0, 2]
    assert list(dataset.splits["test"].targets.sum(1)) == [1, 0]
    assert dataset.notes == ("CODE-test test: 2 rows, Table 9 has 827",)
    folds = FakeCorpus("ptb-xl", "abc", [["NORM"]] * 3, splits=["train", "validation", "test"])
    notes = load_dataset(label_set("ptbxl-super"), folds).notes  # the set's own folds are counted too
    assert notes[0] == "PTBXL-Super train: 1 rows, Table 9 has 17,084" and len(notes) == 3


def test_user_mistakes_are_named(shared, tmp_path):
    with pytest.raises(ValueError, match="there are ptbxl-super"):
        label_set("ptb")
    with pytest.raises(ValueError, match=r"merl .* clean"):
        label_set("csn", labels="dirty")
    with pytest.raises(ValueError, match="--splits DIR must hold icbeb"):
        read_published(tmp_path, label_set("cpsc2018"))
    with pytest.raises(ValueError, match="no record with a label of cpsc2018"):
        load_dataset(label_set("cpsc2018"), FakeCorpus("cpsc2018", ["a"], [["X"]]))
    with pytest.raises(ValueError, match="three are needed"):
        derive_split(["a", "b", "a"])


def test_derived_split_does_not_depend_on_the_order_of_records():
    groups = [f"p{i % 30}" for i in range(90)]
    forward, backward = derive_split(groups)[0], derive_split(groups[::-1])[0]
    assert forward == backward[::-1] and np.unique(forward, return_counts=True)[1].tolist() == [18, 63, 9]


def test_record_stem():
    assert record_stem("/chapman/WFDBRecords/44/448/JS44279.mat") == "JS44279"
    assert record_stem("records500/00000/00001_hr") == "00001_hr" and record_stem("A2600") == "A2600"
