"""The evaluation data sets in float files: CODE-test, CODE-15 and SPH. Stored as integers of 1 uV."""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from dbeta.data.corpus_writer import Plan, Row
from dbeta.data.formats import (
    MAX_EXAMS,
    ROUNDING_UV,
    STANDARD,
    Raw,
    bounded,
    count_exams,
    from_code15,
    from_float,
    load_mat,
    read_sph,
    read_tracings,
    trim,
)  # fmt: skip
from dbeta.data.records import LIMB_ORDERS, Record, Rejection, limb_residual
from dbeta.data.sources import checked, read_csv, task_table

CODE_HZ = 400.0
CLASSES = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")
FACTS = {"rounding_uv": ROUNDING_UV}


def code_test(root: Path) -> Plan:
    """CODE-test: ``ecg_tracings.hdf5`` [827, 4096, 12] in 1e-4 V with annotations/gold_standard.csv.

    Record i is exam i. The zero padding stays, as the published protocol resamples the padded tracing. The order of
    aVR, aVL and aVF contradicts itself in the set's own texts, so Einthoven's and Goldberger's equations decide it.
    """
    found = [path for path in (root / "ecg_tracings.hdf5", root / "data" / "ecg_tracings.hdf5") if path.is_file()]
    gold = next(iter(sorted(root.rglob("gold_standard.csv"))), None)
    if not found or gold is None:
        raise ValueError(f"ROOT {root} needs ecg_tracings.hdf5 (from Zenodo) and annotations/gold_standard.csv")
    labels = read_csv(gold, *CLASSES).to_pylist()
    exams = _exams(found[0])
    if exams != len(labels):
        raise ValueError(f"{found[0]} holds {exams} exams, {gold} {len(labels)}; they must be the same")
    order = vote_limb_order(read_tracings(found[0], range(exams), units_per_mv=10.0))
    names = _names_of(order)
    file = found[0].relative_to(root).as_posix()
    rows = [
        {"name": f"{i:04d}", "subject": f"{i:04d}", "path": f"{file}#{i}", "split": "test",
         "labels": [name for name in CLASSES if row[name].strip() in ("1", "1.0", "True")]}
        for i, row in enumerate(labels)
    ]  # fmt: skip
    read = partial(_read_tracings, root=root, names=names, units_per_mv=10.0, trimmed=False)
    return Plan(table=task_table(rows), read=read, facts=FACTS | {"lead_order": list(names)})


def vote_limb_order(exams: Iterator[np.ndarray], enough: int = 100) -> list[int]:
    """How stored limb leads are to be taken to be I II III aVR aVL aVF: the order that fits most exams best.

    Raises:
        ValueError: no order fits even half of the exams.
    """
    votes: dict[tuple[int, ...], int] = {}
    counted = 0
    for mv in exams:
        limb = mv[:6] - mv[:6].mean(axis=1, keepdims=True)
        if not limb.any(axis=1).all():
            continue
        best = min(LIMB_ORDERS, key=lambda order, limb=limb: limb_residual(limb[order]))
        votes[tuple(best)] = votes.get(tuple(best), 0) + 1
        counted += 1
        if counted == enough:
            break
    winner = max(votes, key=votes.get, default=None)
    if winner is None or votes[winner] * 2 <= counted:
        raise ValueError(f"no order of the limb leads fits the {counted} exams; is the file CODE-test's?")
    return list(winner)


