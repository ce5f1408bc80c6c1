"""What the paper reports for D-BETA, in per cent, to stand beside our own figures (ICML 2025)."""

LEADS = ("12", "P-6", "P-3", "P-2", "P-1")
IDENTIFICATION = "Physionet2021-Id."  # as Table 9 calls it: the set is cinc2021, as that of Physionet2021-Dx.
FRACTIONS = (0.01, 0.1, 1.0)
SIX = ("ptbxl-super", "ptbxl-sub", "ptbxl-form", "ptbxl-rhythm", "cpsc2018", "csn")  # averaged in Tables 3 and 6-8

# (task, data set, lead set or None, fraction or None) -> (table, value)
Key = tuple[str, str, str | None, float | None]


def _values() -> dict[Key, tuple[int, float]]:
    values: dict[Key, tuple[int, float]] = {}
    for lead, dx, ident in zip(LEADS, (85.7, 81.1, 84.2, 81.9, 76.5), (65.4, 57.3, 60.5, 57.7, 41.1)):
        values["finetune", "cinc2021", lead, None] = (1, dx)
        values["identify", "cinc2021", lead, None] = (1, ident)
    probes = {
        "ptbxl-super": (83.15, 88.36, 90.11),
        "ptbxl-sub": (77.74, 82.92, 85.15),
        "ptbxl-form": (70.10, 78.91, 83.98),
        "ptbxl-rhythm": (86.61, 92.83, 96.71),
        "cpsc2018": (85.46, 91.35, 94.92),
        "csn": (80.04, 87.36, 90.71),
    }
    for key, row in probes.items():
        for fraction, value in zip(FRACTIONS, row):
            values["linear-probe", key, "12", fraction] = (2, value)
    zero_shot = {"ptbxl-super": 76.2, "ptbxl-sub": 75.9, "ptbxl-form": 66.1, "ptbxl-rhythm": 88.6, "cpsc2018": 80.1}
    for key, value in (zero_shot | {"csn": 76.3}).items():
        values["zero-shot", key, "12", None] = (3, value)
    values["zero-shot", "average", "12", None] = (3, 77.1)
    values["zero-shot", "code-test", "12", None] = (5, 96.79)
    shift = {
        ("ptbxl-super", "cpsc2018"): 72.09,
        ("ptbxl-super", "csn"): 79.11,
        ("cpsc2018", "ptbxl-super"): 77.12,
        ("cpsc2018", "csn"): 82.91,
        ("csn", "ptbxl-super"): 76.24,
        ("csn", "cpsc2018"): 80.10,
    }
    for (source, target), value in shift.items():
        values["shift", f"{source}>{target}", "12", None] = (4, value)
    return values | {("experts", reader, "12", None): (5, value) for reader, value in EXPERTS.items()}


# Table 5: readers of CODE-test. Recomputed from the annotation files by ``experts.expert_tables``.
EXPERTS = {"Cardio Resident": 92.07, "Emergency Resident": 90.52, "Medical Student": 93.61, "DNN": 96.59}
VALUES = _values()

# Tables 6-8: mean and spread over tasks of fine-tuning (CinC), linear probing at 1 % and zero-shot by category name.
ABLATIONS = {
    "default": ((81.88, 3.52), (80.52, 6.08), (72.50, 9.01)),
    "without-n3s": ((80.93, 3.74), (78.29, 6.19), (70.61, 8.10)),
    "without-n3s-ets": ((78.29, 3.87), (67.19, 6.14), None),
    "without-n3s-ets-t5": ((76.81, 3.96), (63.50, 6.95), None),
    "text-medcpt": ((81.02, 3.61), (79.57, 6.32), (71.81, 9.14)),
    "text-deberta": ((79.23, 3.65), (78.24, 6.21), (70.67, 9.88)),
    "text-bert": ((78.08, 3.91), (77.58, 6.49), (69.14, 9.97)),
    "ecg-layers-4": ((77.63, 4.14), (70.17, 7.60), (70.64, 8.63)),
    "ecg-layers-1": ((69.40, 4.55), (66.83, 7.52), (69.43, 9.51)),
}

# Tables 12 and 13: zero-shot with descriptions.
ZERO_SHOT_ABLATIONS = {
    "without-etm": {"ptbxl-super": 73.2, "ptbxl-form": 65.8, "csn": 76.6, "code-test": 96.2},
    "without-mlm-mem": {"ptbxl-super": 70.3, "ptbxl-form": 67.4, "csn": 74.5, "code-test": 94.6},
}


def paper_value(
    task: str, dataset: str, leads: str | None = None, fraction: float | None = None
) -> tuple[int, float] | None:
    """(table, per cent) of D-BETA in the paper, or None where it reports nothing for this case."""
    return VALUES.get((task, dataset, leads, fraction))
