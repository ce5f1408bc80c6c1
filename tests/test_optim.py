"""The schedule and the optimiser against the recorded trajectories of MODEL section 13."""

import json

import numpy as np
import pytest
import torch

from dbeta.config import OptimConfig
from dbeta.optim import learning_rate, make_optimizer, set_learning_rate


@pytest.mark.parametrize(("table", "final"), [("default_init0.01_final0.01", 0.01), ("m3ae_init0.01_final0.05", 0.05)])
def test_tri_stage(shared, table, final):
    recorded = json.loads((shared / "parity" / "tri_stage.json").read_text())
    config = OptimConfig(final_scale=final)
    for row in recorded["tables"][table]:
        assert learning_rate(row["n"], recorded["max_update"], config) == pytest.approx(row["lr"], rel=1e-12)


def test_schedule_without_stages():
    config = OptimConfig(warmup=0.0, hold=0.0, decay=0.0, final_scale=0.5)
    assert learning_rate(0, 10, config) == config.lr * 0.5


def test_adamw(shared):
    cases = np.load(shared / "parity" / "adam_cases.npz")
    parameter = torch.nn.Parameter(torch.from_numpy(cases["p0"].copy()))
    optimizer = make_optimizer([parameter], OptimConfig())
    for gradient, expected in zip(cases["grads"], cases["torch_AdamW"]):
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-14)


def test_found_inf_leaves_weights_and_moments_alone():
    """The guard of a non-finite step works on the device: the fused kernel skips the update and its count."""
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = make_optimizer([parameter], OptimConfig(lr=0.1))
    parameter.grad = torch.ones(5)
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items()} | {"p": parameter.detach().clone()}
    parameter.grad = torch.full((5,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = optimizer.state[parameter] | {"p": parameter.detach()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    parameter.grad, optimizer.found_inf = torch.ones(5), torch.zeros(())
    optimizer.step()
    assert not torch.equal(before["p"], parameter)


def test_rate_changes_in_place():
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(2))], OptimConfig())
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"] = tensor = torch.tensor(0.1)
    set_learning_rate(optimizer, 0.25)
    assert tensor.item() == 0.25
