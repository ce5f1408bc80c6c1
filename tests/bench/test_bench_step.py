"""The benchmark of the step runs for every provider, and counts what is computed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dbeta_bench import step

TINY = {"preset": "smoke", "batch": 4, "alternations": 1, "overrides": ("model.samples=640", "model.text_vocab=600")}


def test_rows_and_flops():
    said = []
    providers = ("reference", "removals", "fused")
    rows = step.run(workloads=("uniform9",), providers=providers, say=said.append, **TINY)
    assert [row["provider"] for row in rows] == list(providers) and len(said) == 3
    reference, removals, fused = rows
    assert reference["executed_flops"] == reference["dense_flops"] == removals["dense_flops"] > 1e8
    assert 0.3 < removals["executed_flops"] / reference["dense_flops"] < 1
    assert fused["executed_flops"] == pytest.approx(removals["executed_flops"], rel=0.3)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["step_s"] / reference["step_s"])
        assert row["steps_per_s"] * 4 == pytest.approx(row["records_per_s"]) and 0 < row["mfu"] < 1
        assert min(row[f"{phase}_s"] for phase in ("data", "forward", "backward", "optimizer")) > 0


@pytest.mark.parametrize("groups", [1, 4])
def test_a_grouped_convolution_is_counted_once(groups):
    x, weight = torch.randn(2, 8, 10, requires_grad=True), torch.randn(8, 8 // groups, 3, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=step.FORMULAS) as counter:
        torch.nn.functional.conv1d(x, weight, padding=1, groups=groups).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 8 * 10) * (8 // groups * 3)


def test_mistakes():
    with pytest.raises(ValueError, match="accepted: reference, compiled reference"):
        step.run(providers=("fastest",), **TINY)
    with pytest.raises(ValueError, match="uniform128"):
        step.run(workloads=("uniform",), **TINY)
