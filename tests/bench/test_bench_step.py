"""The benchmark of the step runs for every provider, and counts what is computed."""

import contextlib

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from dbeta import losses
from dbeta_bench import step
from dbeta_bench.cli import main

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


EXACT = losses.mem_loss
WRONG = {"total": lambda loss: 1.001 * loss, "gradient": lambda loss: loss + 0.001 * (loss - loss.detach())}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_provider_gets_no_time(monkeypatch, what):
    """One operator is wrong where ``fused`` calls it, and nowhere else."""

    def broken(*given, backend, **options):
        loss = EXACT(*given, backend=backend, **options)
        return WRONG[what](loss) if backend == "auto" else loss

    monkeypatch.setattr(losses, "mem_loss", broken)
    monkeypatch.setattr(step, "_checked", set())
    monkeypatch.setattr(step.Bench, "steps", lambda *_: pytest.fail("a wrong provider was timed"))
    with pytest.raises(ArithmeticError, match=rf"fused: .*{what}.* more than .* in float32; no time is given"):
        step.run(workloads=("uniform9",), providers=("reference", "fused"), **TINY)


def test_rounding_in_bf16_is_not_wrong(monkeypatch):
    """And what was checked is not checked again."""
    monkeypatch.setattr(step, "_checked", set())
    config = step.Config.load("smoke", [*TINY["overrides"], "runtime.precision=bf16"])
    step.check(("fused",), config, torch.device("cpu"))
    monkeypatch.setattr(step.Bench, "computed", lambda *_: pytest.fail("checked again"))
    step.check(("reference", "fused"), config, torch.device("cpu"))


def test_what_is_compiled_is_checked_on_few_layers(monkeypatch):
    seen = []

    def made(self, provider, _, config, __):
        model = config.model
        seen.append((provider, model.ecg_layers, model.text_layers, model.fusion_layers, model.mem_layers))

    monkeypatch.setattr(step, "_checked", set())
    monkeypatch.setattr(step.Bench, "__init__", made)
    monkeypatch.setattr(
        step.Bench, "computed", lambda _: (torch.float32, dict.fromkeys((*step.LOSSES, "weight"), torch.ones(2)))
    )
    config = step.Config.load("paper", ["runtime.device=cpu"])
    step.check(("removals", "fused + compile", "compiled reference"), config, torch.device("cpu"))
    few = (2, 2, 4, 2)  # the MEM decoder reads what the fourth fusion layer is given
    assert seen[:2] == [("reference", 8, 12, 6, 4), ("removals", 8, 12, 6, 4)]
    assert seen[2:] == [("reference", *few), ("fused + compile", *few), ("compiled reference", *few)]


@pytest.mark.parametrize(
    ("dtype", "name", "factor", "wrong"),
    [
        (torch.bfloat16, "small", 1.7, ""), (torch.bfloat16, "small", 0, "gradient of small"),
        (torch.bfloat16, "small", -1, "gradient of small"), (torch.bfloat16, "small", torch.nan, "whole gradient"),
        (torch.bfloat16, "large", 1.05, ""), (torch.bfloat16, "large", 1.2, "whole gradient"),
        (torch.bfloat16, "total", 1.02, ""), (torch.bfloat16, "total", 0.9, "total"),
        (torch.float32, "small", 1 + 5e-5, ""), (torch.float32, "small", 1 + 2e-4, "gradient of small"),
        (torch.float32, "large", 1 + 5e-5, "whole gradient"), (torch.float32, "total", 1 + 2e-5, "total"),
    ],
)  # fmt: skip
def test_the_bands(monkeypatch, dtype, name, factor, wrong):
    """In both dtypes, for what weighs much and what weighs little; a gradient that is zero in both is right."""
    exact = dict.fromkeys(step.LOSSES, torch.ones(())) | {"unused": torch.zeros(3)}
    exact |= {"large": torch.tensor([3000.0, 4000.0]), "small": torch.tensor([3.0, 4.0])}
    values = iter([exact, exact | {name: factor * exact[name]}])
    monkeypatch.setattr(step, "_checked", set())
    monkeypatch.setattr(step.Bench, "computed", lambda _: (dtype, next(values)))
    config = step.Config.load("smoke", TINY["overrides"])
    expected = pytest.raises(ArithmeticError, match=f"fused: {wrong} is off by") if wrong else contextlib.nullcontext()
    with expected:
        step.check(("fused",), config, torch.device("cpu"))


def test_a_failed_check_is_an_error_of_the_command(monkeypatch):
    def wrong(*_):
        raise ArithmeticError("fused: total is off; no time is given")

    monkeypatch.setattr(step, "check", wrong)
    outcome = CliRunner().invoke(main, ["step", "--device", "cpu", "--provider", "fused"])
    assert outcome.exit_code == 1 and "Error: step: fused: total is off; no time is given" in outcome.output


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
