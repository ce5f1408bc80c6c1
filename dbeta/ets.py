"""The ETS loss (paper Eq. 4) over more features than one forward pass holds: over ranks, and over micro-batches.

Other ranks' diagonals and other micro-batches' are negatives, and the gradients are those of one process with the whole
batch, exactly. Over ranks texts go round a ring: gathered in parts, at the same memory, they measured no faster
(``dbeta-bench ranks``; "The ETS loss over ranks" in bench/NOTES.md).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dbeta.distributed import Ranks
from dbeta_kernels.ets_loss import ets_loss


def ring_ets_loss(
    ecg: Tensor,
    text: Tensor,
    aligned: Tensor,
    *,
    ranks: Ranks,
    ecg_reports: Tensor,
    text_reports: Tensor,
    reduction: str,
    **options: Any,
) -> Tensor:
    """The ETS loss (Eq. 4) of this rank's ECGs against the texts of all ranks; memory linear in the local batch.

    Texts go round the ring: at each hop a rank scores its ECGs against the block it holds through ``ets_loss``'s block
    mode (no diagonal but its own) while it is on its way to the next rank already. What the block's gradient gains here
    follows one hop behind, and is complete when it is back at its owner. The mean of the returned values over ranks is
    the loss of the whole batch, and gradients averaged over ranks (DDP, FSDP) are its gradients, exactly.

    Args:
        ecg, text: float [b, D], this rank's rows.
        aligned: bool [b].
        ecg_reports, text_reports: int64 [b].
        reduction, options: as ``ets_loss``.
    """
    if ranks.world == 1:
        return ets_loss(
            ecg, text, aligned, ecg_reports=ecg_reports, text_reports=text_reports, reduction=reduction, **options
        )
    return _ring(ecg, text, aligned, ecg_reports, text_reports, ranks, {"reduction": reduction, **options})


@torch.compiler.disable
def _ring(ecg, text, aligned, ecg_reports, text_reports, ranks, options):
    share = 1 / ranks.world if options["reduction"] == "mean" else 1  # of pairs: the columns of every block count
    total = ecg.new_zeros((), dtype=torch.promote_types(ecg.dtype, torch.float32))
    grad_ecg = torch.zeros_like(ecg)
    block, reports = text.detach().contiguous(), text_reports.contiguous()
    returning = list  # the gradient on its way: none yet
    for hop in range(ranks.world):
        coming = ranks.pass_on(block, reports) if hop + 1 < ranks.world else None  # while this one is scored
        with torch.enable_grad():
            x, t = ecg.detach().requires_grad_(), block.detach().requires_grad_()
            loss = share * ets_loss(
                x, t, aligned, ecg_reports=ecg_reports, text_reports=reports, diagonal=hop == 0, **options
            )
            d_ecg, d_block = torch.autograd.grad(loss, (x, t))
        total += loss.detach()
        grad_ecg += d_ecg
        if hop == 0:
            grad_text = d_block  # stays at home
        else:
            returning = ranks.pass_on(sum(returning(), start=d_block))
        if coming:
            block, reports = coming()
    return _Known.apply(ecg, text, total, grad_ecg, sum(returning(), start=grad_text))


class CachedEts:
    """The ETS loss of all micro-batches of a step together (``loss.ets_pairs = "batch"``).

    Every micro-batch's features are computed once without a graph; loss and feature gradients follow from all of them.
    Each micro-batch then runs again with a graph, and takes its rows of these gradients for its own.

    Args:
        features: (ecg, text) of each micro-batch, float [b, D].
        aligned, ecg_reports, text_reports: of each micro-batch.
        options: as ``ring_ets_loss``.
    """

    def __init__(self, features, aligned, ecg_reports, text_reports, **options: Any):
        ecg, text = (torch.cat(part).detach().requires_grad_() for part in zip(*features))
        reports = {"ecg_reports": torch.cat(ecg_reports), "text_reports": torch.cat(text_reports)}
        with torch.enable_grad():
            loss = ring_ets_loss(ecg, text, torch.cat(aligned), **reports, **options)
            gradients = torch.autograd.grad(loss, (ecg, text))
        sizes, parts = [len(part) for part in aligned], len(aligned)
        self.loss = loss.detach()
        self.gradients = list(zip(*((parts * gradient).split(sizes) for gradient in gradients)))

    def __iter__(self):
        """For each micro-batch a function in the place of ``ring_ets_loss``.

        Each gives the loss of the whole batch and, since a step takes the mean over its micro-batches, as many times
        the gradient as there are.
        """
        for gradients in self.gradients:
            yield lambda ecg, text, *_, g=gradients, **__: _Known.apply(ecg, text, self.loss, *g)


class _Known(torch.autograd.Function):
    """A loss of features whose gradients are computed already."""

    @staticmethod
    def forward(ctx, ecg, text, loss, grad_ecg, grad_text):
        ctx.save_for_backward(grad_ecg, grad_text)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_ecg, grad_text = ctx.saved_tensors
        return grad * grad_ecg, grad * grad_text, None, None, None
