"""torch.compile of the step: one graph for each shape of text, CUDA graphs on a GPU, and what compiling cost.

The compiled step has static shapes, so it is compiled again for every ``TextShape`` of ``BatchMaker.shape``; there are
few of them, but more than torch allows a function by default, which with ``fullgraph`` would end the run.
"""

from collections.abc import Callable

import torch

from dbeta.config import RuntimeConfig

SHAPES = 64  # graphs of one function; 7 text buckets with a few totals of tokens each


def compiled(function: Callable, config: RuntimeConfig, device: torch.device, *, alone: bool = True) -> Callable:
    """``function`` compiled, or as it is where ``runtime.compile`` is off.

    Args:
        alone: one process trains; a graph break is then an error, while messages between ranks part the graph.
    """
    if not config.compile:
        return function
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    graphs = uses_graphs(config, device, alone=alone)
    graph = torch.compile(function, fullgraph=alone, dynamic=False, mode="reduce-overhead" if graphs else None)
    if not graphs:
        return graph

    def step(*args, **kwargs):
        torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last call are not read any more
        return graph(*args, **kwargs)

    return step


def uses_graphs(config: RuntimeConfig, device: torch.device, *, alone: bool = True) -> bool:
    """Whether the compiled step is replayed as a CUDA graph: the kernels of a step then cost one launch."""
    return config.compile and config.cuda_graphs and alone and device.type == "cuda"


def report() -> str:
    """What this process has compiled: graphs, graph breaks and seconds; empty if nothing."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    graphs = counters["stats"]["unique_graphs"]
    if not graphs:
        return ""
    seconds = sum(compilation_time_metrics.get("_compile.compile_inner", ()))
    breaks = sum(counters["graph_break"].values())
    return f"torch.compile: {graphs} graphs (one for each shape of text), {breaks} graph breaks, {seconds:.0f} s"
