"""Ahead-of-time compilation of every tuned configuration for sm_90, without a GPU, and the budgets it is held to.

``budgets.json`` holds, per Triton version, what each configuration of the registry compiles to: registers per thread,
spilled bytes, shared memory and the number of warpgroup matrix instructions. ``python -m dbeta_kernels.aot --write``
measures it again with the installed Triton. Compilation runs in processes of its own, because a process in which the
interpreter was chosen cannot compile; Triton's own cache makes a second run quick.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from dbeta_kernels.launch import INTERPRETED
from dbeta_kernels.registry import AotConfig, KernelSpec, specs

BUDGETS = Path(__file__).with_name("budgets.json")  # an editable install keeps its data files in the checkout
TARGET = GPUTarget("cuda", 90, 32)
MEASURES = ("registers", "spill_bytes", "shared_bytes", "wgmma")


def configurations(slow: bool = True) -> dict[str, tuple[KernelSpec, AotConfig]]:
    """The registry's configurations, named ``operator/configuration``; without ``slow`` only the paper's sizes."""
    every = {f"{name}/{key}": (spec, config) for name, spec in specs().items() for key, config in spec.aot.items()}
    return {name: (spec, config) for name, (spec, config) in every.items() if slow or not config.slow}


def budgets() -> dict[str, dict[str, int]]:
    """The committed budgets of the installed Triton version; empty if it has none."""
    return json.loads(BUDGETS.read_text()).get(triton.__version__, {})


def compile_all(slow: bool = True, workers: int | None = None) -> dict[str, dict[str, int]]:
    """Compile ``configurations(slow)`` in parallel processes and measure them.

    Returns:
        name -> the four ``MEASURES``.

    Raises:
        RuntimeError: with the compiler's own message, if a configuration does not compile.
    """
    workers = workers or min(4, os.cpu_count() or 1)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dbeta_kernels.aot", "--share", str(i), str(workers), *["--slow"] * slow],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(workers)
    ]  # fmt: skip
    finished = [(*process.communicate(), process.returncode) for process in running]  # all end before one may raise
    measured = {}
    for out, err, code in finished:
        if code:
            raise RuntimeError(f"ahead-of-time compilation failed:\n{err[-4000:]}")
        measured |= json.loads(out)
    return dict(sorted(measured.items()))


def compile_one(spec: KernelSpec, config: AotConfig) -> dict[str, int]:
    """Compile one configuration to a cubin and read its resources from it. Not under the interpreter."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: use compile_all, which compiles in processes of its own")
    module, name = spec.locate(config.kernel)
    kernel = getattr(module, name)
    unknown = {*config.signature, *config.constants} ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{spec.name}: {config.kernel} and its configuration differ in {', '.join(sorted(unknown))}")
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={argument: config.signature.get(argument, "constexpr") for argument in kernel.arg_names},
        constexprs=dict(config.constants),
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if config.signature.get(argument, "").startswith("*") or argument in config.divisible
        },
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    return {**_resources(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory as the cubin states them, and wgmma counted in its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", path)
        code = _tool("nvdisasm", path)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spill_bytes": stack + local, "wgmma": len(re.findall(r"\b[HQI]?GMMA\b", code))}


def _tool(name: str, *arguments) -> str:
    """Run one of the CUDA tools that Triton's package carries (the system's may not know its cubins)."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def table(measured: dict[str, dict[str, int]]) -> str:
    """The budget table as Markdown."""
    lines = ["| configuration | registers | spilled bytes | shared bytes | wgmma |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(str(row[key]) for key in MEASURES)} |" for name, row in measured.items()]
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Compile every tuned configuration for sm_90 and print its resources.")
    parser.add_argument("--write", action="store_true", help="replace this Triton version's part of budgets.json")
    parser.add_argument("--share", nargs=2, type=int, metavar=("I", "N"), help="only every N-th from I, as JSON")
    parser.add_argument("--slow", action="store_true", help="with --share: also what is not of the paper's sizes")
    arguments = parser.parse_args()
    if arguments.share:
        first, step = arguments.share
        mine = list(configurations(arguments.slow).items())[first::step]
        print(json.dumps({name: compile_one(spec, config) for name, (spec, config) in mine}))
        return
    measured = compile_all()
    print(table(measured))
    if arguments.write:
        path = BUDGETS
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {triton.__version__: measured}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    _main()
