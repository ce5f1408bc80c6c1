"""The paper's values and its category matching, against the text of the paper itself."""

import re

import numpy as np
import pytest

from dbeta.evaluation import paper, shift
from dbeta.evaluation.label_sets import label_set
from dbeta.evaluation.metrics import macro_auc


@pytest.fixture(scope="module")
def text(shared):
    return (shared / "spec/PAPER.txt").read_text()


def row(text: str, start: str, after: str) -> list[float]:
    """Numbers of the first row that begins with ``start`` after ``after``."""
    line = re.search(rf"^{re.escape(start)}\s.*$", text[text.index(after) :], re.M)[0]
    return [float(n) for n in re.findall(r"(?<![\w.-])\d+\.\d+", line)]


def test_tables_1_to_5(text):
    values = {key: value for key, (_, value) in paper.VALUES.items()}
    after = text[text.index("Table 1. Performance") :]
    lines = after[after.index("\nD-BETA") :].splitlines()[1:3]
    dx, ident = ([float(n) for n in re.findall(r"\d+\.\d", line)] for line in lines)
    assert dx == [values["finetune", "cinc2021", lead, None] for lead in paper.LEADS]
    assert ident == [values["identify", "cinc2021", lead, None] for lead in paper.LEADS]
    sets = ("ptbxl-super", "ptbxl-sub", "ptbxl-form", "ptbxl-rhythm", "cpsc2018", "csn")
    probes = [values["linear-probe", key, "12", fraction] for key in sets for fraction in paper.FRACTIONS]
    assert probes == row(text, "D-BETA", "Table 2. Performance")
    zero_shot = [values["zero-shot", key, "12", None] for key in (*sets, "average")]
    assert zero_shot == row(text, "D-BETA", "Table 3. Zero-shot")
    shifts = [values["shift", f"{s}>{t}", "12", None] for s, t in shift.PAIRS]
    assert shifts == row(text, "D-BETA", "Table 4. Zero-shot")
    experts = re.search(r"^92.07.*$", text, re.M)[0].split()
    assert [*map(float, experts)] == [*paper.EXPERTS.values(), values["zero-shot", "code-test", "12", None]]


def test_ablation_tables(text):
    numbers = {name: [n for cell in cells if cell for n in cell] for name, cells in paper.ABLATIONS.items()}
    starts = {
        "default": ("6", "✓\t✓\t✓"),
        "without-n3s": ("6", "✓\t✓\t\t"),
        "without-n3s-ets": ("6", "✓\t\t\t"),
        "text-medcpt": ("7", "Med-CPT"),
        "text-deberta": ("7", "Deberta"),
        "text-bert": ("7", "Bert"),
    }
    for name, (after, start) in starts.items():
        line = next(x for x in text[text.index(f"Table {after}. Effects") :].splitlines() if x.startswith(start))
        assert [float(n) for n in re.findall(r"\d+\.\d+", line)] == numbers[name], name
    for table, name in (("12", "without-etm"), ("13", "without-mlm-mem")):
        line = next(x for x in text[text.index(f"Table {table}. Impact") :].splitlines() if x.startswith("w/o"))
        assert [float(n) for n in re.findall(r"\d+\.\d+", line)] == list(paper.ZERO_SHOT_ABLATIONS[name].values())


def test_matching_is_table_11(text):
    printed = text[text.index("Table 11.") : text.index("A.3. Enhancing")]
    blocks = re.split(r"^(?:PTBXL-Super|CPSC2018)\t(?:CPSC2018|CSN)$", printed, flags=re.M)[1:]
    for block, groups in zip(blocks, shift.MATCHES.values(), strict=True):
        rows = dict(line.split("\t") for line in block.strip().splitlines())
        assert {k: () if v == "None" else tuple(v.split(", ")) for k, v in rows.items()} == groups


@pytest.mark.parametrize("pair", shift.PAIRS, ids=">".join)
def test_matching_classes_exist(pair):
    assert set(shift.matching_classes(*pair)) <= set(label_set(pair[1]).labels)


def test_shift_is_the_mean_of_the_targets_own_aucs():
    names = list(label_set("cpsc2018").labels)
    generator = np.random.default_rng(0)
    targets = generator.random((200, 9)) < 0.3
    scores = generator.normal(size=(200, 9)) + targets
    whole = macro_auc(scores, targets, names, bootstrap=0).per_class
    table = shift.shift_table(scores, targets, names, "ptbxl-super", "cpsc2018", bootstrap=100)
    assert set(table.per_class) == {"NORM", "1AVB", "CRBBB", "CLBBB", "STE", "STD"}
    assert table.macro == pytest.approx(np.mean([whole[name] for name in table.per_class]))
    assert len(shift.matching_classes("csn", "cpsc2018")) == 9  # all: Table 4's 80.10 is Table 3's 80.1
    with pytest.raises(ValueError, match="no category matching"):
        shift.matching_classes("code-test", "csn")
