"""The forward pass, its losses and their gradients as a graph: no host synchronisation, no graph break."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbeta.config import Config, LossConfig, RuntimeConfig
from dbeta.losses import pretraining_losses
from dbeta_bench.step import Bench
from tests.models.small import SMALL, TOKENS, batch_of, network

# Each makes the host wait for the device: a value read back, or a size that depends on values.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "repeat_interleave", "bincount", "isin", "cpu", "tolist", "numpy",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __enter__(self):
        """On CPU tensors these three dispatch nothing: they are watched by name."""
        self.patches = contextlib.ExitStack()
        for name in ("cpu", "tolist", "numpy"):
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, self._seeing(name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def _seeing(self, name):
        method = getattr(torch.Tensor, name)
        return lambda *args, **kwargs: self.seen.add(name) or method(*args, **kwargs)

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


CPU = torch.device("cpu")
TINY = ("train.batch=4", "model.samples=640", "model.text_vocab=600")


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_whole_step_never_waits(kernels):
    """The batch from its tables, both passes, clipping, the optimiser and the counters."""
    bench = Bench("removals", "real", Config.load("smoke", [*TINY, "optim.clip=1"]), CPU)
    bench.maker.kernels = kernels
    shape = bench.host.shape(bench.rows, 0, bench.rows, bucketed=True)
    bench.host.shape = lambda *_, **__: shape  # the host's own draw, which may look at its values
    for _ in range(2):
        with Recorder() as recorder:
            bench.stepper.step([bench.batch()])
        assert {"sort", "index_select", "addmm", "_fused_adamw_"} <= recorder.seen
        assert not recorder.seen & WAITING


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["removals", "fused"])
def test_a_whole_step_never_waits_for_the_gpu(provider):
    bench = Bench(provider, "real", Config.load("smoke", [*TINY, "runtime.device=cuda"]), torch.device("cuda"))
    bench.steps(2)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            bench.stepper.step([bench.batch()])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_train_the_same(accumulate):
    """Float32 without dropout: the weights after some steps, shapes of text changing, are those of the eager step."""
    results = []
    for engine in ("compile=false", "compile=true"):
        settings = ("device=cuda", "precision=fp32", "kernels=reference", engine)
        settings = [*TINY, *(f"runtime.{setting}" for setting in settings)]
        config = Config.load("smoke", [*settings, f"train.accumulate={accumulate}"])
        bench = Bench("removals", "real", config, torch.device("cuda"))
        bench.stepper = type(bench.stepper)(bench.stepper.model, config, bench.device)
        for step in range(6):  # two shapes by turns: each is warmed up, recorded and, in the third round, replayed
            bench.done = step % 2
            bench.stepper.step([bench.batch() for _ in range(accumulate)])
        results.append([p.detach().clone() for p in bench.stepper.parameters])
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4)


def test_recorder_sees_waiting():
    x = torch.randn(4)
    reads = (
        lambda: x[0].item(), lambda: x[x > 0], lambda: bool(x.sum() > 0), lambda: x.unique(), lambda: x.cpu(),
        lambda: x.tolist(), lambda: x.numpy(), lambda: x.repeat_interleave(torch.ones(4, dtype=torch.long)),
        lambda: torch.isin(x, x),
    )  # fmt: skip
    for read in reads:
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
