"""How long a call takes: providers take turns, inputs rotate past the cache, medians with 20 and 80 % quantiles."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

GRAPH_BELOW_S = 2e-3  # launching such a call from Python may take longer than its work: it is timed as a CUDA graph
GRAPH_CALLS, GRAPH_S = 64, 10e-3  # at most so many calls in a graph, and about so long


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, device: torch.device, repeats: int = 20, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Time providers turn by turn, so that a slow minute hits all alike; the first of a turn changes every turn.

    Args:
        calls: name -> a call without arguments.
        device: where the work runs; on CUDA the time is the device's, on a CPU the clock's.
        repeats: turns.

    Returns:
        name -> ``median``, ``low`` and ``high`` (20 and 80 % quantiles) in seconds; ``timed``: clock, events or graph.
    """
    clocks = {name: _clock(call, device, warmup) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(clocks[name][1]())
    return {name: _quantiles(taken) | {"timed": clocks[name][0]} for name, taken in seconds.items()}


def rotation(make: Callable[[int], dict[str, Any]], device: torch.device) -> Callable[[], dict[str, Any]]:
    """A source of inputs ``make(seed)`` that goes round in twice the GPU's L2 cache; on a CPU one set serves."""
    first = make(0)
    count = 1
    if device.type == "cuda":
        size = sum(v.nbytes for v in first.values() if isinstance(v, torch.Tensor)) or 1
        count = min(GRAPH_CALLS, 1 + math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / size))
    sets = itertools.cycle([first, *(make(seed) for seed in range(1, count))])
    return lambda: next(sets)


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return dict.fromkeys(("median", "low", "high"), seconds[0])
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "low": fifths[0], "high": fifths[-1]}


def _clock(call: Callable[[], Any], device: torch.device, warmup: int) -> tuple[str, Callable[[], float]]:
    """How the call is timed, and a function that makes it and returns seconds."""
    if device.type != "cuda":
        for _ in range(warmup):
            call()
        return "clock", lambda: _host_seconds(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as CUDA graphs want their warm-up
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    taken = min(_device_seconds(call) for _ in range(3))
    if taken > GRAPH_BELOW_S:
        return "events", lambda: _device_seconds(call)
    calls = min(GRAPH_CALLS, math.ceil(GRAPH_S / taken))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
    except RuntimeError:  # it waits for the device
        return "events", lambda: _device_seconds(call)
    return "graph", lambda: _device_seconds(graph.replay) / calls


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
