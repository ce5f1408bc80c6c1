"""First contact with a GPU: all that needs one, in one command of under ten minutes.

    python tools/gpu_session.py --out OUT            environment, ceilings, tests, every benchmark, training, waiting
    python tools/gpu_session.py --out OUT --only step training --limit 580
    python tools/gpu_session.py --out OUT --rehearse    the same on a CPU at toy sizes, to see that it runs

Needs torch, triton, transformers, numpy, pytest and what dbeta itself imports (click, rich, pyarrow, scipy,
scikit-learn, tensorboard, matplotlib); nothing is installed or fetched, and DALI, FAISS and flash-attn are used where
they are there. Every part is a process of its own with its own time limit, to which comes what earlier parts left; it
writes what it has as it goes, so neither a crash nor a limit loses what was measured. ``OUT/session.json`` holds all
parts, ``OUT/NAME.log`` what each printed; the last lines printed are a short table.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]
Rows = Iterator[dict[str, Any]]

TRAINED_STEPS = 200
BAND = 0.03  # of the fp32 loss, for the means over quarters of the run
GPU_TESTS = "gpu and not slow"
WINDING_UP = 25  # seconds that pytest may take to end

# Of the step: what the bars are about comes first, so that a limit cuts off the rest, and what compiles in seconds
# (layers) before what takes minutes (a step at once, twice where shapes of text change).
STEPS = (
    ("uniform40", "fused"), ("uniform40", "fused + compiled layers"), ("real", "fused + compiled layers"),
    ("real", "reference"), ("uniform40", "fused + compile"), ("real", "compiled reference"), ("real", "fused"),
    ("uniform40", "reference"), ("uniform40", "removals"), ("real", "fused + compile"),
    ("uniform64", "fused + compiled layers"), ("uniform128", "fused + compiled layers"),
)  # fmt: skip
TINY = ("model.samples=640", "model.text_vocab=600")  # of a rehearsal, with the preset smoke


# --- the parts: each yields rows, which are kept as they come --------------------------------------------------------


def environment(rehearse: bool) -> Rows:
    """What machine this is."""
    from dbeta.runtime import environment

    yield environment() | {"python_packages": {n: _has(n) for n in ("nvidia.dali", "faiss", "flash_attn", "wfdb")}}
    with contextlib.suppress(OSError):
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        yield {"nvidia_smi": subprocess.run(command, capture_output=True, text=True).stdout.strip()}


def ceilings(rehearse: bool) -> Rows:
    """Copy bandwidth and bf16 products: 8192 cubed, and the shapes of the network at d = 768."""
    import torch

    from dbeta_bench.timing import interleave

    device = torch.device("cpu" if rehearse else "cuda")
    source = torch.randn((1 << 20 if rehearse else 1 << 30) // 4, device=device)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, device=device, repeats=10)["copy"]["median"]
    yield {"what": "copy, read + written", "gb_per_s": 2 * source.nbytes / seconds / 1e9}
    tokens = 128 * (79 + 40)
    shapes = {"8192 cubed": (8192, 8192, 8192), "d to d": (tokens, 768, 768), "d to 3d": (tokens, 768, 2304),
              "d to ffn": (tokens, 768, 3072), "ffn to d": (tokens, 3072, 768), "d_weight of ffn": (768, tokens, 3072),
              "vocabulary": (1536, 768, 32128)}  # fmt: skip
    for what, shape in shapes.items():
        m, k, n = (min(size, 256) for size in shape) if rehearse else shape
        a, b = (torch.randn(s, device=device).bfloat16() for s in ((m, k), (k, n)))
        seconds = interleave({"mm": lambda a=a, b=b: torch.mm(a, b)}, device=device, repeats=10)["mm"]["median"]
        yield {"what": f"bf16 {what}", "m": m, "k": k, "n": n, "tflops": 2e-12 * m * k * n / seconds}


def tests(rehearse: bool) -> Rows:
    """pytest of what is marked gpu; a rehearsal runs one interpreted kernel's cases."""
    report = Path(os.environ["DBETA_SESSION_OUT"], "tests.xml")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "--continue-on-collection-errors"]
    # "not slow" once more: this -m takes the place of pyproject.toml's
    command += ["tests/kernels/test_budget.py", "-k", "ets_loss-matched"] if rehearse else ["-m", GPU_TESTS, "tests"]
    if not rehearse and _has("xdist"):
        command += ["-n", "6"]  # most of the time goes into compiling on the host
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=_interruptible)
    try:
        process.wait(float(os.environ["DBETA_SESSION_SECONDS"]) - WINDING_UP)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then reports what it has; its workers may take longer to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WINDING_UP - 5)
        process.kill()
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    wrong = [c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
    yield counts | {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}
    for case in wrong:
        message = next(c.get("message", "") for tag in ("failure", "error") for c in case.iter(tag))
        yield {"failed": f"{case.get('classname')}::{case.get('name')}", "message": message[:400]}


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell has started in the background ignores it


def kernels(rehearse: bool) -> Rows:
    """dbeta-bench kernels, operator by operator: one that fails its check is named and does not end the rest."""
    from dbeta_bench import kernels
    from dbeta_kernels.registry import OPERATORS

    for name in ("mem_loss",) if rehearse else OPERATORS:
        options = {"device": "cpu", "repeats": 1} if rehearse else {"device": "cuda"}
        yield from _guarded(lambda n=name, o=options: kernels.run(operators=(n,), **o), operator=name)


def attention(rehearse: bool) -> Rows:
    """dbeta-bench attention."""
    from dbeta_bench import attention

    options = {"device": "cpu", "batch": 1, "repeats": 1} if rehearse else {"device": "cuda"}
    yield from _guarded(lambda: attention.run(**options))


def step(rehearse: bool) -> Rows:
    """dbeta-bench step at batch 128, in the order of STEPS, and the profile of the first."""
    from dbeta_bench import step
    from tools.profile_step import profile

    pairs = (("uniform9", "reference"), ("uniform9", "fused")) if rehearse else STEPS
    tiny = {"preset": "smoke", "batch": 4, "overrides": TINY}
    options = tiny | {"device": "cpu", "alternations": 1} if rehearse else {"device": "cuda"}
    profiled = tiny | {"device": "cpu"} if rehearse else {"device": "cuda", "batch": 128}
    for workload, provider in pairs:
        run = lambda w=workload, p=provider: step.run(workloads=(w,), providers=(p,), **options)  # noqa: E731
        yield from _guarded(run, workload=workload, provider=provider)
        if (workload, provider) == pairs[0]:
            run = lambda w=workload: [profile(workload=w, provider="fused", **profiled)]  # noqa: E731
            yield from _guarded(run, profile="failed")


def negatives(rehearse: bool) -> Rows:
    """The table of 180,000 x 512 by the torch engine, and by FAISS where it has a GPU build."""
    import torch

    from dbeta.data import farthest
    from dbeta.data.embedding import unit
    from dbeta.data.negatives import build_negatives

    rows, width, device = (600, 16, "cpu") if rehearse else (180_000, 512, "cuda")
    vectors = unit(torch.randn(rows, width, generator=torch.Generator().manual_seed(0))).to(device)
    for engine in ("torch", "faiss"):
        if engine == "faiss" and (lacking := farthest._faiss_lacks(not rehearse)):
            yield {"engine": engine, "absent": lacking}
            continue

        def build(engine=engine):
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                build_negatives(vectors, 64, engine=engine)
                taken.append(time.perf_counter() - start)
            return [{"engine": engine, "reports": rows, "width": width, "seconds": min(taken), "first_s": taken[0]}]

        yield from _guarded(build, engine=engine)


def loader(rehearse: bool) -> Rows:
    """dbeta-bench loader where DALI is here; only that has a path on the GPU."""
    if not _has("nvidia.dali") or not _has("wfdb"):
        yield {"absent": "DALI or wfdb is not here; carry their wheels"}
        return
    from dbeta_bench import loader

    small = {"records": 64, "turns": 1, "seconds": 0.02, "threads": (1,), "rates": (250,), "engines": ("reference",)}
    yield from _guarded(lambda: loader.run(**(small if rehearse else {"device": "cuda"})))


def training(rehearse: bool) -> Rows:
    """The smoke preset on the synthetic corpus: bf16, compiled and fused beside float32 and the references."""
    from dbeta.config import Config
    from dbeta.data.prepare import prepare
    from dbeta.pretrain import run

    out = Path(os.environ["DBETA_SESSION_OUT"])
    steps, records = (6, 120) if rehearse else (TRAINED_STEPS, 1000)
    if not (out / "corpus" / "corpus.json").is_file():
        prepare("synthetic", None, out / "corpus", limit=records, workers=min(8, os.cpu_count() or 1))
    common = [f"train.{name}={steps}" for name in ("steps", "eval_every", "checkpoint_every")]
    common += ["train.log_every=2", "train.eval_records=32", f"runtime.device={'cpu' if rehearse else 'cuda'}"]
    ways = {
        "fp32 reference": ("precision=fp32", "kernels=reference", "attention=reference", "removals=false"),
        "bf16 compiled": ("precision=bf16", f"compile={str(not rehearse).lower()}"),
    }
    curves = {}
    for way, settings in ways.items():
        folder = out / "runs" / f"{way.replace(' ', '-')}-{time.time():.0f}"
        config = Config.load("smoke", [*common, *(f"runtime.{setting}" for setting in settings)])
        start = time.perf_counter()
        run(config, data=out / "corpus", out=folder, resume=False)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
        curves[way] = [line["total"] for line in lines]
        yield {
            "way": way, "steps": steps, "seconds": time.perf_counter() - start, "total": curves[way],
            "records_per_s": lines[-1]["records_per_s"], "skipped": lines[-1]["skipped"],
        }  # fmt: skip
    exact, fast = curves.values()
    quarter = max(len(exact) // 4, 1)
    means = [
        [sum(c[i : i + quarter]) / len(c[i : i + quarter]) for i in range(0, len(c), quarter)] for c in (exact, fast)
    ]
    apart = max(abs(b - a) / a for a, b in zip(*means))
    yield {"largest_relative_distance": apart, "band": BAND, "within": apart <= BAND}


def waiting(rehearse: bool) -> Rows:
    """Whole steps, batches included, during which the host may not wait for the device: an error names the call."""
    import torch

    from dbeta.config import Config
    from dbeta_bench.step import Bench

    device, batch = ("cpu", 4) if rehearse else ("cuda", 32)
    config = Config.load("smoke", [f"train.batch={batch}", f"runtime.device={device}", *TINY])
    for provider in ("removals", "fused"):
        bench = Bench(provider, "uniform40", config, torch.device(device))
        bench.steps(2)

        def run(bench=bench, provider=provider):
            for _ in range(3):
                if not rehearse:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    bench.stepper.step([bench.batch()])
                finally:
                    if not rehearse:
                        torch.cuda.set_sync_debug_mode("default")
            return [{"provider": provider, "waits": False}]

        yield from _guarded(run, provider=provider, waits=True)


# name -> (part, seconds): they add up to 540, and are stretched to what --limit and --only give.
PARTS: dict[str, tuple[Callable[[bool], Rows], int]] = {
    "environment": (environment, 30), "ceilings": (ceilings, 20), "tests": (tests, 100), "kernels": (kernels, 70),
    "attention": (attention, 25), "step": (step, 170), "negatives": (negatives, 20), "loader": (loader, 10),
    "training": (training, 75), "waiting": (waiting, 20),
}  # fmt: skip


def _guarded(run: Callable[[], list[dict[str, Any]]], **identity: Any) -> Rows:
    """The rows of ``run``, or a row that says what went wrong."""
    try:
        yield from run()
    except Exception as error:
        traceback.print_exc()
        yield identity | {"error": f"{type(error).__name__}: {error}"[:600]}


def _has(module: str) -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(module) is not None
    return False


# --- the session -----------------------------------------------------------------------------------------------------


def run_part(name: str, out: Path, rehearse: bool) -> None:
    """In a process of its own: write the rows of a part as they come."""
    sys.path[:0] = PATHS
    rows: list[dict[str, Any]] = []
    for row in PARTS[name][0](rehearse):
        rows.append(row)
        _write(out / f"{name}.json", rows)


def session(out: Path, names: list[str], limit: float, rehearse: bool) -> dict[str, Any]:
    """Every part in turn; ``session.json`` is whole after each."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "rehearsal": rehearse, "parts": {}}
    begun, due, stretch = time.monotonic(), 0.0, limit / sum(PARTS[name][1] for name in names)
    for name in names:
        due += PARTS[name][1] * stretch
        seconds = due - (time.monotonic() - begun)
        start = time.monotonic()
        (out / f"{name}.json").unlink(missing_ok=True)
        state = _run(name, out, rehearse, seconds) if seconds > 1 else "not run: no time left"
        rows = json.loads((out / f"{name}.json").read_text()) if (out / f"{name}.json").is_file() else []
        if state == "done" and any("error" in row for row in rows):
            state = "errors"
        results["parts"][name] = {"state": state, "seconds": round(time.monotonic() - start, 1), "rows": rows}
        _write(out / "session.json", results)
    return results


def _run(name: str, out: Path, rehearse: bool, seconds: float) -> str:
    """How the process of a part ended."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(out)]
    paths = os.pathsep.join(filter(None, [*PATHS, os.environ.get("PYTHONPATH")]))
    variables = os.environ | {
        "DBETA_SESSION_OUT": str(out.resolve()), "DBETA_SESSION_SECONDS": str(seconds), "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *["--rehearse"] * rehearse], stdout=log, stderr=subprocess.STDOUT, env=variables,
            start_new_session=True, cwd=ROOT,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:  # also on Ctrl-C, and what a part left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if code == 0 else f"failed ({code}), see {name}.log"


def _write(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n")
    partial.replace(path)


def table(results: dict[str, Any]) -> Iterator[str]:
    """The last lines: a row per part, and its figures of most interest."""
    for name, part in results["parts"].items():
        yield f"{name:12} {part['seconds']:6.1f} s  {part['state']}"
        for row in part["rows"]:
            if shown := _shown(name, row):
                yield f"    {shown}"


def _shown(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return " ".join(str(value) for value in row.values())[:150]
    if name == "kernels" and row["provider"] not in ("kernel", "compiled", "auto", "cuDNN grouped"):
        return ""
    if name == "attention" and row["shape"] not in ("ecg 79", "ecg 79 x text 40"):
        return ""
    keys = {
        "environment": ("gpu", "nvidia_smi"), "ceilings": ("what", "gb_per_s", "tflops"),
        "tests": ("passed", "failures", "errors", "skipped", "failed"),
        "attention": ("shape", "backend", "dropout", "ms"),
        "kernels": ("operator", "case", "provider", "ms", "roofline"),
        "step": ("workload", "provider", "steps_per_s", "mfu", "peak_bytes", "launches"),
        "negatives": ("engine", "seconds", "absent"), "loader": ("engine", "device", "records_per_s", "absent"),
        "training": ("way", "seconds", "largest_relative_distance", "within"), "waiting": ("provider", "waits"),
    }[name]  # fmt: skip
    values = ((key, row[key]) for key in keys if row.get(key) is not None)
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values)


def main() -> None:
    """Run the session, or one part of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for session.json and the logs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        return run_part(given.part, given.out, given.rehearse)
    results = session(given.out, given.only, given.limit, given.rehearse)
    print("\n".join(table(results)))
    sys.exit(0 if all(part["state"] == "done" for part in results["parts"].values()) else 1)


if __name__ == "__main__":
    main()
