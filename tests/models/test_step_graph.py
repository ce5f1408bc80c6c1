"""The forward pass, its losses and their gradients as a graph: no host synchronisation, no graph break."""

import contextlib
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dbeta import compilation
from dbeta.config import Config, LossConfig, RuntimeConfig
from dbeta.distributed import ALONE
from dbeta.losses import Objective, pretraining_losses
from dbeta.models.layers import LayerNorm, PostNormLayer, PreNormBlock
from dbeta.models.text_encoder import Block, RmsNorm
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
@pytest.mark.parametrize(("scope", "accumulate"), [("step", 1), ("step", 2), ("layers", 1)])
def test_what_is_compiled_trains_the_same(scope, accumulate):
    """Float32 without dropout: the weights after some steps, shapes of text changing, are those of the eager step."""
    results = []
    for engine in ("compile=false", "compile=true"):
        settings = ("device=cuda", "precision=fp32", "kernels=reference", engine, f"compile_scope={scope}")
        settings = [*TINY, *(f"runtime.{setting}" for setting in settings)]
        config = Config.load("smoke", [*settings, f"train.accumulate={accumulate}"])
        bench = Bench("removals", "real", config, torch.device("cuda"))
        bench.stepper = type(bench.stepper)(bench.stepper.model, config, bench.device)
        for step in range(6):  # two shapes by turns: with CUDA graphs each is warmed up, recorded, replayed
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


@pytest.mark.parametrize("removals", [True, False])
def test_under_autocast_layers_hand_on_bf16(removals):
    """T5's and the decoder's residual streams add up over layers; only T5's is float32 throughout."""
    model, batch = network(SMALL, RuntimeConfig(removals=removals)).float(), batch_of(SMALL, text_tokens=TOKENS + 8)
    batch.ecg, batch.signal = batch.ecg.float(), batch.signal.float()
    handed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | RmsNorm | PostNormLayer | PreNormBlock | Block):
            module.register_forward_hook(lambda *a, name=name: handed.__setitem__(name, a[2].dtype))
        if isinstance(module, PostNormLayer):
            module.register_forward_hook(lambda *a, name=name: handed.__setitem__(f"{name}, given", a[1][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        pretraining_losses(model, batch, LossConfig())
    wide = {name for name, dtype in handed.items() if dtype != torch.bfloat16}
    assert len(handed) > 30 and wide == {f"text_encoder.block.{i}" for i in range(SMALL.text_layers)}


def test_a_norm_under_autocast_is_float32_rounded_once():
    norm, x = LayerNorm(64), 10 + torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), nn.functional.layer_norm(x, (64,)).bfloat16())
    assert norm(x).dtype == torch.float32 and norm.double()(x.double()).dtype == torch.float64


SHAPES = {"cpu": (17, 30, 30, 9), "cuda": (17, 30, 24, 9)}  # longest text of each batch; on a CPU one comes twice


@pytest.mark.parametrize("scope", ["step", "layers"])
@pytest.mark.parametrize("device", SHAPES)
def test_graphs_of_changing_shapes(device, scope, monkeypatch):
    """Bit-for-bit devices compile every shape, a GPU a second graph for all; values are the eager step's."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    runtime = RuntimeConfig(compile=True, compile_scope=scope, cuda_graphs=False)
    model = network(SMALL, runtime)
    objective = Objective(model, LossConfig(), ALONE, runtime, torch.device(device))
    graphs, counted = [], torch._dynamo.utils.counters["stats"]
    for longest in SHAPES[device]:
        batch, results = batch_of(SMALL, (longest, 5, 8, 3), text_tokens=longest + 20), []
        for context in (compilation.uncompiled(runtime), contextlib.nullcontext()):
            model.zero_grad()
            before = counted["unique_graphs"]
            with context:
                losses = objective(batch)
            assert results or counted["unique_graphs"] == before, "something was compiled where nothing should be"
            losses.total.backward()
            results.append([losses.total, *(p.grad.clone() for p in model.parameters())])
        for eager, compiled in zip(*results):
            torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-10)
        graphs.append(counted["unique_graphs"])
    first, second, third, fourth = graphs
    assert first == {"step": 1, "layers": 8}[scope]  # of 12 layers, those that are called alike share one
    assert first < second == third, "a shape that has a graph was compiled again"
    assert (fourth > third) == (device == "cpu")


def test_which_layers_are_compiled():
    """All of them, whole, where that is the scope; and shapes stay static where results repeat bit for bit."""
    kinds, cuda = PostNormLayer | PreNormBlock | Block, torch.device("cuda")
    for config, expected in (
        (RuntimeConfig(compile=True, compile_scope="layers"), {"fullgraph": True, "dynamic": None}),
        (
            RuntimeConfig(compile=True, compile_scope="layers", deterministic=True),
            {"fullgraph": True, "dynamic": False},
        ),
        (RuntimeConfig(compile=True), None),
        (RuntimeConfig(compile_scope="layers"), None),
    ):
        model, seen = network(SMALL, RuntimeConfig()), {}
        with mock.patch.object(nn.Module, "compile", lambda layer, seen=seen, **how: seen.update({layer: how})):
            Objective(model, LossConfig(), ALONE, config, cuda)
        layers = {module for module in model.modules() if isinstance(module, kinds)} if expected else set()
        assert set(seen) == layers and all(how == expected for how in seen.values())


def test_many_shapes_of_layers_on_a_cpu(monkeypatch):
    """Four uses of one kind of layer, each with a graph for every shape: more than torch's limits, here lowered."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    runtime = RuntimeConfig(compile=True, compile_scope="layers")
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=16):
        objective = Objective(network(SMALL, runtime), LossConfig(), ALONE, runtime, CPU)
        with torch.no_grad():
            for longest in range(9, 12):
                objective(batch_of(SMALL, (longest, 5, 8, 3), text_tokens=longest + 20))