def _exams(path: Path) -> int:
    try:
        exams = count_exams(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a CODE file: {error}") from None
    if exams is None:
        raise ValueError(f"{path} is not a CODE file: it holds no tracings")
    return exams


def read_exam(path: Path, row: int) -> Raw:
    """One exam of a CODE-15 or CODE-test file, without the zeros that pad it.

    Raises:
        ValueError: there is no such exam.
    """
    exams = count_exams(path)
    if exams is None or not 0 <= row < exams:
        raise ValueError(f"no exam {row}: the file holds {exams or 0:,}")
    names, units_per_mv = _exam_form(path, path.stat().st_mtime_ns)
    return trim(from_float(next(read_tracings(path, [row], units_per_mv=units_per_mv)), CODE_HZ, names))


@lru_cache(maxsize=64)
def _exam_form(path: Path, _changed: int) -> tuple[tuple[str, ...], float]:
    """Lead names and units per mV of a CODE file: CODE-15 names its exams, CODE-test does not."""
    import h5py

    with h5py.File(path) as file:
        exams, named = len(file["tracings"]), "exam_id" in file
    if named:
        return STANDARD, 1.0
    order = vote_limb_order(read_tracings(path, range(exams), units_per_mv=10.0))
    return _names_of(order), 10.0


def _names_of(order: list[int]) -> tuple[str, ...]:
    """Lead names of stored signals of which ``order`` picks I II III aVR aVL aVF."""
    return tuple(np.array(STANDARD)[np.argsort(order)].tolist()) + STANDARD[6:]


def code_15(root: Path) -> Plan:
    """CODE-15: exams.csv with exams_partN.hdf5, or exams re-saved as .mat with meta.csv; labels are the six classes."""
    if (root / "exams.csv").is_file():
        return _code_15_parts(root)
    exams = read_csv(root / "meta.csv", "save_file", "patient_id", *CLASSES).to_pylist()
    rows = []
    for exam in exams:
        rows.append(
            {"name": Path(exam["save_file"]).stem, "path": exam["save_file"], "subject": exam["patient_id"],
             "labels": [name for name in CLASSES if exam[name] == "True"]}
        )  # fmt: skip
    return Plan(table=task_table(rows), read=partial(_read_files, root=root, kind="code-15"), facts=FACTS)


def _code_15_parts(root: Path) -> Plan:
    import h5py

    places = {}
    for path in sorted(root.glob("exams_part*.hdf5")):
        try:
            with h5py.File(path) as file:
                ids = bounded(file, "exam_id")[: MAX_EXAMS + 1].tolist()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a CODE-15 file: {error}") from None
        if len(ids) > MAX_EXAMS:
            raise ValueError(f"{path} is not a CODE-15 file: it names more than {MAX_EXAMS:,} exams")
        places |= {str(exam): f"{path.name}#{row}" for row, exam in enumerate(ids)}
    rows = []
    for exam in read_csv(root / "exams.csv", "exam_id", "patient_id", *CLASSES).to_pylist():
        place = places.get(exam["exam_id"])
        task = {"name": exam["exam_id"], "path": place, "subject": exam["patient_id"]}
        task["labels"] = [name for name in CLASSES if exam[name] == "True"]
        rows.append(task if place else task | {"refused": "missing signal file", "detail": "in no exams_part*.hdf5"})
    read = partial(_read_tracings, root=root, names=STANDARD, units_per_mv=1.0, trimmed=True)
    return Plan(table=task_table(rows), read=read, facts=FACTS)


def sph(root: Path) -> Plan:
    """SPH: metadata.csv and float16 HDF5 records; labels are the AHA codes (``22+308`` is a code with a modifier)."""
    folder = "records/" if (root / "records").is_dir() else ""
    rows = []
    for exam in read_csv(root / "metadata.csv", "ECG_ID", "AHA_Code", "Patient_ID").to_pylist():
        name = exam["ECG_ID"].removesuffix(".h5")
        rows.append(
            {"name": name, "path": f"{folder}{name}.h5", "subject": exam["Patient_ID"],
             "labels": [code for code in exam["AHA_Code"].split(";") if code]}
        )  # fmt: skip
    return Plan(table=task_table(rows), read=partial(_read_files, root=root, kind="sph"), facts=FACTS)


def _read_files(rows: list[Row], *, root: Path, kind: str) -> Iterator[Record | Rejection]:
    read = read_sph if kind == "sph" else lambda path: trim(from_code15(load_mat(path)))
    for row in rows:
        yield checked(row, read, root)


def _read_tracings(
    rows: list[Row], *, root: Path, names: tuple[str, ...], units_per_mv: float, trimmed: bool
) -> Iterator[Record | Rejection]:
    """Exams by ``FILE#ROW``."""

    def read(path: Path) -> Raw:
        file, _, exam = str(path).rpartition("#")
        mv = next(read_tracings(Path(file), [int(exam)], units_per_mv=units_per_mv))
        raw = from_float(mv, CODE_HZ, names)
        return trim(raw) if trimmed else raw

    for row in rows:
        yield checked(row, read, root)
