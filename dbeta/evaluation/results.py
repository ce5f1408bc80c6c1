"""Results of the evaluation: one row per figure, beside the paper's, kept so that a killed run goes on."""

import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from dbeta.evaluation.label_sets import all_label_sets, label_set
from dbeta.evaluation.metrics import AucTable
from dbeta.evaluation.paper import VALUES, paper_value

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

    @property
    def paper(self) -> tuple[int, float] | None:
        """(table, value as a share) of the paper for the same case; seeds are ours alone."""
        other = self.metric != METRICS.get(self.task, "macro AUC") or self.prompts == "names"
        if other or (self.fraction is not None and self.seed is not None):
            return None
        found = paper_value(self.task, self.dataset, self.leads, self.fraction)
        return found and (found[0], found[1] / 100)

    def as_row(self) -> dict[str, Any]:
        """A flat row with the paper's value and the difference."""
        table, theirs = self.paper or (None, None)
        known = theirs is not None and self.value is not None
        return dataclasses.asdict(self) | {
            "paper_table": table,
            "paper": theirs,
            "difference": self.value - theirs if known else None,
        }


def from_table(table: AucTable, **fields: Any) -> Result:
    """A macro AUC as a result; its value is None where no class has both positives and negatives."""
    return Result(
        value=as_json(table.macro), low=as_json(table.interval[0]), high=as_json(table.interval[1]),
        classes=len(table.per_class), left_out="; ".join(f"{name}: {why}" for name, why in table.left_out.items()),
        **fields,
    )  # fmt: skip


def not_run(results: Iterable[Result], tasks: Iterable[str]) -> list[Result]:
    """The paper's figures of these tasks that ``results`` do not answer."""
    done = {(r.task, r.dataset, r.leads, r.fraction) for r in results if r.paper is not None and r.value is not None}
    titles = {key: label_set(key).title for key in all_label_sets()}
    return [
        Result(
            task=task, dataset=dataset, title=titles.get(dataset, dataset), leads=leads or "", fraction=fraction,
            metric=METRICS.get(task, "macro AUC"), note="not run",
        )
        for task, dataset, leads, fraction in VALUES
        if task in tasks and (task, dataset, leads, fraction) not in done
    ]  # fmt: skip


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
        if path.is_file():
            return [Result(**row) for row in json.loads(path.read_text())["results"]]
        results, details = work(path.with_suffix(""))
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        stored = {"key": key, "results": [dataclasses.asdict(result) for result in results], "details": details}
        partial.write_text(json.dumps(stored, indent=1, default=str))
        os.replace(partial, path)
        return results


def class_details(table: AucTable) -> dict[str, dict[str, Any]]:
    """AUC, interval and positives by class, as JSON."""
    return {
        name: {
            "auc": table.per_class.get(name),
            "interval": [as_json(v) for v in table.intervals.get(name, ())],
            "positives": count,
            "left_out": table.left_out.get(name),
        }
        for name, count in table.positives.items()
    }


def write(results: list[Result], out: Path) -> None:
    """``results.csv`` and ``results.json``."""
    rows = [result.as_row() for result in results]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / "results.json").write_text(json.dumps(rows, indent=1))


def show(results: list[Result]) -> Group:
    """What a person reads, one table per task: ours in per cent with its interval, the paper's, the difference."""
    notes: dict[str, str] = {}
    parts: list[Any] = []
    shown = [r for r in results if r.fraction is None or r.seed is None]  # single seeds are in the files
    for task, metric in dict.fromkeys((result.task, result.metric) for result in shown):
        title = f"{task}, {metric}, per cent"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("data set", "leads", "train", "ours", "95 %", "paper", "diff", "notes"):
            table.add_column(column, justify="right" if column in ("train", "ours", "diff") else "left", no_wrap=True)
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
        f"{paper} T{row['paper_table']}" if paper else "",
        "" if row["difference"] is None else f"{100 * row['difference']:+.2f}",
        " ".join(letters),
    ]


def as_json(value: float) -> float | None:
    """The number; None for nan, which JSON does not have."""
    return None if value != value else float(value)
