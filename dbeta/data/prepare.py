"""``dbeta prepare``: the raw records of a data set to a corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from dbeta.data.corpus_writer import Plan, write_corpus
from dbeta.data.records import Record
from dbeta.data.sources import mimic_iv_ecg, ptb_xl

SOURCES = {"mimic-iv-ecg": mimic_iv_ecg, "ptb-xl": ptb_xl}


def prepare(
    source: str,
    root: Path | None,
    out: Path,
    *,
    workers: int = 2,
    limit: int | None = None,
    seed: int = 0,
    cleaning: str = "paper",
) -> dict[str, Any]:
    """Read ``source`` below ``root`` and write the corpus ``out``; returns the content of corpus.json.

    Raises:
        ValueError: the root does not hold that data set, or ``out`` cannot be used.
    """
    if source == "synthetic":
        plan, refused = synthetic_plan(limit or 4000, seed, cleaning), []
    else:
        if root is None or not Path(root).is_dir():
            raise ValueError(f"ROOT {root or 'is not given and'} is no folder; give the one that holds {source}")
        plan, refused = SOURCES[source](Path(root), seed, cleaning)
        if limit:
            plan = replace(plan, tasks=plan.tasks[:limit])
    info = write_corpus(plan, Path(out), workers=workers, rejected=refused)
    splits = ", ".join(f"{count:,} {name}" for name, count in info["splits"].items())
    click.echo(
        f"{out}: {info['records']:,} records ({splits}) of {info['subjects']:,} subjects, {info['reports']:,} reports; "
        f"{info['rejected']:,} rejected, {info['repaired']:,} repaired (rejected.csv)",
        err=True,
    )
    return info


def synthetic_plan(count: int, seed: int, cleaning: str) -> Plan:
    """The built-in corpus of ``count`` records; a tenth of the subjects are held out."""
    read = partial(read_synthetic, seed=seed)
    return Plan(
        source="synthetic", tasks=range(count), read=read, seed=seed, cleaning=cleaning, shuffle=False, validation=0.1
    )


def read_synthetic(tasks: Sequence[int], *, seed: int) -> Iterator[Record]:
    """Consecutive records of the corpus of ``seed``."""
    from dbeta.data.synthetic import generate

    for low in range(0, len(tasks), 128):
        block = tasks[low : low + 128]
        made = generate(len(block), seed=seed, start=block[0])
        for i, number in enumerate(block):
            yield Record(
                name=f"synthetic-{number:07d}", adc=made.adc[i], rate_hz=made.rate, gain=np.full(12, made.gain),
                baseline=np.full(12, made.baseline), subject=made.subjects[i], report=made.reports[i],
                labels=made.labels[i],
            )  # fmt: skip
