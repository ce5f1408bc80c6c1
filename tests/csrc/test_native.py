"""The C++ parts as a compiler sees them: sanitised tests, fuzzing, the GPU code, and what happens without a part."""

import os
import shutil
import subprocess
import sys

import pytest

from dbeta_kernels import extension

FOLDER = extension.CHECKOUT / "build" / "csrc-tests"  # kept between runs: only what changed is compiled


@pytest.fixture(scope="module")
def programs():
    """test_decode and fuzz with ASan and UBSan, the GPU back-end compiled for the host."""
    if not (shutil.which("cmake") and shutil.which("g++")):
        pytest.skip("no cmake and g++ to build the C++ tests with")
    extension.build(FOLDER, "-DDBETA_TESTS=ON", "-DDBETA_TORCH=OFF", "-DDBETA_DALI=OFF", "-DDBETA_CUDA=OFF")
    return FOLDER


def run(*command, timeout=300) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_decoder_under_sanitisers(programs):
    assert "all checks hold" in run(programs / "test_decode")


def test_fuzz_briefly(programs):
    assert int(run(programs / "fuzz", 4).split()[0]) > 100


@pytest.mark.slow
def test_fuzz_for_two_minutes(programs):
    assert int(run(programs / "fuzz", 120, 1_000_000).split()[0]) > 10_000
    libfuzzer = programs / "libfuzzer"
    if libfuzzer.is_file():
        run(libfuzzer, "-max_total_time=120")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_gpu_code_compiles_for_hopper(tmp_path):
    """sm_90a, warnings as errors; a kernel that spilled registers would say so in ptxas's report."""
    command = ["nvcc", "-arch=sm_90a", "-std=c++17", "-O3", "-DDBETA_CUDA", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", "-c", "csrc/decode.cu", "-o", str(tmp_path / "decode.o")]
    done = subprocess.run(command, cwd=extension.CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert len(spills) == 3 and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


def test_configure_without_anything(tmp_path):
    """Neither compiler, nor torch, nor DALI: each is named with what to do, and the package still builds."""
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    common = ["cmake", "-S", extension.CHECKOUT / "csrc", f"-DPython_EXECUTABLE={sys.executable}"]
    bare = run(*common, "-B", tmp_path / "bare", "-DCMAKE_CXX_COMPILER=")
    assert "no C++ compiler" in bare and "Build files have been written" in bare
    if not (shutil.which("g++")):
        pytest.skip("no g++ for the second half")
    lacking = tmp_path / "python"
    lacking.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    lacking.chmod(0o755)
    said = run(*common[:-1], f"-DPython_EXECUTABLE={lacking}", "-B", tmp_path / "no-packages", "-DDBETA_CUDA=OFF")
    assert "the PyTorch operator is not built: torch is not installed" in said
    assert "the DALI operator is not built: DALI is not installed" in said


def test_a_build_of_another_place_is_made_anew(tmp_path, monkeypatch):
    """A checkout that was moved, or copied with its build."""
    ran = []
    monkeypatch.setattr(extension.subprocess, "run", lambda command, check: ran.append(command))
    for home, kept in ((extension.CHECKOUT / "csrc", True), ("/elsewhere/csrc", False)):
        (tmp_path / "CMakeCache.txt").write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={home}\n")
        extension.build(tmp_path)
        assert (tmp_path / "CMakeCache.txt").is_file() == kept
    assert len(ran) == 4


@pytest.mark.parametrize("name", ["dbeta_torch", "dbeta_dali"])
def test_absent_and_unloadable_parts_say_what_to_run(monkeypatch, tmp_path, name):
    load = {"dbeta_torch": extension.load_torch, "dbeta_dali": extension.load_dali}[name].__wrapped__
    if name == "dbeta_dali":
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(extension, "find", lambda _: None)
    with pytest.raises(ImportError, match=rf"{name}.so is not built for .* run: python -m dbeta_kernels.extension"):
        load()
    broken = tmp_path / f"{name}.so"
    broken.write_bytes(b"\x7fELF of another version")
    monkeypatch.setattr(extension, "find", lambda _: broken)
    with pytest.raises(ImportError, match=r"does not load under .* run: python -m dbeta_kernels.extension \("):
        load()


def test_the_newest_part_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(extension, "CHECKOUT", tmp_path)
    monkeypatch.setattr(extension.importlib.metadata, "distribution", _no_distribution)
    assert extension.find("dbeta_torch") is None
    (tmp_path / "build" / "csrc").mkdir(parents=True)
    for place in (tmp_path / "dbeta_torch.so", tmp_path / "build" / "csrc" / "dbeta_torch.so"):
        place.touch()
        assert extension.find("dbeta_torch") is not None
    os.utime(tmp_path / "dbeta_torch.so", (1, 1))
    assert extension.find("dbeta_torch") == tmp_path / "build" / "csrc" / "dbeta_torch.so"


def _no_distribution(name):
    raise extension.importlib.metadata.PackageNotFoundError(name)
