"""Metrics of the evaluation suite: macro AUC with bootstrap intervals, and retrieval of a record's own report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

Interval = tuple[float, float]
UNKNOWN: Interval = (float("nan"), float("nan"))


@dataclass(frozen=True, kw_only=True)
class AucTable:
    """AUC per class and their mean; what could not be measured is named, never silently averaged away."""

    macro: float  # mean over the classes that were measured; nan if there are none
    interval: Interval  # of the macro mean
    per_class: dict[str, float]
    intervals: dict[str, Interval]
    positives: dict[str, int]  # of every class, measured or not
    replicas: np.ndarray  # float64, the macro mean of each resample
    left_out: dict[str, str] = field(default_factory=dict)  # class -> "no positives" or "no negatives"

    def __str__(self) -> str:
        low, high = self.interval
        out = f"; left out: {', '.join(f'{n} ({why})' for n, why in self.left_out.items())}" if self.left_out else ""
        return f"macro AUC {self.macro:.4f} [{low:.4f}, {high:.4f}] over {len(self.per_class)} classes{out}"


def macro_auc(
    scores: np.ndarray,
    targets: np.ndarray,
    names: Sequence[str],
    *,
    groups: Sequence | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> AucTable:
    """Area under the ROC curve of each class, and the mean over classes.

    A class without positives or without negatives has no AUC: it is left out of the mean and named in ``left_out``.
    Intervals are percentiles over bootstrap resamples of the records, or of whole ``groups`` (patients, whose records
    are not independent). A resample that loses all positives of a class skips that class, as the mean itself does.

    Args:
        scores: float [N, C], higher means more likely; any monotone scale (no softmax, no sigmoid needed).
        targets: bool [N, C].
        names: the C class names.
        groups: N patient ids; None: every record is its own group.
        bootstrap: number of resamples; 0 gives no intervals (nan).

    Raises:
        ValueError: shapes that do not fit, or scores that are not finite.
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, bool)
    if scores.ndim != 2 or scores.shape != targets.shape or scores.shape[1] != len(names):
        raise ValueError(
            f"scores {scores.shape}, targets {targets.shape} and {len(names)} names must agree as [N, C], [N, C], C"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; the features they come from are broken")
    counts = targets.sum(0)
    left_out = {n: "no positives" for n, c in zip(names, counts) if c == 0}
    left_out |= {n: "no negatives" for n, c in zip(names, counts) if c == len(targets) and c > 0}
    weights = resample_counts(len(scores), groups, bootstrap, seed)
    per_class, intervals, replicas = {}, {}, []
    for index, name in enumerate(names):
        if name in left_out:
            continue
        area, *again = _weighted_auc(scores[:, index], targets[:, index], weights)
        per_class[name] = float(area)
        intervals[name] = percentile_interval(np.array(again), level)
        replicas.append(again)
    macro = float(np.mean(list(per_class.values()))) if per_class else float("nan")
    means = _nanmean(np.array(replicas)) if replicas else np.empty(0)
    return AucTable(
        macro=macro,
        interval=percentile_interval(means, level),
        per_class=per_class,
        intervals=intervals,
        positives={name: int(count) for name, count in zip(names, counts)},
        left_out=left_out,
        replicas=means,
    )


def bootstrap_interval(
    values: np.ndarray, *, groups: Sequence | None = None, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of a mean of per-record values (an accuracy, say), resampling records or whole groups."""
    values = np.asarray(values, np.float64)
    weights = resample_counts(len(values), groups, bootstrap, seed)[1:]
    return percentile_interval(weights @ values / weights.sum(1), level)


def retrieval(
    ecg_features, text_features, report_ids, ks: Iterable[int] = (1, 5, 10)
) -> dict[str, float]:  # arrays or CPU tensors
    """Share of ECGs whose own report is among the k reports of largest dot product: ``recall_at_k``.

    Records with the same report share one candidate, so an identical report counts as correct and does not crowd out
    others. Ties count against the model: features that are all equal find nothing.

    Args:
        ecg_features: float [N, D].
        text_features: float [N, D], row i the features of record i's report.
        report_ids: int [N]; equal ids are identical reports.
    """
    ecg, text = np.asarray(ecg_features, np.float32), np.asarray(text_features, np.float32)
    _, first, own = np.unique(np.asarray(report_ids), return_index=True, return_inverse=True)
    candidates = text[first]
    ranks = np.empty(len(ecg), np.int64)
    for start in range(0, len(ecg), 1024):
        rows = slice(start, start + 1024)
        similarity = ecg[rows] @ candidates.T
        mine = np.take_along_axis(similarity, own[rows, None], 1)
        ranks[rows] = (similarity >= mine).sum(1)  # 1 where nothing else is as near
    return {f"recall_at_{k}": float((ranks <= k).mean()) for k in ks}


def resample_counts(records: int, groups: Sequence | None, bootstrap: int, seed: int) -> np.ndarray:
    """float32 [1 + bootstrap, N]: how often each resample holds each record; the first row is the sample itself."""
    if groups is None:
        group, count = np.arange(records), records
    else:
        names, group = np.unique(np.asarray(groups), return_inverse=True)
        count = len(names)
    generator = np.random.default_rng(seed)
    weights = np.ones((1 + bootstrap, records), np.float32)
    for row in weights[1:]:
        row[:] = np.bincount(generator.integers(count, size=count), minlength=count)[group]
    return weights


def _weighted_auc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [R]: P(positive above negative) + P(tie) / 2 under each row of record weights; nan where undefined."""
    order = np.argsort(scores, kind="stable")
    ranked, positive = scores[order], np.flatnonzero(targets[order])
    negative = 1.0 - targets[order]
    lower, upper = (np.searchsorted(ranked, ranked[positive], side) for side in ("left", "right"))
    areas = np.full(len(weights), np.nan)
    for first in range(0, len(weights), 32):  # a block that stays in the cache
        block = weights[first : first + 32].take(order, axis=1).astype(np.float64)
        mine = block[:, positive]
        below = np.zeros((len(block), len(scores) + 1))
        np.cumsum(block * negative, 1, out=below[:, 1:])
        wins = (mine * (below[:, lower] + below[:, upper])).sum(1) / 2
        pairs = mine.sum(1) * below[:, -1]
        np.divide(wins, pairs, out=areas[first : first + 32], where=pairs > 0)
    return areas


def _nanmean(replicas: np.ndarray) -> np.ndarray:
    """Mean over the classes [C, R] that a resample still has; a resample without any is dropped."""
    known = np.isfinite(replicas)
    some = known.any(0)
    return np.where(known, replicas, 0).sum(0)[some] / known.sum(0)[some]


def percentile_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """The central ``level`` of the values that are finite; nan if none is."""
    values = values[np.isfinite(values)]
    if not len(values):
        return UNKNOWN
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
