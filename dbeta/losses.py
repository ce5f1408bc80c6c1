"""The four objectives of pre-training (paper 3.2, Eq. 1-4; MODEL section 8): total = MLM + MEM + ETM + ETS.

With several ranks each value is such that its mean over ranks is that of the global batch, and so are gradients, which
DDP and FSDP average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbeta import compilation
from dbeta.config import LossConfig, RuntimeConfig
from dbeta.distributed import ALONE, Ranks
from dbeta.ets import ring_ets_loss
from dbeta_kernels.mem_loss import mem_loss

if TYPE_CHECKING:
    from dbeta.data.batch import Batch
    from dbeta.models.dbeta import DBeta, Outputs


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


def pretraining_losses(
    model: DBeta, batch: Batch, config: LossConfig, ranks: Ranks = ALONE, pairs: Callable[..., Tensor] = ring_ets_loss
) -> Losses:
    """One forward pass and its losses; weights of ``config`` multiply the terms of the total.

    Under the exact removals a head whose loss weighs 0 is not computed: the loss is then 0, and its parameters get no
    gradient.

    Args:
        batch: the rows of this rank.
        pairs: the ETS loss; another one where it knows more than this batch (``ets.CachedEts``).
    """
    kernels = model.runtime.kernels
    predicts, reconstructs = heads(model, config)
    out = _outputs(model, batch, config)
    match = _wide(out.etm_logits)
    aligned = batch.aligned.to(match.dtype)

    # MLM, Eq. 1: cross-entropy of the words hidden from the text encoder. Not F.linear_cross_entropy, which torch 2.11
    # lacks and which keeps the logits to itself: the accuracy needs their argmax, and at masked positions they are few.
    mlm = mlm_correct = mlm_count = mem = match.new_zeros(())
    if predicts:
        labels = _mlm_labels(batch, config, everywhere=not model.runtime.removals)
        logits = _wide(model.mlm_head.vocabulary(out.mlm_hidden))
        hidden = labels != -100
        mlm = F.cross_entropy(logits, labels, reduction="sum") / ranks.mean(hidden.sum()).clamp(min=1 / ranks.world)
        mlm_correct, mlm_count = ((logits.detach().argmax(-1) == labels) & hidden).sum().float(), hidden.sum().float()

    # MEM, Eq. 2: squared error of the hidden patches of the (unmasked) signal
    if reconstructs:
        mem = mem_loss(
            out.mem_prediction, batch.signal, out.mem_patches, batch.mean, batch.rstd,
            gain=batch.gain, baseline=batch.baseline, patch=model.config.patch, backend=kernels,
            rows_weight=aligned if config.reconstruct_rows == "matched" else None,
        )  # fmt: skip
    if config.reconstruct_rows == "matched" and ranks.world > 1:  # the mean of a rank counts by its matched rows
        mem = mem * (aligned.sum() / ranks.mean(aligned.sum()).clamp(min=1 / ranks.world))

    # ETM, Eq. 3: does the report belong to the ECG?
    if model.config.etm_logits == 1:
        etm = F.binary_cross_entropy_with_logits(match[:, 0], aligned)
        judged = match[:, 0] > 0
    else:
        etm = F.cross_entropy(match, batch.aligned.long())
        judged = match[:, 1] > match[:, 0]

    # ETS, Eq. 4: pairwise sigmoid loss of all ECG and text features of the global batch
    ets = pairs(
        out.ecg_features, out.text_features, batch.aligned, ecg_reports=batch.reports, text_reports=batch.text_reports,
        same_report=config.ets_same_report, reduction=config.ets_reduction, backend=kernels, ranks=ranks,
    )  # fmt: skip

    return Losses(
        total=config.mlm * mlm + config.mem * mem + config.etm * etm + config.ets * ets,
        mlm=mlm, mem=mem, etm=etm, ets=ets,
        etm_correct=(judged == batch.aligned).sum().float() * ranks.world,
        mlm_correct=mlm_correct * ranks.world,
        mlm_count=mlm_count * ranks.world,
    )  # fmt: skip


class Objective(nn.Module):
    """``pretraining_losses`` of a model as a module, whose forward pass DDP and FSDP can wrap."""

    def __init__(self, model: DBeta, config: LossConfig, ranks: Ranks, runtime: RuntimeConfig, device: torch.device):
        super().__init__()
        self.model, self.config, self.ranks = model, config, ranks
        compilation.compile_layers(self.layers(), runtime, device)
        # messages between ranks part the graph
        self.losses = compilation.compiled(pretraining_losses, runtime, device, alone=ranks.world == 1)

    @property
    def unused_parameters(self) -> bool:
        """Encoders of transformers may have a pooler, which we do not read; a loss of weight 0 leaves out its head."""
        return self.model.config.text_encoder != "flan-t5" or not all(heads(self.model, self.config))

    def layers(self) -> list[nn.Module]:
        """All layers of the network; an encoder of transformers counts as one."""
        model = self.model
        return [
            *model.ecg_encoder.layers, *_text_layers(model), *model.fusion.text_layers, *model.fusion.ecg_layers,
            *model.mem_head.blocks,
        ]  # fmt: skip

    def blocks(self) -> list[nn.Module]:
        """The layers that are only ever called as a whole; T5's first also lends its relative bias."""
        lender = _text_layers(self.model)[0]
        return [layer for layer in self.layers() if layer is not lender]

    def forward(self, batch: Batch, pairs: Callable[..., Tensor] | None = ring_ets_loss) -> Losses | tuple[Tensor, ...]:
        """The losses; without ``pairs`` the (ECG, text) features that they would be computed from, [B, D] each."""
        if pairs is None:
            out = _outputs(self.model, batch, self.config)
            return out.ecg_features, out.text_features
        if pairs is ring_ets_loss:
            return self.losses(self.model, batch, self.config, self.ranks)
        return pretraining_losses(self.model, batch, self.config, self.ranks, pairs)


def heads(model: DBeta, config: LossConfig) -> tuple[bool, bool]:
    """Whether the MLM and the MEM head are computed."""
    dense = not model.runtime.removals
    return dense or config.mlm != 0, dense or config.mem != 0


def _text_layers(model: DBeta) -> list[nn.Module]:
    return list(getattr(model.text_encoder, "block", [model.text_encoder]))


def _outputs(model: DBeta, batch: Batch, config: LossConfig) -> Outputs:
    predicts, reconstructs = heads(model, config)
    return model(
        batch.ecg, batch.text_ids, batch.text_mask, noise=batch.noise, text_tokens=batch.text_tokens,
        mlm_positions=batch.mlm_positions if predicts else None, reconstruct=reconstructs,
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
