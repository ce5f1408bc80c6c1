"""N3S: embedding the reports, the exact search, and the draw, against the released way of drawing a negative.

The released pipeline (MODEL section 12, RECIPE 3) runs the language model on the text, parses the map of all texts
again and searches the index for every single negative. Here a table is built once, and a draw is an index.

Reports are synthetic and all different. Flan-T5-small has its true shape and random weights, as time does not depend on
them; its tokens are those of a tokenizer trained on the reports.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dbeta.data import farthest
from dbeta.data.embedding import hash_embedding, mean_token, unit
from dbeta.data.negatives import REMEDIES, build_negatives
from dbeta.data.reports import TokenTable, normalise
from dbeta.data.synthetic_draws import LABELS, RHYTHMS
from dbeta.data.synthetic_reports import write_report
from dbeta.data.tokenizer import train
from dbeta_kernels import philox

WIDTH = 512
BATCH = 128
WALLS = ("anterior", "inferior", "lateral")


def run(
    *,
    device: str = "cpu",
    reports: tuple[int, ...] = (),
    engines: tuple[str, ...] = ("faiss", "torch"),
    queries: int = 1024,
    whole: bool = False,
    k: int = 64,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of embed, search and draw for each number of reports, and of hubness by remedy for the first.

    Args:
        reports: 10,000 where not given.
        engines: those that are not installed are left out, and said so.
        queries: reports that are searched for; the row's ``table_s`` scales their time to all reports.
        whole: also build each whole table in a process of its own, with its time and peak memory.
    """
    where = torch.device(device)
    lacking = farthest._faiss_lacks(where.type == "cuda")
    if "faiss" in engines and lacking:
        say(f"without faiss: {lacking}")
        engines = tuple(name for name in engines if name != "faiss")
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append({"benchmark": "negatives", "device": device, "threads": torch.get_num_threads(), **row})
        say("  ".join(f"{name} {_shown(value)}" for name, value in row.items()))

    reports = reports or (10_000,)
    for count in reports:
        texts = unique_reports(count)
        start = time.perf_counter()
        embedded = hash_embedding(texts, WIDTH)
        seconds = time.perf_counter() - start
        add(stage="embed", encoder="hashing", reports=count, seconds=seconds, reports_per_s=count / seconds)
        vectors = embedded.to(where)
        for row in _search_rows(vectors, engines, min(queries, count), k):
            add(stage="search", reports=count, **row)
        if count == reports[0]:
            add(**_encoder_row(texts, where))
            for remedy in REMEDIES:
                made = build_negatives(vectors, k, engine=engines[0], remedy=remedy)
                add(
                    stage="hubness",
                    reports=count,
                    remedy=remedy,
                    cosine=float(made.similarity.mean()),
                    **made.metadata["hubness"],
                )
        add(**_draw_row(count, k, where))
        add(**_released_row(texts, embedded, k))
        for engine in engines if whole else ():
            add(**whole_table(count, k, engine, device))
    return rows


def unique_reports(count: int, seed: int = 0) -> list[str]:
    """``count`` different normalised reports of 1-7 statements in the language of the synthetic corpus."""
    draw = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        severity = np.zeros(len(LABELS))
        severity[draw.integers(len(RHYTHMS))] = 1
        others = draw.choice(np.arange(len(RHYTHMS), len(LABELS)), draw.integers(0, 6), replace=False)
        severity[others] = draw.uniform(0.02, 1, len(others))
        walls = list(draw.choice(WALLS, 3))
        text = write_report(
            severity, draw.integers(35, 180), walls, draw.integers(2), draw.integers(0, 5), draw.random(48)
        )
        found[normalise(text)] = None
    return list(found)


