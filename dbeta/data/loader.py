"""From a corpus to batches of ECGs. The order is a function of (seed, epoch, position), the same for every engine.

An epoch is a permutation of the split; batch k of it takes the next ``batch`` records, of which rank r of ``world``
reads its equal share: the global batches do not depend on the number of ranks. What is left at the end of an epoch,
less than a batch, is dropped when repeating.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dbeta.data.corpus import Corpus
from dbeta.data.resample import inputs_for, resample
from dbeta.runtime import announce

RATE_HZ, SAMPLES = 500, 5000
ENGINES = ("auto", "dali", "reference")
INVALID = np.iinfo(np.int16).min  # also fills a short record: exactly 0 mV


@dataclass(kw_only=True, slots=True)
class RawBatch:
    """Records as they are read: integers where all are int16 at 500 Hz, else millivolts. B rows of this rank."""

    records: Tensor  # int64 [B]
    adc: Tensor | None = None  # int16 [B,12,5000]
    gain: Tensor | None = None  # float32 [B,12], units per mV
    baseline: Tensor | None = None  # float32 [B,12]
    signal: Tensor | None = None  # float32 [B,12,5000] mV

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, which: slice) -> Self:
        """Some of the rows."""
        return self._map(lambda tensor: tensor[which])

    def pin(self) -> Self:
        """A copy in pinned memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Any) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else change(value) for name, value in values.items()})


class Order:
    """Which records make up each batch of this rank; its state is a few integers.

    Raises:
        ValueError: fewer records than a batch, or a batch that does not divide over the ranks.
    """

    def __init__(self, ids: np.ndarray, batch: int, seed: int, *, shuffle: bool, repeat: bool, rank: int, world: int):
        if batch % world:
            raise ValueError(f"train.batch = {batch} does not divide over {world} ranks; use a multiple of {world}")
        if repeat and len(ids) < batch:
            raise ValueError(f"the split has {len(ids)} records, fewer than train.batch = {batch}; use a smaller batch")
        self.ids, self.batch, self.seed = ids, batch, seed
        self.shuffle, self.repeat = shuffle, repeat
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)
        self.epoch = self.position = 0
        self._permuted: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next records of this rank, int64 [batch / world]; the last batch without repetition may be smaller."""
        batches = len(self.ids) // self.batch if self.repeat else -(-len(self.ids) // self.batch)
        if self.position >= batches:
            if not self.repeat:
                raise StopIteration
            self.epoch, self.position = self.epoch + 1, 0
        low = self.position * self.batch
        self.position += 1
        return self._epoch()[low : low + self.batch][self.share]

    def _epoch(self) -> np.ndarray:
        if not self.shuffle:
            return self.ids
        if self._permuted is None or self._permuted[0] != self.epoch:
            self._permuted = self.epoch, np.random.default_rng((self.seed, self.epoch)).permutation(self.ids)
        return self._permuted[1]

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, and of which order."""
        return {"epoch": self.epoch, "position": self.position, **self._identity}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from ``state_dict``.

        Raises:
            ValueError: the state is that of other records, another batch size or seed.
        """
        if other := [name for name, value in self._identity.items() if state.get(name) != value]:
            had = ", ".join(f"{name} {state.get(name)} (now {self._identity[name]})" for name in other)
            raise ValueError(f"the loader's state is of another order: {had}; use the same corpus and settings")
        self.epoch, self.position = state["epoch"], state["position"]

    @property
    def _identity(self) -> dict[str, int]:
        return {"records": len(self.ids), "batch": self.batch, "seed": self.seed}


class ReferenceLoader:
    """The plain engine, numpy and threads: the oracle of every other one."""

    def __init__(self, corpus: Corpus, order: Order, *, workers: int, device: str = "cpu"):
        self.corpus, self.order = corpus, order
        self.pinned = torch.device(device).type == "cuda"
        self.gain = torch.from_numpy(corpus.column("gain").astype(np.float32))
        self.baseline = torch.from_numpy(corpus.column("baseline").astype(np.float32))
        self.rate_hz, self.samples = corpus.column("rate_hz"), corpus.column("samples")
        self.pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="dbeta-loader")
        self.ahead: deque[tuple[Future, dict[str, int]]] = deque()
        self.depth = max(workers, 1) + 1
        self.state = order.state_dict()

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        """The next batch; an unreadable record raises the ValueError that names it."""
        while len(self.ahead) < self.depth:
            try:
                records = next(self.order)
            except StopIteration:
                break
            self.ahead.append((self.pool.submit(self._read, records), self.order.state_dict()))
        if not self.ahead:
            raise StopIteration
        future, self.state = self.ahead.popleft()
        return future.result()

    def state_dict(self) -> dict[str, int]:
        """Where the batch after the last one handed out begins."""
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from ``state_dict``: the next batches are those that would have come."""
        self._drop()
        self.order.load_state_dict(state)
        self.state = state

    def close(self) -> None:
        """Stop the workers; what they had read ahead is dropped."""
        self._drop()
        self.pool.shutdown(wait=True)

    def _drop(self) -> None:
        for future, _ in self.ahead:
            future.cancel()
        self.ahead.clear()

    def _read(self, records: np.ndarray) -> RawBatch:
        ids = torch.from_numpy(np.ascontiguousarray(records))
        if self.corpus.uniform:
            adc = np.empty((len(records), 12, SAMPLES), np.int16)
            for row, record in zip(adc, records):
                length = min(self.samples[record], SAMPLES)
                self.corpus.read_into(record, row[:, :length])
                row[:, length:] = INVALID
            batch = RawBatch(records=ids, adc=torch.from_numpy(adc), gain=self.gain[ids], baseline=self.baseline[ids])
        else:
            batch = RawBatch(records=ids, signal=torch.from_numpy(np.stack([self._millivolts(r) for r in records])))
        return batch.pin() if self.pinned else batch

    def _millivolts(self, record: int) -> np.ndarray:
        rate_hz = float(self.rate_hz[record])
        adc = self.corpus.read_adc(record, inputs_for(SAMPLES, rate_hz))
        gain, baseline = self.gain[record].numpy()[:, None], self.baseline[record].numpy()[:, None]
        valid = adc != np.iinfo(adc.dtype).min
        signal = np.where(valid, (adc - baseline) / gain, 0).astype(np.float32)
        signal = resample(signal, rate_hz)[:, :SAMPLES]
        return np.pad(signal, ((0, 0), (0, SAMPLES - signal.shape[1])))


