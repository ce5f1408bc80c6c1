"""Results of the evaluation: one row per figure, beside the paper's, kept so that a killed run goes on."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from dbeta.evaluation.label_sets import all_label_sets, label_set
from dbeta.evaluation.metrics import UNKNOWN, AucTable
from dbeta.evaluation.paper import EXPERTS, IDENTIFICATION, VALUES, paper_value
from dbeta.files import write_csv, write_whole
from dbeta.runtime import announce, environment

ORDER = ("zero-shot", "experts", "shift", "linear-probe", "finetune", "identify")  # of tables in a report
AVERAGE = "Average of six"  # Table 3's last column
METRICS = {"finetune": "CinC 2021 score", "identify": "top-1 accuracy"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure. Values are shares of 1; None where nothing was run."""

    task: str
    dataset: str
    title: str
    metric: str = "macro AUC"
    leads: str = "12"
    fraction: float | None = None  # of the training records
    seed: int | None = None  # None: deterministic, or the mean over seeds
    value: float | None = None
    low: float | None = None  # bootstrap 95 %
    high: float | None = None
    records: int = 0  # tested
    classes: int = 0  # measured
    left_out: str = ""  # classes that were not, and why
    split: str = ""  # published, corpus, derived by patient
    prompts: str = ""  # of zero-shot: descriptions, names or a file
    note: str = ""
    per_class: dict[str, dict[str, Any]] = field(default_factory=dict)  # class -> as ``class_details`` has it

    @property
    def paper(self) -> tuple[int, float] | None:
        """(table, value as a share) of the paper for the same case; seeds are ours alone."""
        other = self.metric != METRICS.get(self.task, "macro AUC") or self.prompts == "names"
        if other or (self.fraction is not None and self.seed is not None):
            return None
        found = paper_value(self.task, self.dataset, self.leads, self.fraction)
        return found and (found[0], round(found[1] / 100, 6))

    @property
    def case(self) -> tuple:
        """What there is one result of in a folder."""
        return self.task, self.dataset, self.metric, self.leads, self.fraction, self.seed, self.prompts

    def as_row(self) -> dict[str, Any]:
        """A flat row with the paper's value and the difference, without the classes."""
        table, theirs = self.paper or (None, None)
        known = theirs is not None and self.value is not None
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "per_class"}
        return mine | {
            "paper_table": table,
            "paper": theirs,
            "difference": self.value - theirs if known else None,
        }


def from_table(table: AucTable, **fields: Any) -> Result:
    """A macro AUC as a result; its value is None where no class has both positives and negatives."""
    return Result(
        value=as_json(table.macro), low=as_json(table.interval[0]), high=as_json(table.interval[1]),
        classes=len(table.per_class), left_out="; ".join(f"{name}: {why}" for name, why in table.left_out.items()),
        per_class=class_details(table), **fields,
    )  # fmt: skip


def not_run(results: Iterable[Result], tasks: Iterable[str]) -> list[Result]:
    """The paper's figures of these tasks that ``results`` do not answer; Table 5's readers belong to zero-shot."""
    done = {(r.task, r.dataset, r.leads, r.fraction) for r in results if r.paper is not None}
    wanted = {*tasks, *(["experts"] if "zero-shot" in tasks else [])}
    titles = {("identify", "cinc2021"): IDENTIFICATION, ("zero-shot", "average"): AVERAGE}
    titles |= {("experts", reader): expert_title(reader) for reader in EXPERTS}
    titles |= {(task, key): label_set(key).title for key in all_label_sets() for task in wanted - {"identify"}}
    return [
        Result(
            task=task, dataset=dataset, title=titles.get((task, dataset), dataset.replace(">", " > ")),
            leads=leads or "", fraction=fraction, metric=METRICS.get(task, "macro AUC"), note="not run",
        )
        for task, dataset, leads, fraction in VALUES
        if task in wanted and (task, dataset, leads, fraction) not in done
    ]  # fmt: skip


def expert_title(reader: str) -> str:
    """What a reader of Table 5 is called in a report."""
    return f"CODE-test, {reader}"


# Given a folder of its own for checkpoints, a piece of work returns results and details by class.
Work = Callable[[Path], tuple[list["Result"], dict[str, Any]]]


class Units:
    """Finished pieces of work in a folder, one JSON file each, found again by everything that decides their outcome."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str, key: dict[str, Any], work: Work) -> list[Result]:
        """The results of a unit, from its file or from doing the work."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{digest}.json"
        try:
            return [Result(**row) for row in json.loads(path.read_text())["results"]]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            announce(f"{path} is damaged ({error}): done again")
        results, details = work(path.with_suffix(""))
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = {"key": key, "results": [dataclasses.asdict(result) for result in results], "details": details}
        write_whole(path, json.dumps(stored, indent=1, default=str))
        return results


