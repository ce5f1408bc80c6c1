"""A model trained by ``make pretrain`` beats the same network untrained, by margins outside the intervals (slow)."""

import pytest

from dbeta.evaluation.evaluate import Options, evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from dbeta.config import Config
    from dbeta.pretrain import run

    out = tmp_path_factory.mktemp("run")
    run(Config.load("smoke", ["runtime.device=cpu"]), data=None, out=out, resume=False)
    return out


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Records of another seed: other subjects, none of them seen in training."""
    from dbeta.data.prepare import prepare

    folder = tmp_path_factory.mktemp("fresh") / "synthetic"
    prepare("synthetic", None, folder, limit=2000, workers=2, seed=1)
    return folder


@pytest.mark.parametrize("task", ["zero-shot", "linear-probe", "finetune"])
def test_training_pays(task, trained, fresh, tmp_path):
    tuning = {"epochs": 6, "lr": 1e-3, "leads": ("12",)} if task == "finetune" else {}
    pair = [
        evaluate(task, trained, fresh, tmp_path, Options(derive=True, untrained=untrained, bootstrap=300, **tuning))
        for untrained in (False, True)
    ]
    ours, baseline = ({r.fraction: r for r in found if task != "linear-probe" or r.seed is None} for found in pair)
    assert set(ours) == ({0.01, 0.1, 1.0} if task == "linear-probe" else {None})
    for case, result in ours.items():
        assert result.low > baseline[case].high, (task, case, result, baseline[case])