def make_loader(
    corpus: Corpus,
    *,
    split: str = "train",
    ids: np.ndarray | None = None,
    batch: int,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    engine: str = "auto",
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    device: str = "cpu",
) -> Any:
    """Batches of the first 10 s of each record at 500 Hz, as ``RawBatch`` in host memory.

    Args:
        ids: records to read; None: those of ``split``.
        batch: global batch size, over all ranks.
        repeat: go on with another permutation after an epoch; else stop after one, the last batch maybe smaller.
        engine: ``dali`` (fast), ``reference`` (plain) or ``auto``: DALI where it is installed, announced.

    Raises:
        ValueError: too few records, an uneven batch, or an engine that is not here.
    """
    if engine not in ENGINES:
        raise ValueError(f"data.engine = {engine!r}; accepted: {', '.join(ENGINES)}")
    ids = corpus.split_ids(split) if ids is None else np.asarray(ids)
    order = Order(ids, batch, seed, shuffle=shuffle, repeat=repeat, rank=rank, world=world)
    if engine != "reference":
        try:
            from dbeta.data.dali import DaliLoader

            return DaliLoader(corpus, order, workers=workers, device=device)
        except ImportError as error:
            if engine == "dali":
                raise ValueError(f"data.engine=dali: {error}") from None
            announce(f"loader: the reference engine; the faster one, DALI, is not here: {error}")
    return ReferenceLoader(corpus, order, workers=workers, device=device)
