"""The fast engine: NVIDIA DALI decodes the shards with our operator (csrc/dali_op.cpp), on the CPU or the GPU.

The order is the reference engine's own (``loader.Order``), not that of a DALI reader: a seeded permutation of the whole
split mixes better than shuffled tars read through a shuffle window, does not depend on the number of ranks, and makes
the state of the loader two integers. Records reach DALI as views into the mapped shards, so a record at 500 Hz is
copied once, from the page cache into the batch, and PyTorch takes the batch over without a copy. The system is told of
every record of a batch before the first is read, so that a disk sees them together.

One pipeline serves both forms of a batch (records at 500 Hz stay int16; others become mV at 500 Hz) and both devices.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dbeta.data.corpus import Corpus
from dbeta.data.loader import SAMPLES, Order, RawBatch, ReferenceLoader
from dbeta.data.resample import filter_table
from dbeta_kernels import extension

AHEAD = 2  # batches under way while one is used


class DaliLoader:
    """Batches of this rank, the same as ``ReferenceLoader``'s; with ``device`` a GPU the signals already lie there.

    Raises:
        ImportError: DALI or its operator is not here; the message says what to run.
    """

    def __init__(self, corpus: Corpus, order: Order, *, workers: int, device: str = "cpu", skip: bool = False):
        extension.load_dali()
        # With ``skip`` a batch that DALI cannot read is read record by record.
        self.patient = ReferenceLoader(corpus, order, workers=1, device=device, skip=True) if skip else None
        self.corpus, self.order, self.workers = corpus, order, max(workers, 1)
        self.device = torch.device(device)
        self.gain, self.baseline = corpus.column("gain"), corpus.column("baseline").astype(np.int32)
        self.samples = corpus.column("samples").astype(np.int32)
        self.formats = np.where(np.asarray(corpus.column("dtype")) == "int16", 16, 32).astype(np.int32)
        rates, which = np.unique(corpus.column("rate_hz"), return_inverse=True)
        designs = [filter_table(rate) for rate in rates.tolist()]
        self.tables = [design for design in designs if design is not None]
        self.filters = np.array([self.tables.index(d) if d else -1 for d in designs], np.int32)[which]
        self.shard, self.offset = corpus.column("shard"), corpus.column("offset")
        self.maps: dict[int, np.ndarray] = {}
        self.ahead: deque[tuple[np.ndarray, dict[str, int]]] = deque()
        self.state = order.state_dict()
        self.pipeline: Any = None

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        """The next batch; an unreadable record raises the ValueError that names it."""
        if self.pipeline is None:
            self.pipeline = self._build()
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            (signals,) = self.pipeline.run(stream)
        except (RuntimeError, ValueError, OSError) as error:  # whatever an operator or a source provokes
            if self.patient is not None and self.ahead:
                return self._read_patiently()
            found = re.search(r"record \d+: .*", str(error))
            raise ValueError(f"corpus {self.corpus.path}: {found[0] if found else error}") from None
        records, self.state = self.ahead.popleft()
        batch = RawBatch(records=torch.from_numpy(records))
        if self.corpus.uniform:
            batch.gain = torch.from_numpy(self.gain[records].astype(np.float32))
            batch.baseline = torch.from_numpy(self.baseline[records].astype(np.float32))
        if stream is not None:
            batch = batch.pin()
        signal = torch.from_dlpack(signals.as_tensor())  # the batch's own memory: it lives as long as the tensor
        if self.corpus.uniform:
            batch.adc = signal
        else:
            batch.signal = signal
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the batch after the last one handed out begins."""
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from ``state_dict``: the next batches are those that would have come."""
        self.close()
        self.order.load_state_dict(state)
        self.state = state

    def close(self) -> None:
        """Stop the threads; what they had read ahead is dropped."""
        self.pipeline = None
        self.ahead.clear()

    def _read_patiently(self) -> RawBatch:
        """The next batch by the reference engine; the pipeline, unusable after an error, begins anew behind it."""
        records, state = self.ahead[0]
        self.load_state_dict(state)
        return self.patient.read(records)

    def _source(self) -> list[Any]:
        """The next batch as the pipeline's inputs; StopIteration ends the pipeline when its batches are handed out."""
        records = np.ascontiguousarray(next(self.order))
        self.ahead.append((records, self.order.state_dict()))
        columns = [self.samples]
        if not self.corpus.uniform:
            columns += [self.formats, self.filters, self.gain, self.baseline]
        return [self._views(records), records, *(column[records] for column in columns)]

    def _views(self, records: np.ndarray) -> list[np.ndarray]:
        """Each record's samples where they lie in the mapped shard; short if the shard is (the operator says so)."""
        sizes = 12 * self.samples[records].astype(np.int64) * self.formats[records] // 8
        views, files = [], {}
        try:
            for shard, *place in zip(self.shard[records].tolist(), self.offset[records].tolist(), sizes.tolist()):
                if shard not in files:
                    files[shard] = os.open(self.corpus.shard_path(shard), os.O_RDONLY)
                os.posix_fadvise(files[shard], *place, os.POSIX_FADV_WILLNEED)
                views.append(self._mapped(shard)[place[0] : sum(place)])
        finally:
            for file in files.values():
                os.close(file)
        return views

    def _mapped(self, shard: int) -> np.ndarray:
        """The bytes of a shard. torch's mapping, unlike mmap's, keeps no file open: a corpus may have many shards."""
        if shard not in self.maps:
            path = self.corpus.shard_path(shard)
            self.maps[shard] = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        return self.maps[shard]

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu, uniform = self.device.type == "cuda", self.corpus.uniform

        @pipeline_def(
            batch_size=len(self.order.share),
            num_threads=self.workers,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=AHEAD,
        )
        def pipeline() -> Any:
            data, record, samples, *header = fn.external_source(
                self._source, num_outputs=3 if uniform else 7, batch=True, no_copy=True
            )
            common = dict(samples=samples, record=record, leads=12, planar=True, length=SAMPLES)
            if uniform:
                adc = fn.wfdb_decode(data, format=16, dtype=types.INT16, **common)
                return adc.gpu() if on_gpu else adc
            format_, filter_, gain, baseline = header
            return fn.wfdb_decode(
                data.gpu() if on_gpu else data,
                gain,
                baseline,
                format=format_,
                filter=filter_,
                filters=[n for t in self.tables for n in (t.up, t.down, t.table.shape[1], t.first)],
                filter_weights=[weight for t in self.tables for weight in t.table.ravel().tolist()],
                **common,
            )

        built = pipeline()
        built.build()
        return built
