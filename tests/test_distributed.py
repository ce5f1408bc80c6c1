"""The ETS loss round the ring: several gloo processes give the loss and gradients of one with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dbeta.distributed import Ranks
from dbeta.ets import ring_ets_loss
from dbeta_kernels.ets_loss import ets_loss

ROWS, WIDTH = 12, 8


def whole_batch():
    generator = torch.Generator().manual_seed(0)
    ecg, text = (torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    aligned = torch.rand(ROWS, generator=generator) < 0.5
    reports = torch.randint(0, 5, (2, ROWS), generator=generator)  # some texts occur on several ranks
    return ecg.requires_grad_(), text.requires_grad_(), aligned, reports


def one_rank(rank: int, world: int, address: str, options: dict, results) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    ranks = Ranks(rank, world)
    ecg, text, aligned, (own, shown) = whole_batch()
    rows = ranks.rows(ROWS)
    mine = [part.detach()[rows].requires_grad_() for part in (ecg, text)]
    loss = ring_ets_loss(*mine, aligned[rows], ranks=ranks, ecg_reports=own[rows], text_reports=shown[rows], **options)
    loss.backward()
    # What DDP and FSDP do to gradients of shared weights: the mean over ranks.
    results[rank] = (ranks.mean(loss.detach()), *(part.grad / world for part in mine))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("reduction", "same_report"), [("batch", "negative"), ("mean", "ignore"), ("batch", "positive")]
)
def test_ring_equals_one_process(world, reduction, same_report, tmp_path):
    options = {"reduction": reduction, "same_report": same_report}
    ecg, text, aligned, (own, shown) = whole_batch()
    expected = ets_loss(ecg, text, aligned, ecg_reports=own, text_reports=shown, backend="reference", **options)
    expected.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, (world, f"file://{tmp_path / 'meet'}", options, results), nprocs=world)
        losses, *gradients = zip(*(results[rank] for rank in range(world)))
    torch.testing.assert_close(torch.stack(losses), expected.detach().expand(world), rtol=0, atol=1e-10)
    for got, leaf in zip(gradients, (ecg, text)):
        torch.testing.assert_close(torch.cat(got), leaf.grad, rtol=0, atol=1e-10)


def test_an_uneven_batch_is_refused():
    with pytest.raises(ValueError, match="does not divide over 5 ranks"):
        Ranks(0, 5).rows(ROWS)
