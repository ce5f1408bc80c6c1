"""The four objectives of pre-training (paper 3.2, Eq. 1-4; MODEL section 8): total = MLM + MEM + ETM + ETS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dbeta.config import LossConfig
from dbeta_kernels.ets_loss import ets_loss
from dbeta_kernels.mem_loss import mem_loss

if TYPE_CHECKING:
    from dbeta.data.batch import Batch
    from dbeta.models.dbeta import DBeta


@dataclass(kw_only=True, slots=True)
class Losses:
    """Scalars; ``total`` carries the gradient, and so do its parts. The counters are detached float32."""

    total: Tensor
    mlm: Tensor
    mem: Tensor
    etm: Tensor
    ets: Tensor
    etm_correct: Tensor  # rows whose match was judged right
    mlm_correct: Tensor  # masked words predicted right
    mlm_count: Tensor  # masked words


def pretraining_losses(model: DBeta, batch: Batch, config: LossConfig) -> Losses:
    """One forward pass and its losses; weights of ``config`` multiply the terms of the total."""
    kernels = model.runtime.kernels
    out = model(
        batch.ecg, batch.text_ids, batch.text_mask,
        noise=batch.noise, mlm_positions=batch.mlm_positions, text_tokens=batch.text_tokens,
    )  # fmt: skip
    match = _wide(out.etm_logits)
    aligned = batch.aligned.to(match.dtype)

    # MLM, Eq. 1: cross-entropy of the words hidden from the text encoder
    labels = _mlm_labels(batch, config, everywhere=not model.runtime.removals)
    logits = _wide(model.mlm_head.vocabulary(out.mlm_hidden))
    hidden = labels != -100
    mlm = F.cross_entropy(logits, labels, reduction="sum") / hidden.sum().clamp(min=1)

    # MEM, Eq. 2: squared error of the hidden patches of the (unmasked) signal
    mem = mem_loss(
        out.mem_prediction, batch.signal, out.mem_patches, batch.mean, batch.rstd,
        gain=batch.gain, baseline=batch.baseline, patch=model.config.patch, backend=kernels,
        rows_weight=aligned if config.reconstruct_rows == "matched" else None,
    )  # fmt: skip

    # ETM, Eq. 3: does the report belong to the ECG?
    if model.config.etm_logits == 1:
        etm = F.binary_cross_entropy_with_logits(match[:, 0], aligned)
        judged = match[:, 0] > 0
    else:
        etm = F.cross_entropy(match, batch.aligned.long())
        judged = match[:, 1] > match[:, 0]

    # ETS, Eq. 4: pairwise sigmoid loss of all ECG and text features of the batch
    ets = ets_loss(
        out.ecg_features, out.text_features, batch.aligned, ecg_reports=batch.reports, text_reports=batch.text_reports,
        same_report=config.ets_same_report, reduction=config.ets_reduction, backend=kernels,
    )  # fmt: skip

    return Losses(
        total=config.mlm * mlm + config.mem * mem + config.etm * etm + config.ets * ets,
        mlm=mlm, mem=mem, etm=etm, ets=ets,
        etm_correct=(judged == batch.aligned).sum().float(),
        mlm_correct=((logits.detach().argmax(-1) == labels) & hidden).sum().float(),
        mlm_count=hidden.sum().float(),
    )  # fmt: skip


def _mlm_labels(batch: Batch, config: LossConfig, *, everywhere: bool) -> Tensor:
    """Labels of the MLM slots, or (the dense computation) of every cell of the text grid."""
    labels, positions = batch.mlm_labels, batch.mlm_positions
    if config.reconstruct_rows == "matched":
        labels = torch.where(batch.aligned[positions // batch.text_ids.shape[1]], labels, -100)
    if not everywhere:
        return labels
    cells = torch.full_like(batch.text_ids.flatten(), -100)
    return cells.scatter_reduce(0, positions, labels, "amax")  # unused slots (0, -100) change nothing


def _wide(logits: Tensor) -> Tensor:
    """At least float32: a softmax over the vocabulary or a log-sigmoid is not for bf16."""
    return logits if logits.dtype == torch.float64 else logits.float()
