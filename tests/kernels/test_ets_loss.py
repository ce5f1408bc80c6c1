"""ets_loss against the fixtures, its form for the CPU, its memory, and what it refuses."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from dbeta_kernels.checking import evaluate, to_float64
from dbeta_kernels.ets_loss import ets_loss, reference
from dbeta_kernels.registry import specs

SPEC = specs()["ets_loss"]


@pytest.fixture
def cpu_form(monkeypatch):
    """``backend="auto"`` as on a CPU without the interpreter: the chunked form."""
    monkeypatch.setattr("dbeta_kernels.launch.INTERPRETED", False)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=str)
def test_parity(shared, cpu_form, dtype, tolerance, backend):
    fixtures = np.load(shared / "parity" / "ets_cases.npz")
    precision = "f64" if dtype == torch.float64 else "f32"
    for case in fixtures["cases"]:
        scale, _, bias = case.partition("scale")[2].partition("_bias")
        has_bias = bias != "none"
        inputs = {
            "ecg": torch.tensor(fixtures[f"{case}/ecg"], dtype=dtype, requires_grad=True),
            "text": torch.tensor(fixtures[f"{case}/text"], dtype=dtype, requires_grad=True),
            "scale": torch.tensor(float(scale), dtype=dtype, requires_grad=True),
            "bias": torch.tensor(float(bias) if has_bias else 0.0, dtype=dtype, requires_grad=has_bias),
        }
        aligned = torch.tensor(fixtures[f"{case}/labels"]) == 1
        loss = ets_loss(**inputs, aligned=aligned, reduction="mean", backend=backend)
        loss.backward()
        results = {"loss": loss.detach()} | {f"grad_{k}": v.grad for k, v in inputs.items() if v.requires_grad}
        for name in ("loss", "grad_ecg", "grad_text", "grad_scale", *["grad_bias"] * has_bias):
            expected = fixtures[f"{case}/{precision}/{name}"]
            np.testing.assert_allclose(results[name], expected, rtol=0, atol=tolerance, err_msg=f"{case} {name}")


@pytest.mark.parametrize("case", SPEC.cases)
@pytest.mark.parametrize("pairs", [2**21, 100])
def test_chunks_equal_the_whole_in_float64(case, pairs, monkeypatch):
    monkeypatch.setattr("dbeta_kernels.ets_loss.CPU_PAIRS", pairs)
    inputs = to_float64(SPEC.make(torch.float64, "cpu", 0, **SPEC.cases[case]))  # scale and bias too
    actual, expected = (evaluate(f, inputs, SPEC.differentiable) for f in (ets_loss, reference))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-12)


def test_blocks_of_ranks_add_up(cpu_form):
    """Two ranks, each against its own texts and then the other's, make the loss and gradients of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    ecg, text = (torch.randn(10, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    aligned = torch.arange(10) % 3 != 0
    whole = ets_loss(ecg, text, aligned)
    expected = torch.autograd.grad(whole, (ecg, text))
    parts = 0.0
    for rows, others in ((slice(0, 5), slice(5, 10)), (slice(5, 10), slice(0, 5))):
        parts = parts + ets_loss(ecg[rows], text[rows], aligned[rows])
        parts = parts + ets_loss(ecg[rows], text[others], aligned[rows], diagonal=False)
    gathered = sum(ets_loss(ecg[i : i + 5], text, aligned[i : i + 5], offset=i) for i in (0, 5))
    for total in (parts / 2, gathered / 2):  # each divided by its own 5 rows
        torch.testing.assert_close(total, whole)
        for actual, wanted in zip(torch.autograd.grad(total, (ecg, text)), expected):
            torch.testing.assert_close(actual, wanted)


def test_same_report_by_hand():
    """Records 0 and 1 have one report; record 1 was shown the text of report 9."""
    ecg, text = torch.eye(2, 3).double(), torch.tensor([[1.0, 2, 0], [0.5, -1, 0]]).double()
    aligned, ids = (
        torch.tensor([True, False]),
        {"ecg_reports": torch.tensor([4, 4]), "text_reports": torch.tensor([4, 9])},
    )
    z = ecg @ text.T

    def term(y, z):
        return torch.log1p(torch.exp(-y * z))

    own = term(1, z[0, 0]) + term(-1, z[1, 1])
    shown = {"negative": term(-1, z[1, 0]), "ignore": 0.0, "positive": term(1, z[1, 0])}
    for same_report, pair in shown.items():
        loss = ets_loss(ecg, text, aligned, same_report=same_report, **ids)
        torch.testing.assert_close(loss, (own + pair + term(-1, z[0, 1])) / 2)


