"""torch.compile of training: the whole step as one graph, or each layer by itself; what compiling cost.

``runtime.compile_scope`` chooses. ``step``: one graph, without a break, replayed as a CUDA graph on a GPU. ``layers``:
layers of a kind share their code, so it compiles several times faster; the rest of the step stays eager.

The shape of text changes from batch to batch (``BatchMaker.shape``). On a GPU a graph is compiled for the first shape,
and when another one comes, a second for all. Where results have to repeat bit for bit (on a CPU, and with
``runtime.deterministic``) every shape has its own: else rounding would depend on which came first, and a resumed run
begins with another one.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dbeta.config import RuntimeConfig

# Graphs that one function may have; torch ends the run at 8, and at 256 of all. Eleven text buckets with a few totals
# of tokens each, times four uses of a kind of layer, with and without gradients; under FSDP for each layer by itself.
GRAPHS = 8192


def compiled(function: Callable, config: RuntimeConfig, device: torch.device, *, alone: bool = True) -> Callable:
    """``function`` compiled, or as it is where the step is not compiled as a whole.

    Args:
        alone: one process trains; a graph break is then an error, while messages between ranks part the graph.
    """
    if not config.compile or config.compile_scope != "step":
        return function
    _prepare(device)
    graphs = uses_graphs(config, device, alone=alone)
    mode = "reduce-overhead" if graphs else None
    graph = torch.compile(function, fullgraph=alone, dynamic=_dynamic(config, device), mode=mode)
    if not graphs:
        return graph

    def step(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last call are not read any more
        return graph(*args, **kwargs)

    return step


def compile_layers(layers: Iterable[nn.Module], config: RuntimeConfig, device: torch.device) -> None:
    """Compile each of ``layers`` in place, where that is the scope; no message between ranks lies within one.

    To be called before DDP or FSDP wraps them. A graph break is an error.
    """
    if config.compile and config.compile_scope == "layers":
        _prepare(device)
        for layer in layers:
            layer.compile(fullgraph=True, dynamic=_dynamic(config, device))


def uncompiled(config: RuntimeConfig) -> contextlib.AbstractContextManager:
    """Around what is computed rarely: layers run as they are written, and get no graph for it."""
    return torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()


def uses_graphs(config: RuntimeConfig, device: torch.device, *, alone: bool = True) -> bool:
    """Whether the compiled step is replayed as a CUDA graph: the kernels of a step then cost one launch."""
    whole = config.compile and config.compile_scope == "step"
    return whole and config.cuda_graphs and alone and device.type == "cuda"


def _dynamic(config: RuntimeConfig, device: torch.device) -> bool | None:
    """What torch.compile is told of shapes: False, every one has a graph; None, those that change have one for all."""
    return False if config.deterministic or device.type == "cpu" else None


def _prepare(device: torch.device) -> None:
    """Room for every graph; and for C++ a cache that dies with the process, as a kill leaves half a library in it."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    dynamo, shared = torch._dynamo.config, default_cache_dir()
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, GRAPHS)
    if device.type == "cpu" and os.environ.get("TORCHINDUCTOR_CACHE_DIR", shared) == shared:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="dbeta-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def report() -> str:
    """What this process has compiled: graphs, graph breaks and seconds; empty if nothing."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    graphs = counters["stats"]["unique_graphs"]
    if not graphs:
        return ""
    seconds = sum(compilation_time_metrics.get("_compile.compile_inner", ()))
    breaks = sum(counters["graph_break"].values())
    return f"torch.compile: {graphs} graphs, {breaks} graph breaks, {seconds:.0f} s"
