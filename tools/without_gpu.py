"""What torch.compile makes of the training step for an H100, on a machine without one: kernels, bytes, seconds.

    python tools/without_gpu.py --workload uniform40 --kernels
    python tools/without_gpu.py --workload real --shapes 2 --provider "fused + compiled layers" --out layers.json

Workloads and providers are those of ``dbeta-bench step``.

Needs a torch with CUDA (torch 2.11.0+cu130 was tried; gigabytes, so in an environment of its own) and nvcc of the same
CUDA, no driver. CUDA calls end in a stub (absent_gpu.c), tensors are fake, Triton compiles for sm_90, nothing runs. So
it tells whether forward and backward compile, with changing shapes too, how long that takes in one thread, and what
every kernel reads and writes (of a table that is indexed, all of it) - not how fast it is. Left out are Inductor's
folding of constants and its patterns of attention, which would run small kernels.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
H100 = types.SimpleNamespace(
    name="H100, absent", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class Compiled(Exception):
    """Raised where compiled code would run."""


def restart_behind_stub() -> None:
    """Build the stub and start this program again behind it."""
    if folder := os.environ.get("DBETA_ABSENT_GPU"):
        shutil.rmtree(folder)  # it is loaded
        return
    if shutil.which("nvcc") is None:
        sys.exit("Error: nvcc is not here; install the CUDA toolkit of this torch and put it on PATH")
    folder = Path(tempfile.mkdtemp(prefix="dbeta-absent-gpu-"))
    for name in ("libcuda.so.1", "runtime.so"):
        command = ["nvcc", "-shared", "-cudart=none", "-Xcompiler=-fPIC", f"-Xlinker=-soname,{name}"]
        subprocess.run([*command, "-o", str(folder / name), str(Path(__file__).with_name("absent_gpu.c"))], check=True)
    os.environ |= {
        "DBETA_ABSENT_GPU": str(folder), "LD_PRELOAD": str(folder / "runtime.so"), "LD_LIBRARY_PATH": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    os.execv(sys.executable, [sys.executable, *sys.argv])


def pretend() -> None:
    """Put an H100's answers where torch, Inductor and Triton would ask the driver."""
    import torch
    import torch._inductor.config
    import torch._inductor.fx_passes.fuse_attention
    import torch._inductor.fx_passes.pad_mm
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedTritonKernel
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    def answers(value: Any) -> Any:
        return lambda *_, **__: value

    def loaded(kernel: Any, _: int) -> None:
        kernel.function, kernel.n_regs, kernel.n_spills = 1, 64, 0

    def skipped(*_: Any) -> None:
        raise Compiled

    class Nowhere:  # a device's context
        __init__ = __exit__ = answers(None)
        __enter__ = lambda self: self  # noqa: E731

    queries = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
        "get_device_capability": (9, 0), "is_bf16_supported": True, "synchronize": None, "_lazy_init": None,
        "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
    }  # fmt: skip
    for name, value in queries.items():
        setattr(torch.cuda, name, answers(value))
    asked = {"get_compute_capability": 90, "get_raw_stream": 0, "is_triton_capable": True, "current_stream": None}
    for name, value in (queries | asked | {"raise_if_triton_unavailable": None, "set_device": None}).items():
        setattr(CudaInterface, name, staticmethod(answers(value)))
    CudaInterface.device = torch.cuda.device = Nowhere
    CudaInterface.Worker.get_device_properties = staticmethod(answers(H100))
    CudaInterface.Worker.current_device = staticmethod(answers(0))
    fake_tensor.init_gpu_context = answers(None)
    torch.cuda.amp.common.amp_definitely_not_available = answers(False)
    target = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
    limits = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    utils = {"load_binary": (0, 0, 64, 0, 1024), "get_device_properties": limits}
    utils = types.SimpleNamespace(**{name: answers(value) for name, value in utils.items()})
    asked = {name: answers(value) for name, value in (target | {"launcher_cls": None}).items()}
    driver.set_active(types.SimpleNamespace(**asked, utils=utils))
    triton_helpers.set_driver_to_gpu = answers(None)
    StaticallyLaunchedTritonKernel.load_kernel = loaded
    CompiledFxGraph.__call__ = skipped
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.joint_graph_constant_folding = False
    torch._inductor.fx_passes.fuse_attention._sfdp_init = answers(None)
    torch._inductor.fx_passes.pad_mm._pad_mm_init = answers(None)
    torch._functorch.config.force_non_lazy_backward_lowering = True


