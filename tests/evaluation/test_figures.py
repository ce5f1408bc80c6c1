"""The ECG is drawn to scale, and the curves are those of the figures beside them."""

import numpy as np
import pytest

from dbeta.data.records import LEADS
from dbeta.evaluation.figures import (
    draw_ecg,
    draw_pair,
    draw_reports,
    draw_results,
    draw_roc,
    draw_tsne,
    save_pairs,
    warn,
)
from dbeta.evaluation.metrics import macro_auc
from dbeta.evaluation.results import Result


def traces(figure):
    """Every drawn line longer than a calibration pulse, as (x, y) in mm."""
    return [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xdata()) > 10]


def test_ecg_is_to_scale():
    signal = np.tile(np.arange(12.0)[:, None] / 10, (1, 5000))  # lead i at i tenths of a millivolt
    signal[:, 2500:] += 0.1
    figure = draw_ecg(signal, title="x")
    lines = traces(figure)
    assert len(lines) == 13
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert set(LEADS) < set(labels) and "25 mm/s   10 mm/mV   500 Hz" in labels
    width, height = figure.get_size_inches() * 25.4
    limits = figure.axes[0].get_xlim()[1], figure.axes[0].get_ylim()[1]
    assert limits == pytest.approx((width, height))  # 1 mm of paper is 1 mm
    strip = lines[-1]
    assert np.ptp(strip[:, 0]) == pytest.approx(250, abs=0.1) and np.ptp(strip[:, 1]) == pytest.approx(1.0)
    assert all(np.ptp(line[:, 0]) == pytest.approx(62.5, abs=0.1) for line in lines[:-1])
    first, augmented = lines[0], lines[1]  # I and aVR share a row: 0 mV and 0.3 mV
    assert augmented[0, 1] - first[0, 1] == pytest.approx(3.0)
    figure.savefig("/dev/null", format="png")


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[12, L\]"):
        draw_ecg(np.zeros((8, 5000)))
    with pytest.raises(ValueError, match="rhythm lead"):
        draw_ecg(np.zeros((12, 5000)), rhythm="V9")


def test_a_pair_shows_the_report(synthetic):
    figure = draw_pair(synthetic, 3)
    report = synthetic.reports[int(synthetic.column("report")[3])]
    assert report[:100] in figure.axes[0].texts[-1].get_text()


def test_pairs_and_frequent_reports_are_saved(synthetic, tmp_path):
    save_pairs({"synthetic": synthetic}, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pair-synthetic-0.png", f"pair-synthetic-{len(synthetic) - 1}.png", "reports-synthetic.png",
    ]  # fmt: skip
    axis = draw_reports(synthetic, most=5).axes[0]
    counts = np.bincount(synthetic.column("report"))
    assert [bar.get_width() for bar in axis.patches] == sorted(counts, reverse=True)[:5]
    assert axis.get_yticklabels()[0].get_text()[:80] == synthetic.reports[counts.argmax()][:80]


def test_area_under_the_drawn_curve_is_the_auc():
    generator = np.random.default_rng(0)
    targets = generator.random((200, 3)) < 0.3
    targets[:, 2] = False
    scores = np.round(generator.normal(size=(200, 3)) + targets, 1)  # with ties
    table = macro_auc(scores, targets, ["a", "b", "c"], bootstrap=20)
    axis = draw_roc(scores, targets, table).axes[0]
    curves = axis.lines[1:]
    assert "over 2 of 3 classes" in axis.get_title()
    assert len(curves) == 2  # a class without positives has no curve
    for curve, name in zip(curves, sorted(table.per_class, key=table.per_class.get, reverse=True)):
        assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(table.per_class[name])
        assert curve.get_label().startswith(name)


def test_results_without_value_or_interval_are_drawn():
    base = {"task": "zero-shot", "dataset": "csn", "title": "CSN"}
    figure = draw_results(
        [Result(**base, value=0.7), Result(**base, note="not run"), Result(**base, value=0.8, low=0.7, high=0.9)]
    )
    assert len(figure.axes[0].get_yticks()) == 2
    tuned = base | {"task": "finetune", "value": 0.5}
    twins = [Result(**tuned), Result(**tuned, metric="CinC 2021 score"), *(
        Result(**base, value=0.5, prompts=p) for p in ("descriptions", "names")
    )]  # fmt: skip
    named = [label.get_text() for label in draw_results(twins).axes[0].get_yticklabels()]
    assert len(set(named)) == 4
    draw_results([]).savefig("/dev/null", format="png")
    noted = draw_results([Result(**base, value=0.7, note="untrained network; tiny: meaningless; only 3 test records")])
    assert noted.get_supxlabel() == "tiny: meaningless; untrained network"
    assert warn(figure, "").get_supxlabel() == ""


def test_tsne_shows_categories_with_enough_records_of_their_own():
    generator = np.random.default_rng(0)
    targets = np.zeros((90, 3), bool)
    targets[:40, 0] = targets[40:80, 1] = targets[80:, 2] = True
    targets[0, 1] = True  # two categories: not shown
    figure = draw_tsne(generator.normal(size=(90, 5)).astype(np.float32), targets, "abc", least=30)
    assert [c.get_label() for c in figure.axes[0].collections] == ["a (39)", "b (40)"]
    with pytest.raises(ValueError, match="no category"):
        draw_tsne(np.zeros((90, 5), np.float32), targets, "abc")
