"""Full fine-tuning for diagnosis (paper 4.1.2, Table 1 Dx., Table 10): a linear layer on the mean of the ECG tokens.

Binary cross-entropy, Adam at 5e-5, batch 256, 100 epochs on segments of 5 s, threshold 0.5, CinC 2021 score. Missing
leads of a lead set are zero in training, validation and test alike; splits are by patient, so no recording is in two.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbeta.evaluation.cinc import challenge_score
from dbeta.evaluation.datasets import Dataset, Rows
from dbeta.evaluation.fitting import FitConfig, TokenMean, fit
from dbeta.evaluation.linear_probe import mean_auc
from dbeta.evaluation.metrics import AucTable, Interval, macro_auc
from dbeta.evaluation.signals import SegmentStore, keep_leads
from dbeta.runtime import autocast

DX = FitConfig(lr=5e-5)
THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """Test results of one fine-tuned model, by segment."""

    auc: AucTable
    score: float | None  # CinC 2021, where weights were given
    interval: Interval | None
    epoch: int
    segments: dict[str, int]  # per split


class Classifier(nn.Module):
    """Encoder and linear head."""

    def __init__(self, model: nn.Module, classes: int, seed: int):
        super().__init__()
        self.body = TokenMean(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(self.body.projection.out_features, classes)

    def forward(self, ecg: Tensor) -> Tensor:
        """float [B, 12, L] mV -> logits [B, C]."""
        return self.head(self.body(ecg))


def finetune(
    model: nn.Module,
    dataset: Dataset,
    stores: dict[str, SegmentStore],
    folder: Path,
    *,
    leads: str = "12",
    weights: np.ndarray | None = None,
    sinus: int = -1,
    config: FitConfig = DX,
    bootstrap: int = 1000,
) -> Finetuned:
    """Fine-tune a copy of the model's ECG encoder and test the epoch that was best on validation.

    Args:
        stores: segments of each split's records, cut once for all lead sets.
        folder: for the checkpoints of this run.
        weights: CinC 2021 weights in the order of the classes; None: the epoch is chosen by macro AUC.
        sinus: column of sinus rhythm.

    Raises:
        ValueError: a split without segments.
    """
    empty = [split for split, store in stores.items() if not len(store)]
    if empty:
        raise ValueError(f"{dataset.labels.title}: no segments in {', '.join(empty)}; fine-tuning needs all three")
    device = next(model.parameters()).device
    targets = {split: _segment_targets(dataset.splits[split], store) for split, store in stores.items()}
    network = Classifier(model, len(dataset.labels.labels), config.seed).to(device)

    def logits(split: str, rows: np.ndarray) -> Tensor:
        with autocast(model.runtime, device):
            return network(keep_leads(stores[split].read(rows).to(device), leads)).float()

    def loss_of(rows: np.ndarray) -> Tensor:
        wanted = torch.from_numpy(targets["train"][rows]).to(device, torch.float32)
        return F.binary_cross_entropy_with_logits(logits("train", rows), wanted)

    def all_logits(split: str) -> np.ndarray:
        chunks = np.array_split(np.arange(len(stores[split])), -(-len(stores[split]) // config.batch))
        return np.concatenate([logits(split, chunk).cpu().numpy() for chunk in chunks])

    def validate() -> float:
        found = all_logits("validation")
        if weights is not None:
            return challenge_score(targets["validation"], sigmoid(found) > THRESHOLD, weights, sinus)[0]
        return float(mean_auc(torch.from_numpy(found.T[None]), torch.from_numpy(targets["validation"].T)))

    best = fit(
        network, loss_of, validate, rows=len(stores["train"]), config=config, folder=folder,
        what=f"fine-tuning {dataset.labels.title}, {leads} leads",
    )  # fmt: skip
    with torch.no_grad():
        found = all_logits("test")
    patient = dict(zip(dataset.splits["test"].records.tolist(), dataset.splits["test"].groups))
    groups = [patient[record] for record in stores["test"].record.tolist()]
    score = interval = None
    if weights is not None:
        score, interval = challenge_score(
            targets["test"], sigmoid(found) > THRESHOLD, weights, sinus, groups=groups, bootstrap=bootstrap
        )
    return Finetuned(
        auc=macro_auc(found, targets["test"], dataset.labels.labels, groups=groups, bootstrap=bootstrap),
        score=score, interval=interval, epoch=best["epoch"], segments={split: len(s) for split, s in stores.items()},
    )  # fmt: skip


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _segment_targets(rows: Rows, store: SegmentStore) -> np.ndarray:
    """bool [S, C]: each segment has its record's labels."""
    place = {record: index for index, record in enumerate(rows.records.tolist())}
    return rows.targets[[place[record] for record in store.record.tolist()]]
