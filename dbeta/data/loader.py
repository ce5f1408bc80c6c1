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
from dbeta.distributed import share_of
from dbeta.runtime import announce, warn

RATE_HZ, SAMPLES = 500, 5000
TRIES = 1000  # records after a corrupt one that may take its place
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
    replaced: int = 0  # rows whose record could not be read and in whose place another one is

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
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return type(self)(**values | changed)


class Order:
    """Which records make up each batch of this rank; its state is a few integers.

    Raises:
        ValueError: fewer records than a batch, or a batch that does not divide over the ranks.
    """

    def __init__(
        self,
        ids: np.ndarray,
        batch: int,
        seed: int,
        *,
        shuffle: bool,
        repeat: bool,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ):
        if repeat and len(ids) < batch:
            raise ValueError(f"the split has {len(ids)} records, fewer than train.batch = {batch}; use a smaller batch")
        self.share = share_of(batch, rank, world, parts).numpy()
        self.ids, self.batch, self.seed = ids, batch, seed
        self.shuffle, self.repeat = shuffle, repeat
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
        if self._permuted is None or self._permuted[0] != self.epoch:
            self._permuted = self.epoch, self._permutation(self.epoch)
        whole = self._permuted[1][low : low + self.batch]
        return whole[self.share[self.share < len(whole)]]

    def batch_of(self, step: int) -> np.ndarray:
        """All records of the global batch of a training step, int64 [batch]."""
        epoch, position = divmod(step, len(self.ids) // self.batch)
        return self._permutation(epoch)[position * self.batch :][: self.batch]

    def after(self, record: int) -> np.ndarray:
        """The records of the split that follow one, in a circle, without it."""
        place = int(np.flatnonzero(self.ids == record)[0])
        return np.roll(self.ids, -place)[1:]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.ids) if self.shuffle else self.ids

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
    """The plain engine, numpy and threads: the oracle of every other one.

    With ``skip`` a record that cannot be read is named, and the next one of its split that can be takes its place: a
    function of the record alone, as everything about a batch.
    """

    def __init__(self, corpus: Corpus, order: Order, *, workers: int, device: str = "cpu", skip: bool = False):
        self.corpus, self.order, self.skip = corpus, order, skip
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
            self.ahead.append((self.pool.submit(self.read, records), self.order.state_dict()))
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

    def read(self, records: np.ndarray) -> RawBatch:
        """The batch of these records; int64 [b]."""
        records, replaced = records.copy(), 0
        integer = self.corpus.uniform
        rows = np.empty((len(records), 12, SAMPLES), np.int16 if integer else np.float32)
        for place, record in enumerate(records.tolist()):
            try:
                self._fill(record, rows[place])
            except ValueError as error:
                if not self.skip:
                    raise
                records[place] = self._fill_other(record, rows[place], error)
                replaced += 1
        ids = torch.from_numpy(records)
        batch = RawBatch(records=ids, replaced=replaced)
        if integer:
            batch.adc, batch.gain, batch.baseline = torch.from_numpy(rows), self.gain[ids], self.baseline[ids]
        else:
            batch.signal = torch.from_numpy(rows)
        return batch.pin() if self.pinned else batch

    def _fill_other(self, record: int, row: np.ndarray, reason: ValueError) -> int:
        for other in self.order.after(record)[:TRIES].tolist():
            try:
                self._fill(other, row)
            except ValueError:
                continue
            warn(f"{reason}; record {other} takes its place (data.on_corrupt=skip)")
            return other
        raise ValueError(f"{reason}; nor can the {TRIES} records after it be read") from reason

    def _fill(self, record: int, row: np.ndarray) -> None:
        (self._integers if self.corpus.uniform else self._millivolts)(record, row)

    def _integers(self, record: int, row: np.ndarray) -> None:
        length = min(self.samples[record], SAMPLES)
        self.corpus.read_into(record, row[:, :length])
        row[:, length:] = INVALID

    def _millivolts(self, record: int, row: np.ndarray) -> None:
        rate_hz = float(self.rate_hz[record])
        adc = self.corpus.read_adc(record, inputs_for(SAMPLES, rate_hz))
        gain, baseline = self.gain[record].numpy()[:, None], self.baseline[record].numpy()[:, None]
        valid = adc != np.iinfo(adc.dtype).min
        signal = resample(np.where(valid, (adc - baseline) / gain, 0).astype(np.float32), rate_hz)[:, :SAMPLES]
        row[:, : signal.shape[1]] = signal
        row[:, signal.shape[1] :] = 0


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
    parts: int = 1,
    workers: int = 2,
    device: str = "cpu",
    skip: bool = False,
) -> Any:
    """Batches of the first 10 s of each record at 500 Hz, as ``RawBatch`` in host memory.

    Args:
        ids: records to read; None: those of ``split``.
        batch: global batch size, over all ranks.
        repeat: go on with another permutation after an epoch; else stop after one, the last batch maybe smaller.
        rank, world, parts: which rows of each batch to read; ``distributed.share_of``.
        skip: replace records that cannot be read, instead of raising the ValueError that names one.
        engine: ``dali`` (fast), ``reference`` (plain) or ``auto``: DALI where it is installed, announced.

    Raises:
        ValueError: too few records, an uneven batch, or an engine that is not here.
    """
    if engine not in ENGINES:
        raise ValueError(f"data.engine = {engine!r}; accepted: {', '.join(ENGINES)}")
    ids = corpus.split_ids(split) if ids is None else np.asarray(ids)
    order = Order(ids, batch, seed, shuffle=shuffle, repeat=repeat, rank=rank, world=world, parts=parts)
    if engine != "reference":
        try:
            from dbeta.data.dali import DaliLoader

            return DaliLoader(corpus, order, workers=workers, device=device, skip=skip)
        except ImportError as error:
            if engine == "dali":
                raise ValueError(f"data.engine=dali: {error}") from None
            announce(f"loader: the reference engine; the faster one, DALI, is not here: {error}")
    return ReferenceLoader(corpus, order, workers=workers, device=device, skip=skip)
