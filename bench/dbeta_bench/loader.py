"""Records per second from disk to a batch: a ``wfdb.rdrecord`` loop, the reference engine, DALI on the CPU and the GPU.

Every way reads the same random 10 s records, from the page cache, and they take turns. The wfdb loop, in one process or
in two, reads them as WFDB files (format 16, 500 Hz) to float64 mV and makes no batch; the engines read them from a
corpus, at 500 Hz (batches stay int16) and at another rate (decoded and resampled to float32 mV).
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dbeta.data.corpus import Corpus
from dbeta.data.corpus_writer import Options, Plan, write_corpus
from dbeta.data.loader import RATE_HZ, make_loader
from dbeta.data.records import LEADS, Record
from dbeta_kernels import extension

BATCH = 64
Way = Callable[[float], tuple[int, float]]  # reads for some seconds; (records, seconds they took)


def run(
    *,
    device: str = "cpu",
    rates: tuple[int, ...] = (500, 250, 1000),
    threads: tuple[int, ...] | None = None,
    engines: tuple[str, ...] = ("reference", "dali"),
    records: int = 512,
    turns: int = 5,
    seconds: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of median records/s per rate, engine and threads; the share of what copying the shards alone reaches.

    Args:
        device: a GPU adds DALI's GPU pipeline (batches end on the GPU) to the CPU's.
        threads: 1, 2 and all cores where not given.
        seconds: of each turn; the first turn is not counted.
    """
    if "dali" in engines:
        try:
            extension.load_dali()
        except ImportError as error:
            say(f"without dali: {error}")
            engines = tuple(engine for engine in engines if engine != "dali")
    threads = threads or tuple(sorted({1, 2, os.cpu_count() or 1}))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, _Processes(2) as pool:
        folder = Path(name)
        stems = write_wfdb(folder / "wfdb", records)
        for rate in rates:
            write_corpus(_plan(records, rate), Options(source="noise"), folder / str(rate), workers=1)
            corpus = Corpus.open(folder / str(rate))
            ways: dict[tuple[str, str, int], Way] = {
                ("copy", d, 1): partial(_copy, corpus, d) for d in dict.fromkeys(("cpu", device))
            }
            if rate == RATE_HZ:
                ways["wfdb", "cpu", 1] = partial(_wfdb_loop, stems)
                ways["wfdb", "cpu", 2] = partial(pool.wfdb, stems)
            for engine in engines:
                for where in ("cpu", device) if device.startswith("cuda") and engine == "dali" else ("cpu",):
                    _agree(corpus, engine, where)
                    for count in threads:
                        loader = make_loader(corpus, ids=np.arange(records), batch=BATCH, engine=engine,
                                             workers=count, device=where)  # fmt: skip
                        ways[engine, where, count] = partial(_engine, loader)
            speeds: dict[tuple[str, str, int], list[float]] = {way: [] for way in ways}
            for _ in range(turns + 1):
                for way, read in ways.items():
                    done, spent = read(seconds)
                    speeds[way].append(done / spent)
            median = {way: statistics.median(found[1:]) for way, found in speeds.items()}
            mib = 12 * 10 * rate * 2 / 2**20
            for (engine, where, count), speed in median.items():
                row = {
                    "benchmark": "loader", "rate_hz": rate, "engine": engine, "device": where, "threads": count,
                    "records_per_s": speed, "mib_per_s": speed * mib, "of_copy": speed / median["copy", where, 1],
                }  # fmt: skip
                if ("wfdb", "cpu", 1) in median:
                    row["x_wfdb_1"] = speed / median["wfdb", "cpu", 1]
                    row["x_wfdb_2"] = speed / median["wfdb", "cpu", 2]
                rows.append(row)
                say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return rows


def write_wfdb(folder: Path, count: int) -> list[str]:
    """``count`` WFDB records of format 16; their paths without extension."""
    folder.mkdir(parents=True)
    for record in random_records(({"number": i} for i in range(count)), RATE_HZ):
        record.adc.T.tofile(folder / f"{record.name}.dat")
        lines = [f"{record.name} 12 {RATE_HZ} {record.adc.shape[1]}"]
        lines += [f"{record.name}.dat 16 1000.0(0)/mV 16 0 0 0 0 {lead}" for lead in LEADS]
        (folder / f"{record.name}.hea").write_text("\n".join(lines) + "\n")
    return [str(folder / f"r{i}") for i in range(count)]


def random_records(rows: Any, rate_hz: int) -> Iterator[Record]:
    """Records of 10 s of noise; decoding takes the same time whatever they hold."""
    for row in rows:
        number = row["number"]
        adc = np.random.default_rng(number).integers(-3000, 3000, (12, 10 * rate_hz), dtype=np.int16)
        yield Record(name=f"r{number}", adc=adc, rate_hz=rate_hz, gain=np.full(12, 1000.0),
                     baseline=np.zeros(12, np.int32), subject=f"s{number}", report="noise")  # fmt: skip


def _plan(count: int, rate_hz: int) -> Plan:
    return Plan(table=pa.table({"number": np.arange(count)}), read=partial(random_records, rate_hz=rate_hz))


def _agree(corpus: Corpus, engine: str, device: str) -> None:
    """No engine is timed that does not give what the reference gives."""
    got, expected = (
        next(make_loader(corpus, ids=np.arange(BATCH), batch=BATCH, shuffle=False, engine=e, device=d)).to("cpu")
        for e, d in ((engine, device), ("reference", "cpu"))
    )
    same = (
        torch.equal(got.adc, expected.adc) if corpus.uniform else torch.allclose(got.signal, expected.signal, atol=1e-4)
    )
    if not same:
        raise ArithmeticError(f"{engine} on {device} does not give the reference's batch; no time is printed")


def _until(seconds: float, read: Callable[[], int]) -> tuple[int, float]:
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += read()
    return done, time.perf_counter() - start


def _engine(loader: Any, seconds: float) -> tuple[int, float]:
    for _ in range(len(loader.ahead)):
        next(loader)  # what it read ahead while others had their turn was not read in this time
    return _until(seconds, lambda: len(next(loader).records))


def _copy(corpus: Corpus, device: str, seconds: float) -> tuple[int, float]:
    """Whole shards into one buffer, and on to a GPU: what the page cache, or the disk, and the bus give one thread."""
    on_gpu = device.startswith("cuda")
    buffer = torch.empty(corpus.shard_path(0).stat().st_size, dtype=torch.uint8, pin_memory=on_gpu)
    with corpus.shard_path(0).open("rb", buffering=0) as file:

        def read() -> int:
            file.seek(0)
            file.readinto(buffer.numpy())
            buffer.to(device)
            return len(corpus)

        return _until(seconds, read)


def _wfdb_loop(stems: list[str], seconds: float) -> tuple[int, float]:
    import wfdb

    left = cycle(stems)

    def read() -> int:
        for stem in islice(left, 8):
            wfdb.rdrecord(stem)
        return 8

    return _until(seconds, read)


class _Processes:
    """A wfdb loop in each of several processes, which stay alive between turns."""

    def __init__(self, count: int):
        self.count, self.pool = count, ProcessPoolExecutor(count, mp_context=get_context("spawn"))

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def wfdb(self, stems: list[str], seconds: float) -> tuple[int, float]:
        """The sum over the processes, each reading its own part at the same time."""
        jobs = [self.pool.submit(_wfdb_loop, stems[i :: self.count], seconds) for i in range(self.count)]
        found = [job.result() for job in jobs]
        return sum(done for done, _ in found), max(spent for _, spent in found)