def watch(rows: list[dict[str, Any]], every_kernel: bool) -> None:
    """Append a row for each graph that Inductor compiles."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    generate = GraphLowering.codegen

    def codegen(graph: Any) -> Any:
        code = generate(graph)
        row = {"direction": "backward" if graph.is_backward else "forward"}
        row |= dict.fromkeys(("library_kernels", "triton_kernels", "library_gb", "triton_gb"), 0)
        moved = []
        for node in graph.scheduler.nodes:
            size = node.get_read_write_buffers_sizes()
            whose = "library" if isinstance(node, ExternKernelSchedulerNode) else "triton"
            row[f"{whose}_kernels"] += 1
            row[f"{whose}_gb"] += size / 1e9
            origins = sorted(str(o) for n in node.get_nodes() for o in getattr(n.node, "origins", ()))
            moved.append({"whose": whose, "mb": size / 1e6, "computes": " ".join(origins)[:120]})
        rows.append(row | ({"kernels": moved} if every_kernel else {}))
        return code

    GraphLowering.codegen = codegen


def step(
    workload: str, provider: str, shapes: int, records: int, settings: list[str], rows: list[dict[str, Any]]
) -> None:
    """Compile forward and backward for the first ``shapes`` batches of a workload."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dbeta import compilation
    from dbeta.config import Config
    from dbeta.distributed import ALONE
    from dbeta.losses import Objective
    from dbeta_bench.step import PROVIDERS, Bench

    cuda = torch.device("cuda", 0)
    settings = ["runtime.device=cpu", "runtime.compile=true", f"train.batch={records}", *settings]
    bench = Bench("fused", workload, Config.load("paper", settings), torch.device("cpu"))
    batches = []
    for _ in range(shapes):
        batches.append(bench.batch())
        bench.done += 1
    engines = {"attention": "sdpa-flash"} | PROVIDERS[provider] | {"device": "cuda", "cuda_graphs": False}
    if engines["kernels"] == "auto":
        engines["kernels"] = "fused"
    model, runtime = bench.stepper.model, dataclasses.replace(bench.config.runtime, **engines)
    model.runtime = runtime
    model._choose_engines()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device=cuda)  # noqa: E731
        for module in model.modules():
            module._parameters |= {n: p if p is None else nn.Parameter(fake(p)) for n, p in module._parameters.items()}
            module._buffers |= {n: fake(b) for n, b in module._buffers.items()}
        objective = Objective(model, bench.config.loss, ALONE, runtime, cuda)
        for layer in objective.layers() if runtime.compile_scope == "layers" else ():
            layer._compiled_call_impl = _compiled_then_eager(layer)
        for batch in batches:
            for field in dataclasses.fields(batch):
                if isinstance(value := getattr(batch, field.name), torch.Tensor):
                    setattr(batch, field.name, fake(value))
            begun, seen = time.process_time(), len(rows)
            with torch.autocast("cuda", torch.bfloat16), contextlib.suppress(Compiled):
                objective(batch)
            text = f"{tuple(batch.text_ids.shape)}, {batch.text_tokens} tokens"
            for row in rows[seen:]:
                row["text"] = text
            print(f"text {text}: {len(rows) - seen} graphs, {time.process_time() - begun:.0f} s")
    print(compilation.report())


def _compiled_then_eager(layer: Any) -> Any:
    compiled = layer._compiled_call_impl

    def call(*args: Any, **options: Any) -> Any:
        try:
            compiled(*args, **options)
        except Compiled:
            return layer._call_impl(*args, **options)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="uniform40")
    parser.add_argument("--provider", default="fused + compile")
    parser.add_argument("--shapes", type=int, default=1, help="batches; in `real` most have a shape of their own")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="section.key=value")
    parser.add_argument("--kernels", action="store_true", help="what each kernel moves, too")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import torch

    if torch.version.cuda is None:
        parser.error(f"torch {torch.__version__} is built without CUDA; install one with it in another environment")
    restart_behind_stub()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]
    pretend()
    rows: list[dict[str, Any]] = []
    watch(rows, given.kernels)
    try:
        step(given.workload, given.provider, given.shapes, given.batch, given.settings, rows)
    finally:
        for row in rows:
            print(
                f"{row.get('text', ''):24}  {row['direction']:8}  "
                f"library {row['library_kernels']:4} kernels {row['library_gb']:6.2f} GB   "
                f"Triton {row['triton_kernels']:4} kernels {row['triton_gb']:6.2f} GB"
            )
            for kernel in sorted(row.get("kernels", ()), key=lambda k: -k["mb"]):
                print(f"    {kernel['mb']:8.1f} MB  {kernel['whose']:7}  {kernel['computes']}")
        if given.out:
            given.out.write_text(
                json.dumps({k: v for k, v in vars(given).items() if k != "out"} | {"rows": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
