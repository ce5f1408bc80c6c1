"""Zero-shot under distribution shift (Tables 4 and 11).

Nothing is trained, so a "shift" from source to target is the mean, over the target's classes that match a class of the
source, of the same per-class zero-shot AUCs as in the target's own table.

Table 11 lists STDD (ST depression) under CD, beside block diagnoses, probably a slip for STTC. The mean over target
classes is the same either way, so it is kept as printed.
"""

from collections.abc import Sequence

import numpy as np

from dbeta.evaluation.metrics import AucTable, macro_auc

# Table 11: class of the first set -> matching classes of the second.
MATCHES: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("ptbxl-super", "cpsc2018"): {
        "HYP": (),
        "NORM": ("NORM",),
        "CD": ("1AVB", "CRBBB", "CLBBB"),
        "MI": (),
        "STTC": ("STE", "STD"),
    },
    ("ptbxl-super", "csn"): {
        "HYP": ("RVH", "LVH"),
        "NORM": ("SR",),
        "CD": ("2AVB", "2AVB1", "1AVB", "AVB", "LBBB", "RBBB", "STDD"),
        "MI": ("MI",),
        "STTC": ("STTC", "STE", "TWO", "STTU", "QTIE", "TWC"),
    },
    ("cpsc2018", "csn"): {
        "AFIB": ("AFIB",),
        "VPC": ("VPB",),
        "NORM": ("SR",),
        "1AVB": ("1AVB",),
        "CRBBB": ("RBBB",),
        "STE": ("STE",),
        "PAC": ("APB",),
        "CLBBB": ("LBBB",),
        "STD": ("STE", "STTC", "STTU", "STDD"),
    },
}
SETS = ("ptbxl-super", "cpsc2018", "csn")
PAIRS = tuple((source, target) for source in SETS for target in SETS if source != target)


def matching_classes(source: str, target: str) -> tuple[str, ...]:
    """Classes of the target that match some class of the source: Table 11 read in either direction.

    Raises:
        ValueError: a pair that Table 11 does not have.
    """
    if (source, target) in MATCHES:
        return tuple(dict.fromkeys(label for labels in MATCHES[source, target].values() for label in labels))
    if (target, source) in MATCHES:
        return tuple(label for label, labels in MATCHES[target, source].items() if labels)
    raise ValueError(f"no category matching from {source} to {target}; sets: {', '.join(SETS)}")


def shift_table(
    scores: np.ndarray, targets: np.ndarray, names: Sequence[str], source: str, target: str, **options
) -> AucTable:
    """Zero-shot AUC on the target's matching classes; ``options`` of ``metrics.macro_auc``."""
    matching = matching_classes(source, target)
    columns = [index for index, label in enumerate(names) if label in matching]
    return macro_auc(scores[:, columns], targets[:, columns], [names[column] for column in columns], **options)
