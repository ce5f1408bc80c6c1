"""A model trained by ``make pretrain`` beats the same network untrained, by margins outside the intervals (slow)."""

import pytest

from tools import training_pays

pytestmark = pytest.mark.slow
CASES = [("zero-shot", None), *(("linear-probe", share) for share in (0.01, 0.1, 1.0)), ("finetune", None)]


@pytest.mark.timeout(3000)  # it trains the smoke preset
def test_training_pays(tmp_path):
    pairs = training_pays.measure(training_pays.train(tmp_path / "run"), tmp_path, bootstrap=300)
    assert [(trained.task, trained.fraction) for trained, _ in pairs] == CASES
    for trained, untrained in pairs:
        assert "untrained" in untrained.note and "untrained" not in trained.note
        assert trained.low > untrained.high, (trained, untrained)