def _search_rows(vectors: torch.Tensor, engines: tuple[str, ...], queries: int, k: int) -> list[dict[str, Any]]:
    """Engines take turns; none is timed that does not find what the matrix product in float64 finds."""
    truth = vectors[:64].double() @ vectors.double().T
    for engine in engines:
        products, ids = farthest.smallest_products(vectors[:64], vectors, k, engine)
        best = truth.topk(k, largest=False).values
        if (truth.gather(1, ids).sort().values - best.sort().values).abs().max() > 1e-6:
            raise ArithmeticError(f"{engine} does not find the {k} smallest cosines; no time is printed")
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(3):
        for engine in engines:
            start = time.perf_counter()
            products, _ = farthest.smallest_products(vectors[:queries], vectors, k + 2, engine)
            products[-1, -1].item()
            times[engine].append(time.perf_counter() - start)
    flops = 2.0 * queries * vectors.numel()
    return [
        {"engine": engine, "queries": queries, "seconds": (best := statistics.median(spent)),
         "table_s": best * len(vectors) / queries, "gflops": flops / best / 1e9}
        for engine, spent in times.items()
    ]  # fmt: skip


def _small_t5() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32128}
    return T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()


def _encoder_row(texts: list[str], device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    texts = texts if cuda else texts[:256]
    model = _small_t5().to(device, torch.bfloat16 if cuda else torch.float32)
    table = TokenTable.build(texts, train(texts)).to(device)
    mean_token(model, TokenTable(table.ids, table.offsets[:65]), 4096)
    start = time.perf_counter()
    mean_token(model, table, 65_536 if cuda else 4096)[0, 0].item()
    seconds = time.perf_counter() - start
    return {
        "stage": "embed", "encoder": "flan-t5-small (random weights)", "reports": len(texts), "seconds": seconds,
        "reports_per_s": len(texts) / seconds, "mean_tokens": table.lengths.float().mean().item(),
    }  # fmt: skip


def _draw_row(count: int, k: int, device: torch.device) -> dict[str, Any]:
    """A batch's negatives as ``BatchMaker.texts`` draws them."""
    table = torch.randint(count, (count, k), dtype=torch.int32, device=device)
    rows = torch.arange(BATCH, device=device)
    spent = []
    for step in range(200):
        start = time.perf_counter()
        word = philox.words(0, philox.NEGATIVE_PICK, step, rows, 1)[:, 0]
        table[rows, word % k].long()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    seconds = statistics.median(spent)
    return {
        "stage": "draw",
        "provider": "table",
        "reports": count,
        "negatives": BATCH,
        "us_per_negative": seconds / BATCH * 1e6,
    }


def _released_row(texts: list[str], embedded: torch.Tensor, k: int) -> dict[str, Any]:
    """Language model + map + search for one negative at a time, on the host, as the release does it."""
    model, tokenizer = _small_t5(), train(texts[:2000])
    engine = "torch" if farthest._faiss_lacks(False) else "faiss"
    spent = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps(dict(enumerate(texts))))
        for text in texts[:9]:
            start = time.perf_counter()
            query = unit(model(input_ids=torch.tensor(tokenizer.encode_batch([text]))).last_hidden_state.mean(1))
            farthest.smallest_products(query, embedded, k, engine)
            json.loads(path.read_text())
            spent.append(time.perf_counter() - start)
    seconds = statistics.median(spent[1:])
    return {
        "stage": "draw", "provider": "encoder + map + search", "reports": len(texts), "negatives": 1,
        "us_per_negative": seconds * 1e6,
    }  # fmt: skip


def whole_table(count: int, k: int = 64, engine: str = "auto", device: str = "cpu") -> dict[str, Any]:
    """One table from texts to arrays, in a process of its own, so that the peak memory is that of the table."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_whole_table, (count, k, engine, device, torch.get_num_threads()))


def _whole_table(count: int, k: int, engine: str, device: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    texts = unique_reports(count)
    start, processor = time.perf_counter(), time.process_time()
    vectors = hash_embedding(texts, WIDTH).to(device)
    middle = time.perf_counter()
    made = build_negatives(vectors, k, engine=engine)
    end = time.perf_counter()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "stage": "whole table", "reports": count, "engine": made.metadata["engine"], "embed_s": middle - start,
        "search_s": end - middle, "processor_s": time.process_time() - processor,
        "peak_host_gb": int(status["VmHWM"].split()[0]) * 1024 / 1e9,
        **made.metadata["hubness"],
    }  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
