"""The score of the PhysioNet/CinC Challenge 2021, from its table of weights.

For N records with true and predicted sets of classes, A[j, k] sums 1 / |true or predicted| over records with j true and
k predicted, and observed = sum of W * A. With correct (the truth predicted) and inactive (sinus rhythm always):

    score = (observed - inactive) / (correct - inactive)
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbeta.evaluation.label_sets import LabelSet
from dbeta.evaluation.metrics import Interval, percentile_interval, resample_counts

SINUS_RHYTHM = "426783006"


@dataclass(frozen=True, kw_only=True)
class ChallengeWeights:
    """The challenge's reward for predicting class k where class j is true; equal codes are one class."""

    classes: tuple[frozenset[str], ...]  # SNOMED CT codes that count as the same diagnosis
    weights: np.ndarray  # float64 [C, C]

    @classmethod
    def read(cls, path: Path) -> "ChallengeWeights":
        """Read ``weights.csv`` (its cells are codes, merged ones joined by ``|``), or the one in a folder.

        Raises:
            ValueError: no such file, or not a square table with the same classes on both sides.
        """
        path = path / "weights.csv" if path.is_dir() else path
        try:
            with path.open(newline="") as file:
                header, *rows = list(csv.reader(file))
            columns = [frozenset(cell.split("|")) for cell in header[1:]]
            names = [frozenset(row[0].split("|")) for row in rows]
            values = np.array([[float(cell) for cell in row[1:]] for row in rows])
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}: {error}; --scoring DIR must hold weights.csv of physionetchallenges/evaluation-2021"
            ) from None
        if (
            columns != names
            or values.shape != (len(names), len(names))
            or len(set().union(*names)) != sum(map(len, names))
        ):
            raise ValueError(f"{path} is not a square table of distinct classes")
        if not any(SINUS_RHYTHM in codes for codes in names):
            raise ValueError(f"{path} has no sinus rhythm ({SINUS_RHYTHM}), the inactive prediction")
        return cls(classes=tuple(names), weights=values)

    def ordered_as(self, labels: LabelSet) -> np.ndarray:
        """The weights [C, C] with classes in the order of a label set.

        Raises:
            ValueError: the set's classes are not those of the table.
        """
        wanted = [frozenset(codes) for codes in labels.codes.values()]
        if set(wanted) != set(self.classes):
            raise ValueError(f"the classes of {labels.key} are not those of the weight table")
        order = [self.classes.index(codes) for codes in wanted]
        return self.weights[np.ix_(order, order)]


def challenge_score(
    truth: np.ndarray,
    predicted: np.ndarray,
    weights: np.ndarray,
    sinus: int,
    *,
    groups: Sequence | None = None,
    bootstrap: int = 0,
) -> tuple[float, Interval]:
    """The normalised score and its bootstrap interval: 1 for the truth, 0 for sinus rhythm everywhere.

    Where the truth itself is worth no more than sinus rhythm (no record has a scored code, say) the score is 0, as in
    the challenge's own evaluation.

    Args:
        truth: bool [N, C]; a record none of whose codes is scored is all False, and rewards nothing.
        predicted: bool [N, C].
        weights: float [C, C], rows true, columns predicted.
        sinus: column of sinus rhythm.
        groups: N patient ids, resampled whole.

    Raises:
        ValueError: shapes that do not fit.
    """
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.ndim != 2 or truth.shape != predicted.shape or weights.shape != (truth.shape[1],) * 2:
        raise ValueError(f"truth {truth.shape}, predicted {predicted.shape} and weights {weights.shape} do not fit")
    inactive = np.zeros_like(truth)
    inactive[:, sinus] = True
    low, high, found = (record_rewards(truth, guess, weights) for guess in (inactive, truth, predicted))
    counts = resample_counts(len(truth), groups, bootstrap, seed=0).astype(np.float64)
    gained, possible = counts @ (found - low), counts @ (high - low)
    scores = np.divide(gained, possible, out=np.zeros(len(counts)), where=possible != 0)
    return float(scores[0]), percentile_interval(scores[1:])


def record_rewards(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What each record adds to the unnormalised score, float64 [N]."""
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    union = np.maximum(np.maximum(truth, predicted).sum(1), 1)
    return ((truth @ weights) * predicted).sum(1) / union
