"""Zero-shot classification (paper 4.1.2, Tables 3, 5, 12, 13): a class is scored by its description alone.

Score = raw dot product of the tanh-pooled ECG feature and the feature of the lower-cased description, each description
encoded on its own. No softmax: the classes are not exclusive.
"""

from collections.abc import Sequence

import numpy as np

from dbeta.evaluation.metrics import AucTable, macro_auc


def auc_table(
    ecg_features, prompt_features, targets: np.ndarray, names: Sequence[str], **options
) -> AucTable:  # features: arrays or CPU tensors
    """AUC of each class and their mean with bootstrap intervals.

    Args:
        ecg_features: float [N, D].
        prompt_features: float [C, D], one row per class.
        targets: bool [N, C].
        names: the C classes.
        options: of ``metrics.macro_auc``.
    """
    scores = np.asarray(ecg_features, np.float32) @ np.asarray(prompt_features, np.float32).T
    return macro_auc(scores, targets, names, **options)