def class_details(table: AucTable) -> dict[str, dict[str, Any]]:
    """AUC, interval and positives by class, as JSON."""
    return {
        name: {
            "auc": table.per_class.get(name),
            "low": as_json(table.intervals.get(name, UNKNOWN)[0]),
            "high": as_json(table.intervals.get(name, UNKNOWN)[1]),
            "positives": count,
            "left_out": table.left_out.get(name),
        }
        for name, count in table.positives.items()
    }


def write(results: Iterable[Result], out: Path, *, model: str, checksum: str) -> list[Result]:
    """``results.csv``, ``results.json``: these, other cases of the model in ``out``, what is not run; ``classes.csv``.

    Args:
        model: what the user called it.
        checksum: of its weights; results of other weights are replaced (their units stay).

    Returns:
        All that was written.
    """
    cases = {result.case: result for result in (*_kept(out, checksum), *results)}
    whole = sorted(cases.values(), key=lambda result: ORDER.index(result.task))
    whole += not_run(whole, {result.task for result in whole})
    rows = [result.as_row() for result in whole]
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(out / "results.csv", rows)
    case = ("task", "dataset", "leads", "fraction", "seed", "prompts")
    classes = [
        {key: getattr(result, key) for key in case} | {"class": name} | details
        for result in whole
        for name, details in result.per_class.items()
    ]
    if classes:
        _write_csv(out / "classes.csv", classes)
    described = {"model": model, "checksum": checksum, "date": time.strftime("%Y-%m-%d"), **environment()}
    described["rows"] = [row | {"per_class": result.per_class} for row, result in zip(rows, whole)]
    write_whole(out / "results.json", json.dumps(described, indent=1))
    return whole


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    write_csv(path, [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])


def read(out: Path) -> tuple[str, list[Result]]:
    """The checksum of the model and its results in ``out``; empty where there are none.

    Raises:
        ValueError: results.json is not one of ours.
    """
    path, known = out / "results.json", {f.name for f in dataclasses.fields(Result)}
    try:
        stored = json.loads(path.read_text())
        rows = [Result(**{k: v for k, v in row.items() if k in known}) for row in stored["rows"]]
        return stored["checksum"], [row for row in rows if row.note != "not run"]
    except FileNotFoundError:
        return "", []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); move it away and evaluate again: the units are kept") from None


def _kept(out: Path, checksum: str) -> list[Result]:
    """Results of the same weights that are there already."""
    earlier, rows = read(out)
    if earlier not in ("", checksum):
        announce(f"{out} holds results of another model: results.* are replaced, its units and features are kept")
        return []
    return rows


def show(results: list[Result]) -> Group:
    """What a person reads, one table per task: ours in per cent with its interval, the paper's, the difference."""
    notes: dict[str, str] = {}
    parts: list[Any] = []
    shown = [r for r in results if r.fraction is None or r.seed is None]  # single seeds are in the files
    for task, metric in dict.fromkeys((result.task, result.metric) for result in shown):
        title = f"{task}, {metric}, per cent"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("data set", "leads", "train", "ours", "95 %", "classes", "paper", "diff", "notes"):
            table.add_column(
                column, justify="right" if column in ("train", "ours", "classes", "diff") else "left", no_wrap=True
            )
        for result in shown:
            if (result.task, result.metric) == (task, metric):
                table.add_row(*_cells(result, notes))
        parts.append(table)
    return Group(*parts, *(f"{letter}  {note}" for note, letter in notes.items()))


def _cells(result: Result, notes: dict[str, str]) -> list[str]:
    """The cells of a row; its notes become letters, explained below the tables."""
    row = result.as_row()
    ours, low, high, paper = (
        "" if row[name] is None else f"{100 * row[name]:.2f}" for name in ("value", "low", "high", "paper")
    )
    written = [note for note in result.note.split("; ") if note not in ("", "not run")]
    letters = [notes.setdefault(note, chr(ord("a") + len(notes) % 26)) for note in written]
    return [
        result.title,
        result.leads,
        "" if result.fraction is None else f"{100 * result.fraction:g} %",
        ours or ("not run" if result.note == "not run" else "no class"),
        f"{low}-{high}" if low else "",
        _measured(result),
        f"{paper} T{row['paper_table']}" if paper else "",
        "" if row["difference"] is None else f"{100 * row['difference']:+.2f}",
        " ".join(letters),
    ]


def _measured(result: Result) -> str:
    """How many of the classes the figure is of: 13/38 where 25 had no positives, say, in the tested records."""
    left_out = len(result.left_out.split("; ")) if result.left_out else 0
    return f"{result.classes}/{result.classes + left_out}" if result.classes + left_out and result.per_class else ""


def as_json(value: float) -> float | None:
    """The number; None for nan, which JSON does not have."""
    return None if value != value else float(value)
