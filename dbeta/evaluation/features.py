"""Frozen features, extracted once: tanh-pooled, projected CLS (paper 3.2), cached by model and corpus checksums."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dbeta.evaluation.signals import corpus_checksum, keep_leads, windows
from dbeta.runtime import track

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus
    from dbeta.models.dbeta import DBeta

PART = 2048  # records per cached file: what a killed run loses at most


def model_checksum(model: torch.nn.Module) -> str:
    """sha256 over all tensors of a model, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureCache:
    """ECG features of one model, by corpus, lead set and window, in ``folder``."""

    def __init__(self, model: "DBeta", folder: Path, *, batch: int = 64):
        self.model, self.folder, self.batch = model, folder, batch
        self.checksum = model_checksum(model)

    def features(
        self, corpus: "Corpus", records: np.ndarray, *, leads: str = "12", window_s: float = 10.0
    ) -> np.ndarray:
        """Features of some records, float32 [N, D]; what is not cached yet is computed in parts and cached."""
        from dbeta.data.tables import load_arrays, save_arrays

        unique, place = np.unique(records, return_inverse=True)
        key = f"{self.checksum} {corpus_checksum(corpus)} {leads} {window_s}"
        parts = []
        for part in range(0, len(unique), PART):
            ids = unique[part : part + PART]
            name = hashlib.sha256(f"{key} {ids.tobytes().hex()}".encode()).hexdigest()[:24]
            path = self.folder / f"{name}.npz"
            if path.is_file():
                parts.append(load_arrays(path, ("features",))[0]["features"])
                continue
            found = self._extract(corpus, ids, leads, window_s)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_arrays(path, {"features": found}, {"leads": leads, "window_s": window_s, "corpus": str(corpus.path)})
            parts.append(found)
        return np.concatenate(parts)[place]

    def _extract(self, corpus: "Corpus", ids: np.ndarray, leads: str, window_s: float) -> np.ndarray:
        device = next(self.model.parameters()).device
        batches = -(-len(ids) // self.batch)
        found = [
            self.model.encode_ecg(keep_leads(ecg.to(device), leads)).float().cpu()
            for ecg in track(
                windows(corpus, ids, window_s=window_s, batch=self.batch),
                f"features of {len(ids):,} records ({leads} leads)",
                batches,
            )
        ]
        return torch.cat(found).numpy()
