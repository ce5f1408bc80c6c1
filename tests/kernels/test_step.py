"""One whole training step with every operator as its kernel, held to the same step of the references."""

import functools
import importlib

import pytest
import torch

from dbeta.config import LossConfig, RuntimeConfig
from dbeta.losses import pretraining_losses
from dbeta_kernels import mem_loss
from dbeta_kernels.checking import assert_budget
from dbeta_kernels.lead_mask import lead_mask
from dbeta_kernels.registry import OPERATORS
from tests.models.small import SMALL, batch_of, network

TOLERANCE = 2e-3  # float32; a step chains all operators, and budgets add up


def step(kernels: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The losses of raw int16 records and the gradient of every parameter."""
    batch = batch_of(SMALL, lengths=(9, 1, 12))
    batch.signal = (1000 * batch.signal).round().clamp(-32767, 32767).short()
    batch.signal[0, 2, 30:90] = -32768  # invalid samples
    batch.gain, batch.baseline = (torch.full((3, 12), value, dtype=dtype) for value in (1000.0, 25.0))
    batch.ecg, batch.mean, batch.rstd = lead_mask(
        batch.signal, batch.gain, batch.baseline, seed=3, step=7, rows=torch.arange(3), dtype=dtype, backend=kernels
    )
    model = network(SMALL, RuntimeConfig(kernels=kernels, attention="reference")).to(dtype)
    losses = pretraining_losses(model, batch, LossConfig(reconstruct_rows="matched", ets_same_report="ignore"))
    losses.total.backward()
    results = {name: getattr(losses, name).detach() for name in ("mlm", "mem", "etm", "ets", "total")}
    return results | {name: parameter.grad for name, parameter in model.named_parameters()}


@functools.cache
def plain():
    """The step of the references in float32, and the truth."""
    return step("reference", torch.float32), step("reference", torch.float64)


def hold(fused):
    reference, truth = plain()
    for name in truth:
        assert_budget(name, fused[name], reference[name], truth[name], TOLERANCE)


def record(called, operator, function, *args):
    called.add(operator)
    return function(*args)


def test_the_step_through_the_kernels(interpreter, monkeypatch):
    called = set()
    for operator in OPERATORS:
        definition, name = importlib.import_module(f"dbeta_kernels.{operator}"), f"_{operator}"
        recorded = functools.partial(record, called, operator, getattr(definition, name))
        monkeypatch.setattr(definition, name, recorded)
    hold(step("fused", torch.float32))
    assert called == set(OPERATORS)


def test_a_wrong_gradient_shows(interpreter, monkeypatch):
    exact = mem_loss._factor
    monkeypatch.setattr(mem_loss, "_factor", lambda *args: 1.01 * exact(*args))
    with pytest.raises(AssertionError, match="mem_head"):
        hold(step("fused", torch.float32))
