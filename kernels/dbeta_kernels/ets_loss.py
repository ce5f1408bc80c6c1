"""ETS, the pairwise sigmoid loss between ECGs and reports (paper section 3.2, Eq. 4; MODEL section 8).

    z_ij = scale * x_i . t_j + bias
    loss = sum_ij |y_ij| softplus(-y_ij z_ij) / B               (reduction "mean": / (B N))
    g_ij = -y_ij sigmoid(-y_ij z_ij) / B,   dX = scale g T,   dT = scale g^T X,   dscale = sum g x.t,   dbias = sum g

y_ij is -1, except: on the diagonal (j = i + offset) +1 where record i was shown its own report; for two records of one
report, wherever they meet off the diagonal, -1, 0 (ignored) or +1 as ``same_report`` says. Ignored pairs still count in
the divisor.

There is no row normaliser, so loss and gradients come from one sweep, and the gradients are made in the forward: three
products, 6 B N d FLOP; at least 2 (B + N) d values are moved. Nothing of size B x N is allocated. Products are summed
in float32; g is rounded to the input dtype before its products; both gradients stay float32 until the backward scales
them, and are rounded once, there. The CPU form works in float32, or float64 for float64 inputs.

- small (up to 256 x 256): one launch without atomics. A program sweeps one block of rows (or of columns) against all of
  the other side, for one slice of the width of its gradient: z is computed again for each slice, by arithmetic for less
  than a second launch costs. The row role leaves one partial loss per block, which the caller's graph sums.
- large: chunks of at most 2048 rows; a product with a sigmoid epilogue writes a chunk of g, two cuBLAS products use it.
- chunked: the same chunks in plain PyTorch, for the CPU and for float64.

At the paper's B = 128 this is a negligible share of a step: what it gives is one launch, and memory and time at scale.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dbeta_kernels import ets_kernels
from dbeta_kernels.ets_kernels import BLOCK, CHUNK_ROWS, SMALL, Pairs
from dbeta_kernels.launch import cdiv, rows_contiguous, use_kernel
from dbeta_kernels.registry import Inputs, KernelSpec, Mutant, register

SAME_REPORT = {"negative": -1, "ignore": 0, "positive": 1}  # the label y of such a pair
CPU_PAIRS = 2**21  # of the chunked form


# 1. Reference


def reference(
    ecg: Tensor,
    text: Tensor,
    aligned: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    ecg_reports: Tensor | None = None,
    text_reports: Tensor | None = None,
    same_report: Literal["negative", "ignore", "positive"] = "negative",
    offset: int = 0,
    diagonal: bool = True,
    reduction: Literal["batch", "mean"] = "batch",
) -> Tensor:
    """``ets_loss`` as its equation says, with the matrix of all pairs."""
    product = ecg @ text.T
    z = product.to(torch.promote_types(product.dtype, torch.float32)) * scale + bias
    rows = torch.arange(len(ecg), device=ecg.device)
    y = _labels(rows, len(text), aligned, ecg_reports, text_reports, SAME_REPORT[same_report], offset, diagonal)
    total = -(y.abs() * F.logsigmoid(y * z)).sum()  # F.softplus drops what is below 2e-9 beyond z = 20
    return total / (z.numel() if reduction == "mean" else len(ecg))


def _labels(rows, columns: int, aligned, ecg_reports, text_reports, same_report: int, offset: int, diagonal: bool):
    """y of the pairs (rows, all columns): int8 [rows, columns] of -1, 0 and +1."""
    y = torch.full((len(rows), columns), -1, dtype=torch.int8, device=rows.device)
    if ecg_reports is not None:
        y = y.masked_fill(ecg_reports[rows, None] == text_reports, same_report)
    if diagonal:
        own = torch.arange(columns, device=rows.device) == rows[:, None] + offset
        y = torch.where(own, 2 * aligned[rows, None].to(torch.int8) - 1, y)
    return y


# 2. CPU form


def _chunked(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [1, 3] of the loss, of g x.t and of g, and g T and g^T X: by chunks of rows, in float32 or float64."""
    dtype = torch.promote_types(pairs.ecg.dtype, torch.float32)
    text = pairs.text.to(dtype)
    sums = torch.zeros(1, 3, dtype=dtype, device=text.device)
    d_ecg, d_text = pairs.gradient_memory(dtype)
    chunk = max(1, min(CHUNK_ROWS, CPU_PAIRS // len(text)))
    for first in range(0, len(pairs.ecg), chunk):
        x = pairs.ecg[first : first + chunk].to(dtype)
        product = x @ text.T
        rows = torch.arange(first, first + len(x), device=x.device)
        y = _labels(rows, len(text), pairs.aligned, *pairs[5:10])
        yz = y * (product * pairs.scale + pairs.bias)
        sums[0, 0] -= (y.abs() * F.logsigmoid(yz)).sum()
        if pairs.gradients:
            g = yz.neg_().sigmoid_().mul_(y).mul_(-pairs.inverse)
            sums[0, 1] += (g * product).sum()
            sums[0, 2] += g.sum()
            torch.mm(g, text, out=d_ecg[first : first + len(x)])
            d_text.addmm_(g.T, x)
    sums[0, 0] *= pairs.inverse
    return sums, d_ecg, d_text


# 4. Operators


@torch.library.custom_op("dbeta::ets_loss", mutates_args=())
def _ets_loss(
    ecg: Tensor,
    text: Tensor,
    aligned: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    scale_value: float,
    bias_value: float,
    ecg_reports: Tensor | None,
    text_reports: Tensor | None,
    same_report: int,
    offset: int,
    diagonal: bool,
    mean: bool,
    form: str,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums [parts, 3] of the loss and of its derivatives by scale and bias; g T and g^T X."""
    inverse = 1.0 / (len(ecg) * (len(text) if mean else 1))
    sweep = {"small": ets_kernels.small, "large": ets_kernels.large, "chunked": _chunked}[form]
    scale, bias = scale_value if scale is None else scale, bias_value if bias is None else bias
    with torch.autocast(ecg.device.type, enabled=False):  # it would reach into the products of the sweep
        pairs = (ecg, text, aligned, scale, bias, ecg_reports, text_reports, same_report, offset, diagonal)
        return sweep(Pairs(*pairs, inverse, gradients))


@_ets_loss.register_fake
def _(ecg, text, aligned, *rest):
    form, gradients = rest[-2:]
    dtype = torch.promote_types(ecg.dtype, torch.float32)
    parts = cdiv(ecg.shape[0], BLOCK) if form == "small" else 1
    d_ecg, d_text = (t.new_empty(t.shape if gradients else (0,), dtype=dtype) for t in (ecg, text))
    return ecg.new_empty(parts, 3, dtype=dtype), d_ecg, d_text


@torch.library.custom_op("dbeta::ets_loss_backward", mutates_args=())
def _ets_loss_backward(factor: Tensor, d_ecg: Tensor, d_text: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both gradients scaled and rounded to ``dtype``, one pass each."""
    scaled = d_ecg.new_empty(d_ecg.shape, dtype=dtype), d_text.new_empty(d_text.shape, dtype=dtype)
    for gradient, out in zip((d_ecg, d_text), scaled):
        torch.mul(gradient, factor, out=out)
    return scaled


@_ets_loss_backward.register_fake
def _(factor, d_ecg, d_text, dtype):
    return d_ecg.new_empty(d_ecg.shape, dtype=dtype), d_text.new_empty(d_text.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ecg, _, _, scale, bias, ctx.scale_value, *_ = inputs
    ctx.save_for_backward(scale, bias, *output)
    ctx.dtype = ecg.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, d_sums, *_):
    if d_sums is None:
        return (None,) * 15
    scale, bias, sums, d_ecg, d_text = ctx.saved_tensors
    d_loss = d_sums[0, 0]  # ets_loss adds the parts up, so each has the same derivative
    factor = d_loss * (ctx.scale_value if scale is None else scale.to(d_loss.dtype).reshape(()))
    d_ecg, d_text = _ets_loss_backward(factor, d_ecg, d_text, ctx.dtype)
    d_scale, d_bias = (
        None if given is None else (d_loss * column.sum()).to(given.dtype).reshape(given.shape)
        for given, column in ((scale, sums[:, 1]), (bias, sums[:, 2]))
    )
    return d_ecg, d_text, None, d_scale, d_bias, *(None,) * 10


torch.library.register_autograd("dbeta::ets_loss", _backward, setup_context=_setup_context)


# 5. Public function


def ets_loss(
    ecg: Tensor,
    text: Tensor,
    aligned: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    ecg_reports: Tensor | None = None,
    text_reports: Tensor | None = None,
    same_report: Literal["negative", "ignore", "positive"] = "negative",
    offset: int = 0,
    diagonal: bool = True,
    reduction: Literal["batch", "mean"] = "batch",
    backend: str = "auto",
) -> Tensor:
    """Pairwise sigmoid loss of B ECGs against N reports.

    Args:
        ecg, text: features [B, d] and [N, d] of one floating dtype.
        aligned: bool [B], whether record i was shown its own report; the label of its diagonal pair.
        scale, bias: numbers, or tensors of one element, which then get gradients.
        ecg_reports, text_reports: int [B], [N], the report of each record and of each text shown; both or neither.
        same_report: the label of off-diagonal pairs of one report; without report ids all are negative.
        offset: text j is record j - offset's: where the texts of several ranks are gathered, this rank's first row.
        diagonal: False for a block of other ranks' texts: no pair is a record's own.
        reduction: "batch" divides the sum by B (Eq. 4), "mean" by B N (the release).
        backend: auto, fused or reference; ``launch.use_kernel``.

    Returns:
        The loss, float32 (float64 for float64 inputs), 0-d.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    _validate(ecg, text, aligned, ecg_reports, text_reports, same_report, reduction)
    kernel = use_kernel(backend, ecg)
    options = {"ecg_reports": ecg_reports, "text_reports": text_reports, "offset": offset, "diagonal": diagonal}
    if backend == "reference":
        options |= {"same_report": same_report, "reduction": reduction}
        return reference(ecg, text, aligned, scale=scale, bias=bias, **options)
    form = "chunked" if not kernel else "small" if max(len(ecg), len(text)) <= SMALL else "large"
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    bias, bias_value = (bias, 0.0) if isinstance(bias, Tensor) else (None, float(bias))
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (ecg, text, scale, bias))
    sums, _, _ = _ets_loss(
        rows_contiguous(ecg), rows_contiguous(text), aligned.contiguous(), scale, bias, scale_value, bias_value,
        *(None if r is None else r.contiguous() for r in (ecg_reports, text_reports)),
        SAME_REPORT[same_report], offset, diagonal, reduction == "mean", form, gradients,
    )  # fmt: skip
    return sums[:, 0].sum()


def _validate(ecg, text, aligned, ecg_reports, text_reports, same_report, reduction) -> None:
    def shape(t):
        return "none" if t is None else f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.")

    if ecg.ndim != 2 or text.ndim != 2 or ecg.shape[1] != text.shape[1] or ecg.dtype != text.dtype:
        raise ValueError(f"ets_loss: ecg {shape(ecg)} and text {shape(text)} must be [B, d] and [N, d] of one dtype")
    if 0 in (*ecg.shape, len(text)):
        raise ValueError(f"ets_loss: ecg {shape(ecg)} and text {shape(text)}: at least one row and one channel")
    if aligned.shape != ecg.shape[:1] or aligned.dtype != torch.bool:
        raise ValueError(f"ets_loss: aligned {shape(aligned)} must be bool ({len(ecg)},)")
    given = [None if ids is None else tuple(ids.shape) for ids in (ecg_reports, text_reports)]
    if given not in ([None, None], [(len(ecg),), (len(text),)]):
        raise ValueError(
            f"ets_loss: ecg_reports {shape(ecg_reports)} and text_reports {shape(text_reports)} must be int "
            f"({len(ecg)},) and ({len(text)},), or neither be given"
        )
    if same_report not in SAME_REPORT or reduction not in ("batch", "mean"):
        raise ValueError(
            f"ets_loss: same_report={same_report!r}, reduction={reduction!r}; accepted are "
            f"{', '.join(SAME_REPORT)} and batch, mean"
        )


def _make(
    dtype, device, seed, *, rows=4, columns=None, width=768, extreme=False, matched=None,
    scale=1.0, bias=0.0, tensors=False, reports=0, **options,
) -> Inputs:  # fmt: skip
    """Tanh features as the poolers make them; ``extreme``: all +-1, each text equal or opposite to an ECG."""
    generator = torch.Generator().manual_seed(seed)
    columns = columns or rows
    ecg = torch.randn(rows, width, generator=generator).tanh()
    text = torch.randn(columns, width, generator=generator).tanh()
    if extreme:
        ecg = ecg.sign()
        text = ecg[torch.arange(columns) % rows] * torch.randint(0, 2, (columns, 1), generator=generator).mul(2).sub(1)
    aligned = torch.rand(rows, generator=generator) < 0.5 if matched is None else torch.full((rows,), matched)
    inputs = {"ecg": ecg.to(device, dtype), "text": text.to(device, dtype), "aligned": aligned.to(device)}
    for name, value in (("scale", scale), ("bias", bias)):
        inputs[name] = torch.tensor(value, device=device, dtype=torch.float32) if tensors else value
    if reports:
        for name, count in (("ecg_reports", rows), ("text_reports", columns)):
            inputs[name] = torch.randint(0, reports, (count,), generator=generator).to(device)
    return inputs | options


def _siglip(ecg, text, aligned, *, scale=1.0, bias=0.0, chunk=1024, **_) -> Tensor:
    """Peer: the loss of SigLIP (arXiv 2303.15343) under autograd, by chunks of texts that are computed again."""

    def block(x, t, first):
        z = (x @ t.T).float() * scale + bias
        y = torch.full_like(z, -1.0)
        own = slice(first, first + len(t))
        y[own].diagonal().copy_(2.0 * aligned[own] - 1.0)
        return -F.logsigmoid(y * z).sum()

    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random, and a graph cannot hold the state
    blocks = [checkpoint(block, ecg, t, i * chunk, **options) for i, t in enumerate(text.split(chunk))]
    return torch.stack(blocks).sum() / len(ecg)


_IGNORE, _POSITIVE = {"same_report": "ignore"}, {"same_report": "positive"}

register(
    KernelSpec(
        name="ets_loss",
        function=ets_loss,
        reference=reference,
        truth=ets_loss,
        make=_make,
        cases={
            "paper width": {"rows": 4},
            "matched": {"rows": 1, "matched": True, "tensors": True, "bias": -10.0},
            "mismatched": {"rows": 1, "matched": False, "tensors": True, "bias": -10.0, "width": 123},
            "ragged": {"rows": 70, "columns": 123, "width": 252, "tensors": True, "scale": 0.7, "bias": -0.3},
            "extreme": {"rows": 3, "columns": 5, "extreme": True},
            "learned": {"rows": 5, "width": 123, "tensors": True, "scale": 10.0, "bias": -10.0, "reduction": "mean"},
            "ignore": {"rows": 9, "width": 32, "reports": 3, **_IGNORE},
            "positive": {"rows": 9, "columns": 7, "width": 32, "reports": 3, "offset": -2, **_POSITIVE},
            "block": {"rows": 6, "columns": 18, "width": 48, "offset": 6},
            "others": {"rows": 6, "columns": 12, "width": 48, "diagonal": False, "reports": 4, **_POSITIVE},
            "large": {
                "rows": 2100,  # two chunks of rows, two tiles of columns
                "columns": 131,
                "width": 24,
                "tensors": True,
                "scale": 0.7,
                "bias": -1.0,
                "reports": 40,
                **_IGNORE,
            },
            "large ragged": {"rows": 123, "columns": 507, "width": 252, "offset": 300, "bias": 0.5},
        },
        paper={f"B={b}": {"rows": b} for b in (128, 4096, 32768)},
        cpu={f"B={b}": {"rows": b} for b in (128, 2048)},
        ranges={"rows": (1, 90), "columns": (1, 90), "width": (1, 80), "offset": (-3, 3)},
        differentiable=("ecg", "text", "scale", "bias"),
        mutants={
            "label swapped": Mutant("ets_kernels._label", "2.0 * own - 1.0", "1.0 - 2.0 * own", "matched"),
            "rows unmasked": Mutant("ets_kernels._label", "(i < rows) & ", "", "ragged"),
            "columns unmasked": Mutant("ets_kernels._label", " & (j < columns)", "", "ragged"),
            "offset forgotten": Mutant("ets_kernels._label", "i + offset", "i", "block"),
            "diagonal everywhere": Mutant("ets_kernels._label", "if DIAGONAL", "if True", "others"),
            "report ids unread": Mutant("ets_kernels._label", "inside & same", "inside & False", "ignore"),
            "tail of the width lost": Mutant("ets_kernels._product", "(0, width,", "(0, width - 63,", "ragged"),
            "log(1 + e)": Mutant("ets_kernels._pair", "+ e * p", "+ tl.log(1.0 + e)", "mismatched"),
            "sigmoid of -w": Mutant("ets_kernels._pair", "w >= 0.0", "w < 0.0", "paper width"),
            "slice repeated": Mutant("ets_kernels._role", "part * SLICE", "0 * SLICE", "paper width"),
            "bias forgotten": Mutant("ets_kernels._role", " + bias", "", "matched"),
            "scale forgotten, large": Mutant("ets_kernels._tile_kernel", "scale * part", "part", "large"),
            "bias forgotten, large": Mutant("ets_kernels._tile_kernel", "part + bias", "part", "large"),
            "quarters swapped": Mutant("ets_kernels._tile_kernel", "q1 if q == 1", "q2 if q == 1", "large ragged"),
            "chunk overwritten": Mutant("ets_kernels.large", "beta=1", "beta=0", "large"),
            "sums overwritten": Mutant("ets_kernels._tile_kernel", "first // TILE_M + tile_m", "tile_m", "large"),
        },
        aot=ets_kernels.AOT,
        flops=lambda inputs: 6.0 * len(inputs["ecg"]) * inputs["text"].numel(),
        bytes=lambda inputs: 2.0 * (inputs["ecg"].nbytes + inputs["text"].nbytes),
        peers={"siglip": _siglip},
    )
)
