"""The forward pass, its losses and their gradients as a graph: no host synchronisation, no graph break."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbeta.config import LossConfig, RuntimeConfig
from dbeta.losses import pretraining_losses
from tests.models.small import SMALL, TOKENS, batch_of, network

# Each makes the host wait for the device: a value read back, or a size that depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "equal", "item", "is_nonzero"}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        if function.overloadpacket.__name__ == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.seen.add("nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("text_tokens", [None, TOKENS + 8])
def test_no_host_synchronisation(text_tokens):
    model, batch = network(SMALL, RuntimeConfig()), batch_of(SMALL, text_tokens=text_tokens)
    with Recorder() as recorder:
        pretraining_losses(model, batch, LossConfig()).total.backward()
    assert {"index_select", "addmm"} <= recorder.seen
    assert not recorder.seen & WAITING


def test_recorder_sees_waiting():
    x = torch.randn(4)
    for read in (lambda: x[0].item(), lambda: x[x > 0], lambda: bool(x.sum() > 0)):
        with Recorder() as recorder:
            read()
        assert recorder.seen & WAITING


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph(backend):
    """fullgraph=True raises at a graph break; losses and gradients are those of the eager step."""
    results = []
    compiled = torch.compile(pretraining_losses, fullgraph=True, backend=backend)
    config = dataclasses.replace(SMALL, ecg_layers=1, text_layers=1, fusion_layers=2, mem_layers=1)
    for step in (pretraining_losses, compiled):
        torch._dynamo.reset()
        model, batch = network(config, RuntimeConfig()), batch_of(config, text_tokens=TOKENS + 8)
        losses = step(model, batch, LossConfig())
        losses.total.backward()
        results.append([losses.total, *(p.grad for p in model.parameters())])
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager, rtol=0, atol=1e-10)
