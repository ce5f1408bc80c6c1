"""N3S, nearest-neighbour negative sampling (paper 3.4): a table of each report's 64 farthest reports.

Every unique report is embedded once and searched once; training then draws a negative by indexing. The released
pipeline runs the language model and the search for every single negative (MODEL section 12).

Farthest neighbours concentrate: a few outlying reports are far from everyone, so they fill the table (hubness). The
table reports how strongly, and ``remedy`` counters it:

* ``none``           the paper's
* ``centre``         the mean embedding is subtracted first: a common direction no longer decides who is outlying
* ``local-scaling``  centred, and each cosine is read against how far the other report is from its own 64 farthest:
                     cos(i, j) - r_j / 2 with r_j their mean cosine (the ranking of CSLS, Conneau et al. 2018)
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import click
import numpy as np
import torch
from torch import Tensor

from dbeta.data.embedding import PAPER_ENCODER, WEIGHTS, encoder_embedding, hash_embedding, unit
from dbeta.data.farthest import Engine, farthest_others, resolve_engine
from dbeta.data.hub import cached_folder
from dbeta.data.reports import Reports, digest
from dbeta.data.tables import load_arrays, save_arrays
from dbeta.runtime import announce, resolve_device

FILE = "negatives.npz"
Remedy = Literal["none", "centre", "local-scaling"]
REMEDIES = ("none", "centre", "local-scaling")


@dataclass(frozen=True, kw_only=True, eq=False)
class NegativeTable:
    """The far reports of each report.

    Attributes:
        table: int32 [reports, k], ascending by cosine (under a remedy: by the corrected cosine). Every row has k
            different reports, so a uniform draw of a column is a uniform draw of a far report.
        similarity: float32 [reports, k], the cosines.
        metadata: encoder, k, remedy, seed, hubness, and the digest of the reports.
    """

    table: np.ndarray
    similarity: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write atomically, without pickle."""
        save_arrays(path, {"table": self.table, "similarity": self.similarity}, self.metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote; see ``tables.load_arrays`` for errors."""
        arrays, metadata = load_arrays(path, ("table", "similarity"))
        return cls(**arrays, metadata=metadata)


def build_negatives(
    embeddings: Tensor,
    k: int = 64,
    *,
    candidates: Tensor | None = None,
    engine: Engine = "auto",
    remedy: Remedy = "none",
    seed: int = 0,
) -> NegativeTable:
    """Exact farthest others by cosine, on the device of ``embeddings``.

    With fewer than k other candidates the table is narrower and holds all of them.

    Args:
        embeddings: float32 [R, d], not changed.
        candidates: int64 [C], the reports that may be negatives; None: all.
        seed: decides among equal cosines.

    Raises:
        ValueError: fewer than two candidates, an unknown remedy, non-finite embeddings, or an engine that is not there.
    """
    device = embeddings.device
    candidates = torch.arange(len(embeddings)) if candidates is None else candidates.unique()
    if len(candidates) < 2:
        raise ValueError(f"N3S needs at least 2 different reports, there is {len(candidates)}; prepare more records")
    if remedy not in REMEDIES:
        raise ValueError(f"remedy {remedy!r}; accepted: {', '.join(REMEDIES)}")
    if not embeddings.isfinite().all():
        raise ValueError("the embeddings hold NaN or infinite values; is the encoder folder intact?")
    width = min(k, len(candidates) - 1)
    if width < k:
        announce(f"N3S: {len(candidates)} different reports, so each has {width} negatives instead of {k}: all others")
    candidates = candidates.to(device)
    directions = unit(embeddings.float().clone())
    searched = directions if remedy == "none" else unit(directions - directions.mean(0))
    engine = resolve_engine(engine, searched, searched, width + 2)
    cosines, ids = farthest_others(searched, candidates, width, engine, seed)
    if remedy == "local-scaling":
        distance = cosines.mean(1)[candidates]
        _, ids = farthest_others(searched, candidates, width, engine, seed, offset=distance / -2)
    if remedy != "none":
        rows = torch.arange(len(directions), device=device).split(1024)
        cosines = torch.cat([torch.einsum("rd,rkd->rk", directions[r], directions[ids[r]]) for r in rows])
    table = ids.int().cpu().numpy()
    metadata = {
        "k": width,
        "remedy": remedy,
        "seed": seed,
        "engine": engine,
        "hubness": hubness(table, candidates.cpu()),
    }
    return NegativeTable(table=table, similarity=cosines.cpu().numpy(), metadata=metadata)


def hubness(table: np.ndarray, candidates: np.ndarray | Tensor) -> dict[str, float]:
    """How unevenly a table [R, k] uses the C ``candidates``.

    Returns:
        distinct: candidates that occur at all, and as ``distinct_share``; most: rows that the most used one is in, and
        as ``most_share`` (k / C would be even); skewness and gini of the occurrences (0: even).
    """
    counts = np.sort(np.bincount(table.ravel(), minlength=len(table))[np.asarray(candidates)]).astype(np.float64)
    mean, spread, number = counts.mean(), counts.std(), len(counts)
    return {
        "distinct": int((counts > 0).sum()),
        "distinct_share": float((counts > 0).mean()),
        "most": int(counts[-1]),
        "most_share": float(counts[-1] / len(table)),
        "skewness": float(((counts - mean) ** 3).mean() / spread**3) if spread else 0.0,
        "gini": float(1 + 1 / number - 2 * counts.cumsum().sum() / (counts.sum() * number)),
    }


def negatives(
    corpus: str | Path,
    *,
    encoder: str = "auto",
    k: int = 64,
    device: str = "auto",
    engine: Engine = "auto",
    remedy: Remedy = "none",
    seed: int = 0,
) -> dict[str, Any]:
    """``dbeta negatives``: embed a corpus's reports, search, and write ``negatives.npz`` into its folder.

    Every report has a row; only reports of the training split are negatives, so that training shows no held-out text.

    Args:
        encoder: directory or hub id of a text encoder; "hashing": hashed n-grams; "auto": Flan-T5-small where the hub
            cache has it, hashing otherwise (announced, and marked in the table's metadata as ``fallback``).

    Returns:
        The table's metadata, with seconds and the path.

    Raises:
        ValueError: see ``build_negatives``, ``encoder_embedding`` and ``Corpus.open``.
    """
    from dbeta.data.corpus import Corpus

    opened, where = Corpus.open(corpus), resolve_device(device)
    fallback = encoder == "auto" and cached_folder(PAPER_ENCODER, WEIGHTS) is None
    if fallback:
        announce(
            f"N3S embeds reports with hashed n-grams ({PAPER_ENCODER} is not in the Hugging Face cache); "
            "for a language model's embedding use --encoder DIR"
        )
    encoder = ("hashing" if fallback else PAPER_ENCODER) if encoder == "auto" else encoder
    clock = [time.perf_counter()]
    if encoder == "hashing":
        embeddings = hash_embedding(opened.reports).to(where)
    else:
        embeddings = encoder_embedding(opened.reports, encoder, where)
    clock.append(time.perf_counter())
    shown = torch.from_numpy(np.unique(opened.column("report", opened.split_ids("train")))).long()
    made = build_negatives(embeddings, k, candidates=shown, engine=engine, remedy=remedy, seed=seed)
    clock.append(time.perf_counter())
    made.metadata.update(encoder=encoder, fallback=fallback, reports=len(embeddings), digest=digest(opened.reports))
    path = Path(corpus) / FILE
    try:
        made.save(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    _describe(made.metadata, clock[1] - clock[0], clock[2] - clock[1])
    return {**made.metadata, "path": path, "embed_s": clock[1] - clock[0], "search_s": clock[2] - clock[1]}


def _describe(metadata: dict[str, Any], embed_s: float, search_s: float) -> None:
    hubs, reports = metadata["hubness"], metadata["reports"]
    click.echo(
        f"negatives: {reports:,} reports x {metadata['k']} by {metadata['encoder']} "
        f"(embedded in {embed_s:.1f} s, searched by {metadata['engine']} in {search_s:.1f} s)\n"
        f"hubness: {hubs['distinct']:,} reports used ({hubs['distinct_share']:.0%}), the most used by "
        f"{hubs['most_share']:.1%} of all, skewness {hubs['skewness']:.2f}, Gini {hubs['gini']:.2f}, "
        f"remedy {metadata['remedy']}"
    )
    if metadata["remedy"] == "none" and hubs["distinct"] > 4 * metadata["k"] and hubs["most_share"] > 0.25:
        announce("N3S: one report is a negative of more than a quarter of all; --remedy local-scaling counters that")


def load_negatives(corpus: Reports) -> NegativeTable:
    """The table of a corpus.

    Raises:
        ValueError: there is none, it is damaged, or it was made for other reports.
    """
    path = Path(corpus.path) / FILE
    again = f"make it with: dbeta negatives {corpus.path} --encoder DIR|hashing"
    try:
        made = NegativeTable.load(path)
    except FileNotFoundError:
        raise ValueError(f"{corpus.path} has no table of negatives; {again}") from None
    if made.metadata.get("digest") != digest(corpus.reports):
        raise ValueError(f"{path} was made for other reports than the corpus has now; {again}")
    table = made.table
    if table.dtype != np.int32 or table.ndim != 2 or not table.size or table.min() < 0 or table.max() >= len(table):
        raise ValueError(f"{path} is damaged: it holds no table of reports; {again}")
    if len(table) != len(corpus.reports):
        raise ValueError(f"{path} is damaged: {len(table)} rows for {len(corpus.reports)} reports; {again}")
    return made
