"""Exact search of the farthest vectors: the 64 smallest cosines of each report among all others (paper 3.4).

Two engines give the same answer: FAISS (``faiss.knn`` on a CPU, ``faiss.knn_gpu`` where the module has it) and a
blocked matrix product of torch, which is also the oracle of the tests. All arithmetic is float32: the cosines of
neighbouring ranks differ by 1e-5 and less, which neither TF32 nor bf16 can tell apart.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dbeta.runtime import announce, track

Engine = Literal["auto", "faiss", "torch"]
GROUP = 128  # columns whose minimum decides together whether any of them can be among the smallest
TIE = 2.0**-21  # cosines closer than this count as equal: float32 products of the same rows differ by up to 3e-7


def smallest_products(
    queries: Tensor, keys: Tensor, k: int, engine: Engine = "auto", what: str = ""
) -> tuple[Tensor, Tensor]:
    """For each query the ``k`` keys of smallest inner product, ascending.

    Args:
        queries: float32 [Q, d].
        keys: float32 [N, d], on the same device, N >= k.
        what: shown beside the progress bar; empty for none.

    Returns:
        (float32 [Q, k] products, int64 [Q, k] key numbers).

    Raises:
        ValueError: FAISS is asked for and not there, or has no GPU build for tensors on a GPU.
    """
    search, block = ENGINES[resolve_engine(engine, queries, keys, k)]
    rows = block(keys)
    starts = range(0, len(queries), rows)
    if what:
        starts = track(starts, what)
    products = torch.empty(len(queries), k, device=keys.device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=keys.device)
    with _no_tf32():
        for start in starts:
            part = slice(start, start + rows)
            products[part], found[part] = search(queries[part], keys, k)
    return products, found


def farthest_others(
    unit: Tensor,
    candidates: Tensor,
    k: int,
    engine: Engine = "auto",
    seed: int = 0,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row of ``unit`` the ``k`` other candidate rows of smallest cosine, ascending; never the row itself.

    Where several candidates share the k-th cosine, a seeded hash of the pair decides who is in, so that no report is a
    negative of many others merely because of its number.

    Args:
        unit: float32 [R, d] of norm 1.
        candidates: int64 [C], ascending, the rows that may be found; k < C.
        offset: float32 [C], added to the cosine with each candidate (local scaling).

    Returns:
        (float32 [R, k] scores, int64 [R, k] row numbers).
    """
    queries, keys = unit, unit if len(candidates) == len(unit) else unit[candidates]
    if offset is not None:  # one more dimension carries the offset, and both engines stay inner products
        queries = torch.cat((queries, queries.new_ones(len(queries), 1)), 1)
        keys = torch.cat((keys, offset[:, None]), 1)
    # One place more for the row itself and one more to see whether the k-th score is shared.
    scores, found = smallest_products(queries, keys, min(k + 2, len(keys)), engine, "searching")
    own = candidates[found] == torch.arange(len(unit), device=unit.device)[:, None]
    order = own.int().argsort(dim=1, stable=True)  # the row itself, if found, goes last
    scores, found = scores.gather(1, order), found.gather(1, order)
    if scores.shape[1] > k:
        shared = ((scores[:, k] - scores[:, k - 1] <= TIE) & ~own.gather(1, order)[:, k]).nonzero()[:, 0]
        for rows in shared.split(_torch_rows(keys) // 4 + 1):
            scores[rows, :k], found[rows, :k] = _break_ties(queries, keys, candidates, rows, k, seed)
    return scores[:, :k], candidates[found[:, :k]]


def _break_ties(
    queries: Tensor, keys: Tensor, candidates: Tensor, rows: Tensor, k: int, seed: int
) -> tuple[Tensor, Tensor]:
    """All clearly below the k-th score, then those equal to it by (hash of row) xor (hash of candidate).

    That is another order for every row, and costs one xor per pair.
    """
    words = torch.randint(2**30, (len(queries),), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    words = words.to(keys.device)
    with _no_tf32():
        scores = queries[rows] @ keys.T
    scores.masked_fill_(candidates == rows[:, None], torch.inf)
    last = _smallest(scores, k)[0][:, -1:]  # of these very products: the engine's may be rounded otherwise
    rank = words[rows, None] ^ words[candidates]
    rank.masked_fill_(scores > last + TIE, 2**31 - 1).masked_fill_(scores < last - TIE, -1)
    found = _smallest(rank, k)[1]
    chosen, order = scores.gather(1, found).sort(dim=1)
    return chosen, found.gather(1, order)


def resolve_engine(engine: Engine, queries: Tensor, keys: Tensor, k: int) -> str:
    """``auto``: the engine that is faster here, measured on a few queries and announced."""
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine {engine!r}; accepted: auto, {', '.join(ENGINES)}")
    cuda = keys.device.type == "cuda"
    lacking = _faiss_lacks(cuda)
    if engine == "faiss" and lacking:
        raise ValueError(f"--engine faiss: {lacking}; or use --engine torch")
    if engine != "auto":
        return engine
    if lacking:
        announce(f"N3S search: torch's blocked product ({lacking})")
        return "torch"
    probe, among = queries[:256], keys[: max(65_536, k)]
    if len(queries) <= len(probe):
        return "faiss"  # over before a measurement would be
    times = dict.fromkeys(ENGINES, float("inf"))
    for turn in range(4):  # in turns, the best of each: another process must not decide
        for name, (search, _) in ENGINES.items():
            start = time.perf_counter()
            search(probe if turn else probe[:8], among, k)[0][0, 0].item()  # at first: libraries load, buffers are made
            if turn:
                times[name] = min(times[name], time.perf_counter() - start)
    best = min(times, key=times.get)
    if len(keys) > len(among):
        shown = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
        announce(f"N3S search: {best}, the faster for {len(probe)} of {len(queries)} queries ({shown})")
    return best


def _faiss_lacks(cuda: bool) -> str:
    """What is missing for FAISS to search here, and how to get it; empty if nothing."""
    if importlib.util.find_spec("faiss") is None:
        return f"FAISS is not installed: pip install dbeta[{'faiss-gpu' if cuda else 'faiss'}]"
    import faiss

    if cuda and not hasattr(faiss, "knn_gpu"):
        return "this FAISS has no GPU build: pip uninstall faiss-cpu, then pip install dbeta[faiss-gpu]"
    return ""


def _faiss_search(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    if keys.device.type == "cuda":
        import faiss.contrib.torch_utils  # knn_gpu then takes tensors

        products, ids = faiss.knn_gpu(_gpu_resources(), -queries, keys, k, metric=faiss.METRIC_INNER_PRODUCT)
        return -products, ids
    products, ids = faiss.knn((-queries).numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(np.negative(products, out=products)), torch.from_numpy(ids)


def _gpu_resources():
    import faiss

    if not hasattr(_gpu_resources, "kept"):
        _gpu_resources.kept = faiss.StandardGpuResources()
    return _gpu_resources.kept


def _torch_search(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    whole = -(-len(keys) // GROUP) * GROUP
    scores = torch.empty(len(queries), whole, device=keys.device)
    scores[:, len(keys) :] = torch.inf
    torch.mm(queries, keys.T, out=scores[:, : len(keys)])
    return _smallest(scores, k)


def _smallest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k smallest of each row, ascending.

    The k smallest lie in the k groups of columns with the smallest minima, so that all but a few columns are read once.
    """
    groups = scores.shape[1] // GROUP
    if scores.shape[1] % GROUP or groups < 2 * k:
        return scores.topk(k, dim=1, largest=False)
    grouped = scores.unflatten(1, (groups, GROUP))
    near = grouped.amin(-1).topk(k, dim=1, largest=False).indices
    candidates = grouped.gather(1, near[..., None].expand(-1, -1, GROUP)).flatten(1)
    values, at = candidates.topk(k, dim=1, largest=False)
    return values, near.gather(1, at // GROUP) * GROUP + at % GROUP


def _torch_rows(keys: Tensor) -> int:
    """Queries at once, so that their scores take 128 MiB of host or 4 GiB of GPU memory."""
    budget = 2**32 if keys.device.type == "cuda" else 2**27
    return max(budget // (4 * len(keys) + 1), 1)


ENGINES: dict[str, tuple[Callable, Callable[[Tensor], int]]] = {
    "faiss": (_faiss_search, lambda keys: 4096),
    "torch": (_torch_search, _torch_rows),
}


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept
