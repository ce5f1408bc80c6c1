"""``dbeta prepare``: the raw records of a data set to a corpus."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dbeta.data import sources, sources_code, sources_wfdb
from dbeta.data.corpus_writer import Options, Plan, Row, write_corpus
from dbeta.data.records import Record

SYNTHETIC_RECORDS = 4000
SOURCES: dict[str, Callable[[Path], Plan]] = {
    "mimic-iv-ecg": sources.mimic_iv_ecg,
    "ptb-xl": sources.ptb_xl,
    "cpsc2018": sources_wfdb.cpsc2018,
    "csn": sources_wfdb.csn,
    "cinc2021": sources_wfdb.cinc2021,
    "ptb": sources_wfdb.ptb,
    "code-test": sources_code.code_test,
    "code-15": sources_code.code_15,
    "sph": sources_code.sph,
}


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

    Args:
        limit: read only this many records, the first of the data set (synthetic: make this many).
        seed: of the order on disk, of the split where the data set has none, and of synthetic records.
        cleaning: of the reports, ``paper`` or ``released``.

    Raises:
        ValueError: the root does not hold that data set, or ``out`` cannot be used.
    """
    import click

    options = Options(source=source, limit=limit, seed=seed, cleaning=cleaning)
    if source == "synthetic":
        plan, options = synthetic(limit or SYNTHETIC_RECORDS, seed), replace(options, validation=0.1)
    else:
        if source not in SOURCES:
            raise ValueError(f"source {source!r}; accepted: {', '.join([*SOURCES, 'synthetic'])}")
        if root is None or not Path(root).is_dir():
            raise ValueError(f"ROOT {root or 'is not given and'} is no folder; give the one that holds {source}")
        root = Path(root).resolve()
        plan, options = SOURCES[source](root), replace(options, root=str(root))
        if limit:
            plan = replace(plan, table=plan.table.slice(0, limit))
    info = write_corpus(plan, options, Path(out), workers=workers)
    splits = ", ".join(f"{count:,} {name}" for name, count in info["splits"].items())
    click.echo(
        f"{out}: {info['records']:,} records ({splits or 'none'}) of {info['subjects']:,} subjects, "
        f"{info['reports']:,} reports; {info['rejected']:,} rejected, {info['repaired']:,} repaired (rejected.csv)",
        err=True,
    )
    return info


def synthetic(count: int, seed: int) -> Plan:
    """The built-in corpus of ``count`` records; they are independent, so their order needs no shuffling."""
    table = pa.table({"number": pa.array(np.arange(count))})
    return Plan(table=table, read=partial(read_synthetic, seed=seed), shuffle=False)


def read_synthetic(rows: list[Row], *, seed: int) -> Iterator[Record]:
    """Consecutive records of the corpus of ``seed``."""
    from dbeta.data.synthetic import generate

    for low in range(0, len(rows), 128):
        block = [row["number"] for row in rows[low : low + 128]]
        made = generate(len(block), seed=seed, start=block[0])
        for i, number in enumerate(block):
            yield Record(
                name=f"synthetic-{number:07d}", adc=made.adc[i], rate_hz=made.rate, gain=np.full(12, float(made.gain)),
                baseline=np.full(12, made.baseline, np.int32), subject=made.subjects[i], report=made.reports[i],
                labels=made.labels[i],
            )  # fmt: skip