def test_no_gradient_is_made_where_none_is_wanted(interpreter):
    inputs = SPEC.make(torch.float32, "cpu", 0, rows=70, width=20)
    expected = ets_loss(**inputs, backend="reference")
    for rows_limit in (256, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dbeta_kernels.ets_loss.SMALL", rows_limit)
            torch.testing.assert_close(ets_loss(**inputs, backend="fused"), expected, rtol=1e-5, atol=0)


PEAK = """
import sys, torch
from dbeta_kernels.ets_loss import ets_loss
torch.set_num_threads(1)
backend, *sizes = sys.argv[1:]
def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would start at the peak of the process that forked us
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024
for size in map(int, sizes):
    ecg, text = (torch.randn(size, 32).requires_grad_() for _ in range(2))
    before = peak()
    ets_loss(ecg, text, torch.ones(size, dtype=torch.bool), backend=backend).backward()
    print(peak() - before)
"""


def peaks(backend, *sizes):
    """MiB by which each call raises the peak of a process of its own; sizes ascending, after a first small call."""
    command = [sys.executable, "-c", PEAK, backend, *map(str, (64, *sizes))]
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return list(itertools.accumulate(map(int, result.stdout.split()[1:])))


def test_memory_of_the_cpu_form_grows_linearly():
    """A float32 matrix of all pairs is 16 MiB at 2,048 and 64 MiB at 4,096; the inputs take 1 MiB there."""
    small, large = peaks("auto", 2048, 4096)
    assert large < 128
    assert large < 2.5 * small  # linear doubles, quadratic is four times
    (dense,) = peaks("reference", 4096)
    assert dense > 192, "the measure does not see matrices of all pairs"


@pytest.mark.parametrize("case", ["matched", "mismatched", "learned"])
def test_the_peer_computes_the_same_loss(case, interpreter):
    inputs = to_float64(SPEC.make(torch.float64, "cpu", 0, **SPEC.cases[case] | {"reduction": "batch"}))
    peer = functools.partial(SPEC.peers["siglip"], chunk=2)
    actual, expected = (evaluate(f, inputs, SPEC.differentiable) for f in (peer, reference))
    for name in expected:
        torch.testing.assert_close(actual[name].double(), expected[name].double(), rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_memory_at_32768():
    """DESIGN section 5: at most 300 MB beyond inputs and gradients."""
    inputs = SPEC.make(torch.bfloat16, "cuda", 0, rows=32768)
    ecg, text = (inputs.pop(k).requires_grad_() for k in ("ecg", "text"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ets_loss(ecg, text, **inputs).backward()
    assert torch.cuda.max_memory_allocated() - before - ecg.nbytes - text.nbytes <= 300e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(3, 5)}, r"ecg float32 \(3, 4\) and text float32 \(3, 5\) must be"),
        ({"text": torch.zeros(3, 4).double()}, "of one dtype"),
        ({"ecg": torch.zeros(0, 4)}, "at least one row"),
        ({"aligned": torch.ones(3)}, r"aligned float32 \(3,\) must be bool"),
        ({"aligned": torch.ones(2, dtype=torch.bool)}, r"must be bool \(3,\)"),
        ({"ecg_reports": torch.arange(3)}, r"text_reports none must be int \(3,\) and \(3,\), or neither"),
        ({"ecg_reports": torch.arange(3), "text_reports": torch.arange(2)}, r"text_reports int64 \(2,\)"),
        ({"same_report": "drop"}, "same_report='drop'.*negative, ignore, positive"),
        ({"reduction": "sum"}, "reduction='sum'.*batch, mean"),
    ],
)
def test_refuses(change, message):
    inputs = {"ecg": torch.zeros(3, 4), "text": torch.zeros(3, 4), "aligned": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        ets_loss(**inputs | change)
