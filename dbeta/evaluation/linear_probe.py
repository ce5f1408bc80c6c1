"""Linear probing (paper 4.1.2, Table 2, Table 10): one linear layer on frozen features.

Adam at 1e-3, batch 128, 200 epochs, binary cross-entropy, 1/10/100 % of the training records drawn by seed; the epoch
with the best validation AUC is the one that is tested. All seeds train side by side as one batched product with the
gradient written out, so a probe takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dbeta.evaluation.metrics import AucTable, macro_auc
from dbeta.runtime import track

SEEDS = (42, 43, 44)
FRACTIONS = (0.01, 0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The protocol's numbers."""

    epochs: int = 200
    batch: int = 128
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A trained probe of one seed."""

    seed: int
    epoch: int  # chosen on validation, 1-based
    validation_auc: float
    weight: np.ndarray  # float32 [C, D]
    bias: np.ndarray  # float32 [C]
    records: int  # it was trained on
    unseen: tuple[int, ...]  # classes without a positive among them

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits float32 [N, C]."""
        return features @ self.weight.T + self.bias


def train_probes(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    *,
    fraction: float = 1.0,
    seeds: Sequence[int] = SEEDS,
    config: ProbeConfig | None = None,
    device: str | torch.device = "cpu",
) -> list[Probe]:
    """One probe per seed; a seed draws the subset, the initial weights and the order of records.

    Args:
        train: features float32 [N, D] and targets bool [N, C].
        validation: the same, for choosing the epoch.
        fraction: share of the training records, at least one.

    Raises:
        ValueError: no training or validation records, or a fraction outside (0, 1].
    """
    config = config or ProbeConfig()
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction}; accepted: above 0, up to 1")
    if not len(train[0]) or not len(validation[0]):
        raise ValueError(f"{len(train[0])} training and {len(validation[0])} validation records; both are needed")
    records, classes = max(1, round(fraction * len(train[0]))), train[1].shape[1]
    subsets = [np.random.default_rng(seed).permutation(len(train[0]))[:records] for seed in seeds]
    features = torch.as_tensor(train[0], device=device)
    targets = torch.as_tensor(train[1], dtype=torch.float32, device=device)
    held_out, held_out_targets = (torch.as_tensor(part, device=device) for part in validation)
    weight, bias = _initial(seeds, classes, features.shape[1], device)
    optimizer = torch.optim.Adam([weight, bias], lr=config.lr)
    best: list[tuple[float, int, Tensor, Tensor] | None] = [None] * len(seeds)
    for epoch in track(range(1, config.epochs + 1), f"probe on {records:,} records, {len(seeds)} seeds"):
        order = torch.as_tensor(
            np.stack([s[np.random.default_rng((seed, epoch)).permutation(records)] for s, seed in zip(subsets, seeds)])
        ).to(device)
        for rows in order.split(config.batch, dim=1):
            _step(features[rows], targets[rows], weight, bias, optimizer)
        logits = weight @ held_out.T + bias[..., None]
        for index, area in enumerate(mean_auc(logits, held_out_targets.T).tolist()):
            if best[index] is None or area > best[index][0]:
                best[index] = (area, epoch, weight[index].clone(), bias[index].clone())
    return [
        Probe(
            seed=seed, epoch=epoch, validation_auc=area, weight=w.cpu().numpy(), bias=b.cpu().numpy(), records=records,
            unseen=tuple(np.flatnonzero(~train[1][subset].any(0)).tolist()),
        )
        for seed, subset, (area, epoch, w, b) in zip(seeds, subsets, best)
    ]  # fmt: skip


def _initial(seeds: Sequence[int], classes: int, width: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """nn.Linear's own initial values, one layer per seed: [S, C, D] and [S, C]."""
    weights, biases = [], []
    for seed in seeds:
        generator, bound = torch.Generator().manual_seed(seed), width**-0.5
        weights.append(torch.empty(classes, width).uniform_(-bound, bound, generator=generator))
        biases.append(torch.empty(classes).uniform_(-bound, bound, generator=generator))
    return tuple(torch.stack(part).to(device) for part in (weights, biases))


def _step(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One update of every seed's layer. x [S, B, D], y [S, B, C]; d(mean BCE)/d(logit) = (sigmoid - y) / (B C)."""
    error = torch.baddbmm(bias[:, None], x, weight.mT).sigmoid_().sub_(y).div_(y.shape[1] * y.shape[2])
    weight.grad, bias.grad = error.mT @ x, error.sum(1)
    optimizer.step()


def mean_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Macro AUC [S] of scores [S, C, N] against targets [C, N], to choose the epoch; ties count in either direction.

    0.5 where no class can be measured.
    """
    positives = targets.sum(1)
    pairs = positives * (targets.shape[1] - positives)
    found = targets.expand_as(scores).gather(-1, scores.argsort(-1))  # from the lowest score to the highest
    ranks = torch.arange(1, targets.shape[1] + 1, device=scores.device)
    wins = (found * ranks).sum(-1) - positives * (positives + 1) // 2
    measured = pairs > 0
    return (wins / pairs)[:, measured].mean(1) if measured.any() else torch.full((len(scores),), 0.5)


def measure(
    probes: Sequence[Probe], features: np.ndarray, targets: np.ndarray, names: Sequence[str], **options
) -> list[AucTable]:
    """The AUC table of each probe on test records; ``options`` of ``metrics.macro_auc``."""
    return [macro_auc(probe.scores(features), targets, names, **options) for probe in probes]
