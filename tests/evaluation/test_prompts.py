"""The descriptions: one for every label, written for it, and replaceable."""

import csv
import json
import re

import pytest
from fakes import FakeCorpus

from dbeta.evaluation.label_sets import all_label_sets, label_set
from dbeta.evaluation.prompts import descriptions, load_prompts, prompts_for

SETS = [label_set(key, labels="clean") for key in all_label_sets()]


@pytest.mark.parametrize("labels", SETS, ids=lambda labels: labels.key)
def test_every_label_has_its_own_description(labels):
    texts = load_prompts(labels)
    assert list(texts) == list(labels.labels) and len(set(texts.values())) == len(texts)
    for label, (text,) in texts.items():
        assert text.startswith(labels.names[label]) and text == text.lower()
        assert 8 <= len(text.split()) <= 60, text  # well below the 254 tokens a text may have


def test_no_description_is_unused():
    assert {name for labels in SETS for name in labels.names.values()} == set(descriptions())


def test_a_description_names_no_unrelated_class_of_its_set():
    """Fig. 6: flutter must not be described by fibrillation. ``related`` are its signs."""
    related = {"sinus rhythm", "prolonged pr interval", "left axis deviation", "right axis deviation", "st elevation"}
    related |= {"st depression", "bundle branch block", "left bundle branch block"}
    for labels in SETS:
        for label, name in labels.names.items():
            for other in set(labels.names.values()) - {name} - related:
                assert other in name or other not in descriptions()[name].lower(), (labels.key, label, other)


def _agreement(name: str, theirs: str) -> float:
    """Share of the longer words of a name whose root stands in the data set's own wording."""
    theirs = theirs.replace("abnormal", "change abnormal")  # CSN's own name for 428750005 and others is "change"
    words = [word for word in re.findall(r"[a-z]+", name) if len(word) > 2]
    return sum(word[:5] in theirs for word in words) / len(words)


def test_names_agree_with_the_statement_table_of_ptbxl(shared):
    with (shared / "data/ptbxl/scp_statements.csv").open() as file:
        table = {row[""]: " ".join(row.values()).lower().replace("-", "") for row in csv.DictReader(file)}
    for key in ("ptbxl-sub", "ptbxl-form", "ptbxl-rhythm"):
        labels = label_set(key)
        for label, name in labels.names.items():
            theirs = " ".join(table[code] for code in labels.codes[label])
            assert _agreement(name, theirs) >= 0.5, (key, label, name, theirs)


def test_names_agree_with_the_challenge_table(shared):
    table = {}
    for part in ("scored", "unscored"):
        with (shared / f"data/cinc2021-scoring/dx_mapping_{part}.csv").open() as file:
            table |= {row["SNOMEDCTCode"]: row["Dx"].lower() for row in csv.DictReader(file)}
    for key in ("cinc2021", "csn"):
        labels = label_set(key, labels="clean")
        for label, name in labels.names.items():
            theirs = " ".join(table.get(code, "") for code in labels.codes[label])
            assert _agreement(name, theirs) >= 0.5, (key, label, name, theirs)


def test_bare_names_and_files(tmp_path):
    labels = label_set("ptbxl-super")
    assert load_prompts(labels, "names")["CD"] == ("conduction disturbance",)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"ptbxl-super": {label: f"My {label}" for label in labels.labels}}))
    assert load_prompts(labels, str(file))["MI"] == ("my mi",)
    file.write_text(json.dumps({label: ["One", "Two"] for label in labels.labels}))
    assert load_prompts(labels, str(file))["MI"] == ("one", "two")
    file.write_text(json.dumps({"NORM": "a", "MI": "b"}))
    with pytest.raises(ValueError, match="no text for STTC, CD, HYP"):
        load_prompts(labels, str(file))
    file.write_text(json.dumps({label: " " for label in labels.labels}))
    with pytest.raises(ValueError, match="no text for NORM, MI"):
        load_prompts(labels, str(file))
    file.write_text("[")
    with pytest.raises(ValueError, match="give descriptions, names, or a JSON file"):
        load_prompts(labels, str(file))


def test_prompts_of_a_corpus_are_by_its_own_labels():
    corpus = FakeCorpus("ptb-xl", ["1", "2"], [["ASMI", "SR"], ["XYZ"]])
    texts = prompts_for(corpus)
    assert list(texts) == ["ASMI", "SR"] and texts["ASMI"][0].startswith("anterior myocardial infarction")
    assert prompts_for(FakeCorpus("mimic-iv-ecg", ["1"], [[]])) == {}


def test_synthetic_prompts_are_the_held_out_ones():
    from dbeta.data.synthetic import LABELS

    corpus = FakeCorpus("synthetic", ["1"], [list(LABELS)])
    assert {label: len(texts) for label, texts in prompts_for(corpus).items()} == dict.fromkeys(LABELS, 3)
