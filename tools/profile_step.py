"""Where a training step's time goes: its costliest kernels and how many are launched.

    python tools/profile_step.py                                              on the GPU, or the CPU where there is none
    python tools/profile_step.py --workload uniform40 --provider "fused + compile" --out profile.json --trace trace.json

On a GPU the rows are kernels, timed on the device, and launches are the host's calls that start one or a whole graph;
on a CPU the rows are operators, timed without what they call, and launches are their calls.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

STEPS = 3


def profile(
    *, device: str, workload: str, provider: str, batch: int, preset: str = "paper", overrides: tuple[str, ...] = (),
    top: int = 10, trace: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Profile a few steps after warm-up.

    Returns:
        ``step_ms`` (with the profiler's own cost), ``launches`` per step, and ``rows`` of the costliest kernels with
        ``name``, ``ms`` and ``calls`` per step and ``share`` of all kernels' time.
    """
    from torch.profiler import ProfilerActivity

    from dbeta.config import Config
    from dbeta_bench.step import Bench

    where = torch.device(device)
    config = Config.load(preset, [f"train.batch={batch}", f"runtime.device={device}", *overrides])
    bench = Bench(provider, workload, config, where)
    bench.steps(STEPS)
    bench.done = 0  # the same shapes again
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (where.type == "cuda")
    with torch.profiler.profile(activities=activities) as found:
        seconds = bench.steps(STEPS)["step_s"]
    if trace:
        found.export_chrome_trace(str(trace))
    gpu = where.type == "cuda"
    # Regions that somebody named, as the optimiser's step, lie on the device's time line too, over their kernels.
    events = [e for e in found.key_averages() if not e.is_user_annotation]
    kernels = [e for e in events if (e.device_type == torch.autograd.DeviceType.CUDA) == gpu]
    time = (lambda e: e.self_device_time_total) if gpu else (lambda e: e.self_cpu_time_total)
    whole = sum(map(time, kernels)) or 1
    launched = [e.count for e in events if "Launch" in e.key] if gpu else [e.count for e in kernels]
    rows = [
        {"name": e.key, "ms": time(e) / STEPS / 1e3, "calls": e.count / STEPS, "share": time(e) / whole}
        for e in sorted(kernels, key=time, reverse=True)[:top]
    ]
    return {
        "device": device, "workload": workload, "provider": provider, "batch": batch, "step_ms": seconds * 1e3,
        "kernels_ms": whole / STEPS / 1e3, "launches": sum(launched) / STEPS, "rows": rows,
    }  # fmt: skip


def main() -> None:
    """Print the table and write it where asked."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--workload", default="uniform40", help="uniformN or real")
    parser.add_argument("--provider", default="fused", help="a provider of dbeta-bench step")
    parser.add_argument("--batch", type=int, default=128 if gpu else 8)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for dbeta-pretrain")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--trace", type=Path, help="Chrome trace")
    given = vars(parser.parse_args())
    out, overrides = given.pop("out"), tuple(given.pop("set"))
    try:
        result = profile(**given, overrides=overrides)
    except (ValueError, KeyError) as error:
        parser.error(str(error))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(f"{row['ms']:9.3f} ms  {row['share']:6.1%}  {row['calls']:7.1f} calls  {row['name'][:90]}")
    print(
        f"{result['kernels_ms']:9.3f} ms in kernels of a step of {result['step_ms']:.3f} ms; "
        f"{result['launches']:.0f} launches per step"
    )


if __name__ == "__main__":
    main()
