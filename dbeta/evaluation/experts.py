"""CODE-test: the gold standard and the human and DNN rows of Table 5, recomputed from the annotation files."""

import csv
from pathlib import Path

import numpy as np

from dbeta.evaluation.label_sets import label_set
from dbeta.evaluation.metrics import AucTable, macro_auc

EXPERTS = {  # as Table 5 heads its columns
    "cardiology_residents": "Cardio Resident",
    "emergency_residents": "Emergency Resident",
    "medical_students": "Medical Student",
    "dnn": "DNN",
}


def read_annotations(path: Path) -> np.ndarray:
    """Targets bool [827, 6] in the order of the label set.

    Columns are found by name: ``dnn.csv`` opens with an unnamed index column, and read by position its AUC drops from
    0.966 to 0.487.

    Raises:
        ValueError: the file or one of the six columns is missing.
    """
    labels = label_set("code-test").labels
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return np.array([[float(row[label]) > 0.5 for label in labels] for row in rows], bool)
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: {error!r}; CODE-test annotations have the columns {', '.join(labels)}") from None


def expert_tables(folder: Path, **options) -> dict[str, AucTable]:
    """AUC of each reader of Table 5 against the gold standard.

    Args:
        folder: the ``annotations`` folder of CODE-test.
        options: of ``metrics.macro_auc``.
    """
    gold = read_annotations(folder / "gold_standard.csv")
    labels = label_set("code-test").labels
    return {
        title: macro_auc(read_annotations(folder / f"{name}.csv").astype(float), gold, labels, **options)
        for name, title in EXPERTS.items()
    }
