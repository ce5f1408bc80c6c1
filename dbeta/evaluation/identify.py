"""Patient identification (paper 4.1.2, Table 1 Id., Table 10): the ECG encoder trained with ArcFace.

    logit_j = s cos(angle_j + m [j is the patient])     s = 192, m = 1

Adam at 1e-4, batch 256, 100 epochs on segments of 5 s, one class per training patient. Tested on patients never seen:
the gallery holds each one's first record, the probe is the second, top-1 by cosine. In the paper's protocol every
patient with two records or more is a test patient (2,127 in PTB-XL) and the others train.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbeta.evaluation.datasets import PRETRAINING, derive_split, own_split, subjects_of
from dbeta.evaluation.fitting import FitConfig, TokenMean, fit
from dbeta.evaluation.metrics import Interval, bootstrap_interval
from dbeta.evaluation.signals import SegmentStore, keep_leads
from dbeta.runtime import autocast

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus

ID = FitConfig(lr=1e-4)
SCALE, MARGIN = 192.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Identities:
    """Who is trained on and who is told apart; no patient is in two of the three."""

    train: dict[int, str]  # record -> patient
    validation: list[tuple[int, int]]  # gallery and probe record of each patient; the same one twice: two segments
    test: list[tuple[int, int]]
    origin: str


@dataclass(frozen=True, kw_only=True)
class Identified:
    """Share of test patients whose probe is nearest to their own gallery record."""

    accuracy: float
    interval: Interval
    patients: int
    epoch: int
    chance: float


def arcface_loss(embedding: Tensor, weight: Tensor, patient: Tensor) -> Tensor:
    """Cross-entropy of the margin logits.

    Beyond pi the angle plus margin would make the logit rise again; there cos(angle) - m sin(m) goes on falling.

    Args:
        embedding: float [B, D].
        weight: float [P, D], one direction per patient.
        patient: int64 [B].
    """
    cosine = F.linear(F.normalize(embedding.float()), F.normalize(weight.float()))
    own = cosine.gather(1, patient[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = own.acos()
    shifted = torch.where(angle + MARGIN < torch.pi, (angle + MARGIN).cos(), own - MARGIN * np.sin(MARGIN))
    return F.cross_entropy(SCALE * cosine.scatter(1, patient[:, None], shifted), patient)


def top_1(gallery: Tensor, probe: Tensor) -> np.ndarray:
    """bool [P]: whether each probe's nearest gallery row by cosine is its own; a tie is a failure."""
    similarity = F.normalize(probe.float()) @ F.normalize(gallery.float()).T
    own = similarity.diagonal()[:, None]
    return ((similarity >= own).sum(1) == 1).cpu().numpy()


def identities(corpus: "Corpus", patients: Path | None = None, *, seed: int = 42) -> Identities:
    """Divide the patients of a corpus.

    Where at least half of the patients have a single record, the paper's protocol: those train (a tenth validates,
    with two segments of its one record), the rest is tested. Else the corpus's own split by patient, or a derived one.

    Args:
        patients: as in ``subjects_of``.

    Raises:
        ValueError: no patient to test has two records.
    """
    subjects = subjects_of(corpus, patients)
    names = [str(name) for name in corpus.column("name")]
    held: dict[str, list[int]] = defaultdict(list)
    for record in sorted(range(len(names)), key=names.__getitem__):  # by name: first is first recorded
        held[subjects[record]].append(record)
    single = [patient for patient, records in held.items() if len(records) == 1]
    if 2 * len(single) >= len(held):
        part = dict.fromkeys(held, "test")
        part |= {p: "train" if q != "validation" else q for p, q in zip(single, derive_split(single, seed=seed)[0])}
        origin = "paper: patients with several records are tested, the others train"
    else:
        rows = sorted(held)
        stated = dict(zip(subjects, (str(split) for split in corpus.column("split"))))
        seen = corpus.source in PRETRAINING
        parts, origin = own_split([stated[p] for p in rows], rows) if seen else derive_split(rows, seed=seed)
        part = dict(zip(rows, parts))
    pairs = {
        split: [
            (records[0], records[min(1, len(records) - 1)])
            for patient, records in held.items()
            if part[patient] == split
        ]
        for split in ("validation", "test")
    }
    test = [(gallery, probe) for gallery, probe in pairs["test"] if gallery != probe]
    if len(test) < 2:
        raise ValueError(f"{corpus.path}: {len(test)} test patients with two records; identification needs two or more")
    train = {record: patient for patient, records in held.items() if part[patient] == "train" for record in records}
    return Identities(train=train, validation=pairs["validation"], test=test, origin=origin)


def identify(
    model: nn.Module,
    people: Identities,
    store: SegmentStore,
    folder: Path,
    *,
    leads: str = "12",
    config: FitConfig = ID,
    bootstrap: int = 1000,
) -> Identified:
    """Train a copy of the model's ECG encoder with ArcFace and identify the test patients.

    Args:
        store: segments of all records that ``people`` names.
        folder: for the checkpoints of this run.

    Raises:
        ValueError: fewer than two training patients.
    """
    device = next(model.parameters()).device
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, record in enumerate(store.record.tolist()):
        rows_of[record].append(row)
    classes = {patient: index for index, patient in enumerate(sorted(set(people.train.values())))}
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} training patients; identification needs two or more")
    train = np.array([row for record in people.train for row in rows_of[record]])
    patient = torch.tensor([classes[people.train[record]] for record in store.record[train].tolist()], device=device)
    network = nn.ModuleDict({"body": TokenMean(model), "head": _directions(model, len(classes), config.seed)}).to(
        device
    )

    def embed(rows: np.ndarray) -> Tensor:
        with autocast(model.runtime, device):
            return network["body"](keep_leads(store.read(rows).to(device), leads)).float()

    def accuracy(pairs: list[tuple[int, int]]) -> np.ndarray:
        # Gallery: the first segment. Probe: the first of the other record, or the last of the same one.
        gallery = [rows_of[first][0] for first, _ in pairs]
        probe = [rows_of[second][0 if first != second else -1] for first, second in pairs]
        parts = [
            torch.cat([embed(rows) for rows in np.array_split(np.array(side), -(-len(side) // config.batch))])
            for side in (gallery, probe)
        ]
        return top_1(*parts)

    def loss_of(rows: np.ndarray) -> Tensor:
        return arcface_loss(embed(train[rows]), network["head"].weight, patient[torch.from_numpy(rows).to(device)])

    held_out = [(a, b) for a, b in people.validation if a != b or len(rows_of[a]) > 1]
    best = fit(
        network, loss_of, lambda: float(accuracy(held_out).mean()) if held_out else 0.0, rows=len(train),
        config=config, folder=folder, what=f"identification, {leads} leads",
    )  # fmt: skip
    with torch.no_grad():
        correct = accuracy(people.test)
    return Identified(
        accuracy=float(correct.mean()),
        interval=bootstrap_interval(correct, bootstrap=bootstrap),
        patients=len(correct),
        epoch=best["epoch"],
        chance=1 / len(correct),
    )


def _directions(model: nn.Module, classes: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(model.ecg_projection.out_features, classes, bias=False)
