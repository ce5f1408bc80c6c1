"""A corpus and a model small enough to reason about, with the interface the evaluation reads."""

from pathlib import Path

import numpy as np


class FakeCorpus:
    """Columns in memory."""

    def __init__(self, source, names, labels, *, subjects=None, splits=None, path="corpus"):
        self.source, self.path = source, Path(path)
        self.columns = {
            "name": list(names),
            "labels": [list(held) for held in labels],
            "subject": list(subjects or names),
            "split": list(splits or ["train"] * len(names)),
        }
        self.labels = sorted({label for held in labels for label in held})

    def column(self, name, ids=None):
        values = self.columns[name]
        return values if ids is None else [values[i] for i in np.asarray(ids)]
