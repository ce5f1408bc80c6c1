"""One set from a corpus to results.csv, results that are kept, and mistakes that are named."""

import csv
import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dbeta.evaluation import results, tasks
from dbeta.evaluation.evaluate import Options, evaluate, find_corpora
from dbeta.evaluation.features import FeatureCache
from dbeta.evaluation.identify import Identities
from dbeta.evaluation.label_sets import synthetic_set
from dbeta.evaluation.results import Result, Units, not_run, show

QUICK = Options(epochs=2, bootstrap=50, fractions=(0.1, 1.0), seeds=(42, 43), derive=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def found(model, synthetic, out):
    return [r for task in ("zero-shot", "linear-probe") for r in evaluate(task, model, synthetic.path, out, QUICK)]


def test_results_are_written_beside_the_papers(found, out):
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    shot, *mine = [row for row in rows if row["dataset"] == "synthetic"]
    assert shot["task"] == "zero-shot" and shot["prompts"] == "descriptions"  # an earlier command's result is kept
    assert [(row["fraction"], row["seed"]) for row in mine] == [
        ("0.1", ""), ("0.1", "42"), ("0.1", "43"), ("1.0", ""), ("1.0", "42"), ("1.0", "43"),
    ]  # fmt: skip
    for row in mine:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"]) and "meaningless" in row["note"]
    absent = [row for row in rows if row["note"] == "not run"]
    assert len(absent) == 18 + 8 + 4 and all(row["value"] == "" and float(row["paper"]) > 0.6 for row in absent)
    stored = json.loads((out / "results.json").read_text())
    assert stored["rows"][0]["dataset"] == "synthetic" and stored["packages"]["torch"] and stored["date"]
    assert (out / "results.png").stat().st_size > 10_000 and (out / "figures/roc-synthetic-12.png").is_file()


def test_seed_mean_is_the_mean(found):
    probes = [r for r in found if r.task == "linear-probe" and r.fraction == 1.0]
    assert probes[0].seed is None and probes[0].value == pytest.approx(np.mean([r.value for r in probes[1:]]))


def test_a_probe_is_chosen_on_validation_and_sees_the_protocols_window(model, synthetic, tmp_path, monkeypatch):
    seen, windows = [], set()
    train, features = tasks.train_probes, FeatureCache.features

    def spy(train_part, validation, **more):
        seen.append((len(train_part[0]), len(validation[0])))
        return train(train_part, validation, **more)

    def extract(cache, corpus, records, *, window_s=10.0, **more):
        windows.add(window_s)
        return features(cache, corpus, records, window_s=window_s, **more)

    monkeypatch.setattr(tasks, "train_probes", spy)
    monkeypatch.setattr(FeatureCache, "features", extract)
    five = replace(synthetic_set(list(synthetic.labels)), window_s=5.0)  # as CPSC2018 is shown
    monkeypatch.setattr("dbeta.evaluation.evaluate.sets_for", lambda *_, **__: [five])
    for task in ("linear-probe", "zero-shot"):
        evaluate(task, model, synthetic.path, tmp_path, replace(QUICK, fractions=(1.0,), figures=False))
    assert seen == [(168, 24)] and windows == {5.0}  # 48 are tested


def test_per_class_details_are_kept(found, out):
    (unit,) = (out / "units").glob("linear-probe-synthetic-12-10-*.json")
    details = json.loads(unit.read_text())["details"]["42"]
    assert details["records"] == round(0.1 * 168) and details["epoch"] in (1, 2)
    with (out / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    mine = [row for row in rows if (row["task"], row["fraction"], row["seed"]) == ("linear-probe", "0.1", "42")]
    macro = next(r.value for r in found if r.fraction == 0.1 and r.seed == 42)
    assert np.mean([float(row["auc"]) for row in mine if row["auc"]]) == pytest.approx(macro)
    assert all(float(row["low"]) <= float(row["auc"]) <= float(row["high"]) for row in mine if row["auc"])
    assert {"AFIB"} < {row["class"] for row in mine} and all(int(row["positives"]) >= 0 for row in mine)


def test_a_second_run_does_nothing_again(found, model, synthetic, out, monkeypatch):
    monkeypatch.setattr(model, "encode_ecg", None)
    monkeypatch.setattr(tasks, "train_probes", None)
    again = evaluate("linear-probe", model, synthetic.path, out, QUICK)
    assert again == [r for r in found if r.task == "linear-probe"]
    with pytest.raises(TypeError):  # other options are other work
        evaluate("linear-probe", model, synthetic.path, out, Options(epochs=3, bootstrap=50, seeds=(42,), derive=True))


def test_fine_tuning_and_identification(model, synthetic, out):
    options = Options(epochs=1, bootstrap=50, leads=("P-2",), seeds=(42,), derive=True)
    tuned = evaluate("finetune", model, synthetic.path, out, options)
    assert [(r.leads, r.metric, r.records) for r in tuned] == [("P-2", "macro AUC", 48)] and 0 <= tuned[0].value <= 1
    (result,) = evaluate("identify", model, synthetic.path, out, options)
    assert result.metric == "top-1 accuracy" and result.records >= 2 and "chance" in result.note


def test_comparison_is_made_only_with_the_same_case():
    base = {"task": "zero-shot", "dataset": "csn", "title": "CSN", "value": 0.8}
    assert Result(**base).as_row()["difference"] == pytest.approx(0.8 - 0.763)
    for other in ({"prompts": "names"}, {"leads": "P-6"}, {"dataset": "csn-clean"}, {"metric": "accuracy"}):
        assert Result(**base | other).paper is None
    probe = base | {"task": "linear-probe", "fraction": 0.01}
    assert Result(**probe).paper == (2, pytest.approx(0.8004)) and Result(**probe, seed=42).paper is None
    missing = not_run([Result(**base)], ("zero-shot",))
    assert "CSN" not in {r.title for r in missing} and len(missing) == 7 + 4  # with Table 5's readers
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show([Result(**base), *missing]))
    text = console.export_text()
    assert "+3.70" in text and "76.30 T3" in text and text.count("not run") == 11


def test_a_case_without_a_measurable_class_was_run():
    ran = Result(task="shift", dataset="csn>cpsc2018", title="csn > cpsc2018")
    rows = not_run([ran], ("shift", "identify"))
    assert len(rows) == 5 + 5 and "csn>cpsc2018" not in {row.dataset for row in rows}
    assert {row.title for row in rows if row.task == "identify"} == {"Physionet2021-Id."}
    assert "ptbxl-super > csn" in {row.title for row in rows}


def test_the_report_says_how_many_classes_a_figure_is_of():
    from rich.console import Console

    some = Result(task="zero-shot", dataset="csn", title="CSN", value=0.8, classes=1, left_out="SR: no positives",
                  per_class={"AF": {}, "SR": {}})  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(show([some]))
    assert " 1/2 " in console.export_text()


def test_segments_of_identification_are_counted_against_table_9():
    people = Identities(train={0: "p", 1: "q"}, validation=[(2, 2)], test=[(3, 4)], origin="")
    store = SimpleNamespace(record=np.array([0, 0, 1, 2, 2, 3, 4]))
    assert tasks.identification_notes(people, store, 2_127) == [
        "Physionet2021-Id. train: 3 segments, Table 9 has 147,444",
        "Physionet2021-Id. validation: 2 segments, Table 9 has 17,670",
    ]


def test_options_of_a_command_line():
    assert Options.of(splits=None, leads=(), epochs=3) == Options(epochs=3)


def test_mistakes_are_named(model, synthetic, tmp_path):
    with pytest.raises(ValueError, match="task zeroshot: accepted are zero-shot"):
        evaluate("zeroshot", model, synthetic.path, tmp_path)
    with pytest.raises(ValueError, match="--leads P-7: accepted are 12, P-6"):
        evaluate("zero-shot", model, synthetic.path, tmp_path, Options(leads=("P-7",)))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate("zero-shot", model, synthetic.path, tmp_path, Options(sets=("csn",)))
    with pytest.raises(ValueError, match="--sets cns: accepted are ptbxl-super"):
        evaluate("zero-shot", model, synthetic.path, tmp_path, Options(sets=("cns",)))
    with pytest.raises(ValueError, match="both of synthetic"):
        shutil.copytree(synthetic.path, tmp_path / "again")
        find_corpora(synthetic.path, tmp_path / "again")
    with pytest.raises(ValueError, match=r"only runtime\.KEY can be set"):
        evaluate("zero-shot", tmp_path, synthetic.path, tmp_path, Options(overrides=("model.width=8",)))
    with pytest.raises(ValueError, match="shift needs a corpus of"):
        evaluate("shift", model, synthetic.path, tmp_path)
    with pytest.raises(ValueError, match="is no corpus and holds none"):
        find_corpora(tmp_path / "again" / "shards")


def test_results_of_another_model_are_replaced_and_a_damaged_unit_is_done_again(tmp_path, capsys):
    base = {"task": "zero-shot", "dataset": "csn", "title": "CSN"}
    results.write([Result(**base, value=0.8)], tmp_path, model="a", checksum="1")
    results.write([Result(**base, value=0.7, prompts="names")], tmp_path, model="a", checksum="1")
    assert [r.value for r in results.read(tmp_path)[1]] == [0.8, 0.7]
    results.write([Result(**base, value=0.6)], tmp_path, model="b", checksum="2")
    assert [r.value for r in results.read(tmp_path)[1]] == [0.6] and "another model" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        results.read(tmp_path)
    units = Units(tmp_path / "units")
    work = lambda _: ([Result(**base, value=0.5)], {})  # noqa: E731
    assert units.get("x", {}, work) == units.get("x", {}, None)
    next((tmp_path / "units").glob("x-*.json")).write_text("{")
    assert units.get("x", {}, work)[0].value == 0.5 and "is damaged" in capsys.readouterr().err
