"""The training step, whole and by phase: the dense reference against the exact removals, the kernels and compilation.

Workloads (DESIGN section 5): ``uniform40`` and ``uniform64`` give every report that many tokens, ``real`` draws lengths
from the quantiles of 10,720 real reports. Records are random integers: the step's time does not depend on their values.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dbeta.config import Config
from dbeta.data.batch import Batch, BatchMaker, TextVocabulary
from dbeta.data.loader import RawBatch
from dbeta.data.reports import TokenTable
from dbeta.models.dbeta import DBeta
from dbeta.trainer import Stepper

# Quantiles of the T5 tokens of 10,720 real PTB-XL reports.
PERCENT = (0, 1, 5, 25, 50, 75, 90, 95, 99, 100)
LENGTHS = (1, 6, 10, 27, 41, 60, 76, 83, 96, 140)
REPORTS = 1024

# What each provider changes of the configuration; the reference optimiser is neither fused nor foreach.
PROVIDERS: dict[str, dict[str, Any]] = {
    "reference": {"kernels": "reference", "attention": "reference", "removals": False, "precision": "fp32"},
    "compiled reference": {"kernels": "reference", "attention": "sdpa", "removals": False, "compile": True},
    "removals": {"kernels": "reference", "removals": True},
    "fused": {"kernels": "auto", "removals": True},
    "fused + compile": {"kernels": "auto", "removals": True, "compile": True},
}


def workload(name: str) -> np.ndarray:
    """Token counts of ``REPORTS`` reports, int64."""
    if name == "real":
        drawn = np.random.default_rng(0).uniform(0, 100, REPORTS)
        return np.interp(drawn, PERCENT, LENGTHS).round().astype(np.int64)
    if name.startswith("uniform") and name[7:].isdigit():
        return np.full(REPORTS, int(name[7:]))
    raise ValueError(f"workload {name!r}; accepted: real, uniform40, uniform64, uniform128 (any uniformN)")


class Bench:
    """One provider on one workload: makes batches and steps, and times their phases."""

    def __init__(self, provider: str, name: str, config: Config, device: torch.device):
        runtime = dataclasses.replace(config.runtime, **PROVIDERS[provider])
        self.config = config = dataclasses.replace(config, runtime=runtime)
        self.device, self.provider = device, provider
        torch.manual_seed(0)
        with device:
            model = DBeta(config.model, runtime)
        self.stepper = Stepper(model.train(), config, device)
        if provider == "reference":
            group = self.stepper.optimizer.param_groups[0]
            options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            self.stepper.optimizer = torch.optim.AdamW(model.parameters(), **options, foreach=False, fused=False)
        lengths = workload(name)
        generator = np.random.default_rng(1)
        vocab = config.model.text_vocab
        ids = torch.from_numpy(generator.integers(3, vocab, lengths.sum(), dtype=np.int32))
        tokens = TokenTable(ids, torch.from_numpy(np.concatenate([[0], lengths.cumsum()])))
        far = torch.from_numpy(generator.integers(0, REPORTS, (REPORTS, 64)))
        self.host = BatchMaker(
            torch.arange(REPORTS), tokens, far, TextVocabulary(size=vocab, mask=2, special=(0, 1)), config.data,
            config.loss, seed=0, batch=config.train.batch, kernels=runtime.kernels,
            ecg_tokens=config.model.ecg_tokens,
        )  # fmt: skip
        self.maker = self.host.to(device)
        self.rows = torch.arange(config.train.batch)
        shape = (config.train.batch, config.model.leads, config.model.samples)
        self.adc = torch.from_numpy(generator.integers(-2000, 2000, shape, dtype=np.int16)).to(device)
        self.done = 0

    def batch(self) -> Batch:
        """The next batch, made as in training."""
        records = (self.rows + self.done * len(self.rows)) % REPORTS
        bucketed = self.device.type == "cuda" or self.config.runtime.compile
        shape = self.host.shape(records, self.done, self.rows, bucketed=bucketed)
        level = torch.ones(self.adc.shape[:2], device=self.device)
        raw = RawBatch(records=records, adc=self.adc, gain=1000 * level, baseline=0 * level, signal=None)
        return self.maker.make(raw.to(self.device), self.done, self.rows.to(self.device), shape)

    def step(self) -> dict[str, float]:
        """Seconds of one whole step and of its batch."""
        begun = self._now()
        batch = self.batch()
        made = self._now()
        self.stepper.step([batch])
        self.done += 1
        return {"step_s": self._now() - begun, "data_s": made - begun}

    def phases(self) -> dict[str, float]:
        """Seconds of data, forward, backward and optimiser, each waited for (so their sum is more than a step)."""
        from dbeta.runtime import autocast

        marks = [self._now()]
        batch = self.batch()
        marks.append(self._now())
        with autocast(self.config.runtime, self.device):
            losses = self.stepper.losses(self.stepper.model, batch, self.config.loss)
        marks.append(self._now())
        losses.total.backward()
        marks.append(self._now())
        self.stepper.optimizer.step()
        self.stepper.optimizer.zero_grad(set_to_none=True)
        marks.append(self._now())
        self.done += 1
        return {f"{n}_s": b - a for n, a, b in zip(("data", "forward", "backward", "optimizer"), marks, marks[1:])}

    def executed_flops(self) -> float:
        """FLOPs of forward and backward of one batch, matrix products and convolutions, as torch counts them."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            losses = self.stepper.losses(self.stepper.model, self.batch(), self.config.loss)
            losses.total.backward()
        self.stepper.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def run(
    *,
    device: str = "cpu",
    workloads: tuple[str, ...] = ("real", "uniform64"),
    providers: tuple[str, ...] = ("reference", "removals"),
    batch: int = 8,
    alternations: int = 5,
    preset: str = "paper",
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of medians per workload and provider; providers take turns, so that a slow minute hits all alike.

    Args:
        batch: records per step.
        alternations: timed steps of each provider, after one that is not counted.
        overrides: ``section.key=value`` of the configuration, as for ``dbeta-pretrain --set``.
    """
    where = torch.device(device)
    config = Config.load(preset, [f"train.batch={batch}", f"runtime.device={device}", *overrides])
    rows = []
    for name in workloads:
        benches = {provider: Bench(provider, name, config, where) for provider in providers}
        times: dict[str, list[dict[str, float]]] = {provider: [] for provider in providers}
        warm = {}
        for provider, bench in benches.items():
            warm[provider] = bench.step()["step_s"]
        for _ in range(alternations):
            for provider, bench in benches.items():
                times[provider].append(bench.step())
        base = statistics.median(t["step_s"] for t in times[providers[0]])
        dense = benches["reference"].executed_flops() if "reference" in benches else None
        for provider, bench in benches.items():
            seconds = [t["step_s"] for t in times[provider]]
            median = statistics.median(seconds)
            row = {
                "workload": name, "provider": provider, "batch": batch, "steps_per_s": 1 / median,
                "records_per_s": batch / median, "step_s": median, "step_s_all": seconds, "ratio": median / base,
                "first_step_s": warm[provider], "dense_flops": dense,
            }  # fmt: skip
            row |= bench.phases()
            if not bench.config.runtime.compile:
                row["executed_flops"] = bench.executed_flops()
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                bench.step()
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            rows.append(row)
            say(f"{name:10} {provider:20} {median:8.3f} s  {median / base:5.2f}x  {batch / median:8.1f} records/s")
        del benches
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return rows
