"""ECGs of a corpus in mV for evaluation: windows, segments, and the five lead sets of Table 1."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dbeta.data.records import LEADS
from dbeta.runtime import track

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus

RATE_HZ = 500
LEAD_SETS = {
    "12": LEADS,
    "P-6": ("I", "II", "III", "aVR", "aVL", "aVF"),
    "P-3": ("I", "II", "V2"),
    "P-2": ("I", "II"),
    "P-1": ("I",),
}


def keep_leads(ecg: Tensor, leads: str) -> Tensor:
    """``ecg`` [..., 12, L] with the leads that are not in the set at exactly 0 mV; the tensor itself for ``12``.

    Raises:
        ValueError: no such lead set.
    """
    if leads not in LEAD_SETS:
        raise ValueError(f"lead set {leads!r}; accepted: {', '.join(LEAD_SETS)}")
    kept = torch.tensor([lead in LEAD_SETS[leads] for lead in LEADS], device=ecg.device)
    return ecg if bool(kept.all()) else torch.where(kept[:, None], ecg, 0)


def record_mv(corpus: "Corpus", record: int) -> np.ndarray:
    """A whole record, float32 [12, L] mV at 500 Hz; an invalid sample is 0."""
    from dbeta.data.resample import resample

    adc = corpus.read_adc(record)
    gain, baseline, rate = (corpus.column(name, np.array([record]))[0] for name in ("gain", "baseline", "rate_hz"))
    valid = adc != np.iinfo(adc.dtype).min
    signal = np.where(valid, (adc - baseline[:, None]) / gain[:, None], 0).astype(np.float32)
    return resample(signal, float(rate))


def windows(
    corpus: "Corpus", records: np.ndarray, *, window_s: float = 10.0, batch: int = 64, length_s: float = 10.0
) -> Iterator[Tensor]:
    """The first ``window_s`` of each record, then zeros up to ``length_s``: float32 [B, 12, 500 length_s] in mV."""
    from dbeta.data.loader import make_loader

    loader = make_loader(corpus, ids=records, batch=batch, shuffle=False, repeat=False, engine="reference")
    samples, length = round(window_s * RATE_HZ), round(length_s * RATE_HZ)
    try:
        for raw in loader:
            ecg = raw.signal
            if ecg is None:
                valid = raw.adc != torch.iinfo(raw.adc.dtype).min
                ecg = ((raw.adc - raw.baseline[..., None]) / raw.gain[..., None]).where(valid, 0.0)
            ecg = ecg[..., :length].clone()
            ecg[..., samples:] = 0
            yield ecg
    finally:
        loader.close()


class SegmentStore:
    """All whole segments of some records, as int16 microvolts in one memory-mapped file.

    Fine-tuning reads every segment many times; decoding and resampling them once makes an epoch a sequential read.
    Amplitudes beyond +-32.767 mV are clipped.

    Attributes:
        record: int64 [S], the record of each segment.
        start: int64 [S], the first sample of each segment.
    """

    def __init__(self, path: Path, record: np.ndarray, start: np.ndarray, samples: int):
        self.record, self.start = record, start
        self.data = np.memmap(path, np.int16, "r", shape=(len(record), 12, samples)) if len(record) else None

    def __len__(self) -> int:
        return len(self.record)

    def read(self, rows: np.ndarray) -> Tensor:
        """Segments in mV, float32 [B, 12, samples]."""
        return torch.from_numpy(self.data[rows].astype(np.float32) / 1000)

    @classmethod
    def build(cls, corpus: "Corpus", records: np.ndarray, window_s: float, path: Path) -> "SegmentStore":
        """Cut each record into consecutive segments; a record shorter than one gives a single zero-filled one.

        The file appears whole or not at all; a whole store of the same records that is already there is used as it is.
        """
        from dbeta.data.tables import load_arrays, save_arrays

        samples = round(window_s * RATE_HZ)
        wanted = {"corpus": corpus_checksum(corpus), "records": _fingerprint(records), "samples": samples}
        index = path.with_suffix(".npz")
        if index.is_file() and path.is_file():
            arrays, metadata = load_arrays(index, ("record", "start"))
            whole = path.stat().st_size == len(arrays["record"]) * 12 * samples * np.dtype(np.int16).itemsize
            if metadata == wanted and whole:
                return cls(path, arrays["record"], arrays["start"], samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        partial, places = path.with_suffix(".partial"), []
        with partial.open("wb") as file:
            for record in track(records, f"cutting {len(records):,} records"):
                signal = np.rint(record_mv(corpus, int(record)) * 1000).clip(-32767, 32767).astype("<i2")
                if signal.shape[1] < samples:
                    signal = np.pad(signal, ((0, 0), (0, samples - signal.shape[1])))
                for start in range(0, signal.shape[1] - samples + 1, samples):
                    file.write(np.ascontiguousarray(signal[:, start : start + samples]).tobytes())
                    places.append((record, start))
        partial.replace(path)
        record, start = np.array(places, np.int64).reshape(-1, 2).T
        save_arrays(index, {"record": record, "start": start}, wanted)
        return cls(path, record, start, samples)


def corpus_checksum(corpus: "Corpus") -> str:
    """sha256 of what identifies a corpus's content: its shards' checksums."""
    return hashlib.sha256(json.dumps(corpus.info["shards"], sort_keys=True).encode()).hexdigest()


def _fingerprint(records: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(records, np.int64).tobytes()).hexdigest()
