"""Benchmark results as JSON: where and when they were measured, rows by benchmark, and the comparison of two."""

import contextlib
import datetime
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dbeta.runtime import environment

Row = dict[str, Any]


def document(device: str, benchmarks: dict[str, list[Row]]) -> dict[str, Any]:
    """The rows with device, driver, versions, commit and date."""
    described = environment()
    gpu = torch.device(device).type == "cuda"
    return {
        "device": described["gpu"] if gpu else described["cpu"],
        "driver": _driver() if gpu else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **described,
        "benchmarks": benchmarks,
    }


def save(path: Path, results: dict[str, Any]) -> None:
    """Write ``results``, one row a line, through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=1, default=str) + "\n")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Results written by ``save``.

    Raises:
        ValueError: the file holds something else.
    """
    results = None
    with contextlib.suppress(ValueError):  # not JSON, or not even text
        results = json.loads(path.read_text())
    if not isinstance(results, dict) or "benchmarks" not in results:
        raise ValueError(f"{path} holds no benchmark results; give a file written by dbeta-bench --out")
    return results


def compare(new: dict[str, Any], old: dict[str, Any]) -> Iterator[str]:
    """A line per row found in both: its figures, new over old. What is not a float names a row."""
    if new["device"] != old["device"]:
        yield f"note: measured on different devices, {new['device']} and {old['device']}"
    for benchmark, rows in new["benchmarks"].items():
        earlier = {_identity(row): row for row in old["benchmarks"].get(benchmark, [])}
        for row in rows:
            name = _identity(row)
            if name not in earlier:
                yield f"{benchmark} {' '.join(name)}: not in the older results"
                continue
            figures = [
                f"{key} {earlier[name][key]:.4g} -> {value:.4g} ({value / earlier[name][key]:.2f}x)"
                for key, value in row.items()
                if isinstance(value, float) and isinstance(earlier[name].get(key), float) and earlier[name][key]
            ]
            yield f"{benchmark} {' '.join(name)}: {', '.join(figures)}"


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(v) for k, v in row.items() if not isinstance(v, float) and v is not None and k != "timed")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
