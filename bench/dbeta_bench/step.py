"""The training step, whole and by phase: the dense reference against the exact removals, the kernels and compilation.

Workloads (DESIGN section 5): ``uniform40`` and ``uniform64`` give every report that many tokens, ``real`` draws lengths
from the quantiles of 10,720 real reports. Records are random integers: the step's time does not depend on their values.
"""

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dbeta import compilation
from dbeta.config import Config
from dbeta.data.batch import Batch, BatchMaker, TextVocabulary
from dbeta.data.loader import RawBatch
from dbeta.data.reports import TokenTable
from dbeta.losses import pretraining_losses
from dbeta.models.dbeta import DBeta
from dbeta.runtime import autocast, prepare_process
from dbeta.trainer import Stepper
from dbeta_bench import roofline

# Quantiles of the T5 tokens of 10,720 real PTB-XL reports.
PERCENT = (0, 1, 5, 25, 50, 75, 90, 95, 99, 100)
LENGTHS = (1, 6, 10, 27, 41, 60, 76, 83, 96, 140)
REPORTS = 1024

# What each provider changes of the configuration; the reference optimiser is neither fused nor foreach.
DENSE = {"kernels": "reference", "attention": "reference", "removals": False, "precision": "fp32"}
PROVIDERS: dict[str, dict[str, Any]] = {
    "reference": DENSE,
    "compiled reference": {"kernels": "reference", "attention": "sdpa", "removals": False, "compile": True},
    "removals": {"kernels": "reference", "removals": True},  # but the positional convolution, which is an operator
    "fused": {"kernels": "auto", "removals": True},
    "fused + compile": {"kernels": "auto", "removals": True, "compile": True},
    "fused + compiled layers": {"kernels": "auto", "removals": True, "compile": True, "compile_scope": "layers"},
}

# In front of the times, each provider's step of CHECKED records without dropout is held to the reference's: each loss,
# the whole gradient and that of each parameter may be off by this share of their size. Full size on a CPU gave 4e-7,
# 2e-6 and 3e-6 in float32, 0.012, 0.019 and 0.25 (where terms cancel) in bf16; a gradient that is lost is off by 1.
CHECKED = 4
LOSSES = ("total", "mlm", "mem", "etm", "ets")
TOLERANCE = {torch.float32: (1e-5, 3e-5, 1e-4), torch.bfloat16: (0.05, 0.1, 0.8)}
_checked: set[tuple[str, Config]] = set()  # in this process: a compiled provider takes long to check


def _conv_flops(x, weight, bias, keep, groups, kernel, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(out_shape[:-1]) * math.prod(weight)


def _conv_backward_flops(d_out, x, weight, keep, groups, kernel, *_, **__) -> int:
    rows = math.prod(d_out[:-1])
    return 2 * (rows + (math.prod(x[:-1]) if kernel else rows)) * math.prod(weight)


def _stem_flops(ecg, first, rest, *_, **__) -> int:
    tokens = [ecg[0] * (ecg[2] >> layer + 1) for layer in range(1 + rest[0])]
    return 2 * (tokens[0] * math.prod(first) + sum(tokens[1:]) * math.prod(rest[1:]))


def _stem_backward_flops(d_out, ecg, first, rest, *_, **__) -> int:
    """Per later layer its product again, d_weight and d_input; of the first its product again and d_weight."""
    tokens = [ecg[0] * (ecg[2] >> layer + 1) for layer in range(1 + rest[0])]
    return 4 * tokens[0] * math.prod(first) + 6 * sum(tokens[1:]) * math.prod(rest[1:])


def _aten_conv_backward_flops(d_out, x, weight, *options, **__) -> int:
    """torch 2.13 counts the weight gradient of a grouped convolution ``groups`` times."""
    wants_input, wants_weight, _ = options[-1]
    return 2 * math.prod(d_out) * math.prod(weight[1:]) * (wants_input + wants_weight)


# Our own operators with matrix work, which torch cannot count, and one that it counts wrongly.
FORMULAS = {
    torch.ops.aten.convolution_backward: _aten_conv_backward_flops,
    torch.ops.dbeta.positional_conv: _conv_flops,
    torch.ops.dbeta.positional_conv_backward: _conv_backward_flops,
    torch.ops.dbeta.conv_stem: _stem_flops,
    torch.ops.dbeta.conv_stem_backward: _stem_backward_flops,
}


def workload(name: str) -> np.ndarray:
    """Token counts of ``REPORTS`` reports, int64."""
    if name == "real":
        drawn = np.random.default_rng(0).uniform(0, 100, REPORTS)
        return np.interp(drawn, PERCENT, LENGTHS).round().astype(np.int64)
    if name.startswith("uniform") and name[7:].isdigit():
        return np.full(REPORTS, int(name[7:]))
    raise ValueError(f"workload {name!r}; accepted: real, uniform40, uniform64, uniform128 (any uniformN)")


DENSE_FLOPS: dict[tuple, float] = {}  # counting takes seconds, and is the same for all providers


class PlainAdamW(torch.optim.AdamW):
    """The reference optimiser. Only the fused one can skip a step on the device, and the others refuse to be asked."""

    found_inf = property(lambda self: None, lambda self, bad: None)


class Bench:
    """One provider on one workload: makes batches and steps, and times their phases."""

    def __init__(self, provider: str, name: str, config: Config, device: torch.device):
        runtime = dataclasses.replace(config.runtime, **PROVIDERS[provider])
        self.config = config = dataclasses.replace(config, runtime=runtime)
        self.device, self.provider = device, provider
        prepare_process(runtime)  # TF32 as in training: none for the reference
        torch.manual_seed(0)
        with device:
            model = DBeta(config.model, runtime)
        self.stepper = Stepper(model.train(), config, device)
        if provider == "reference":
            group = self.stepper.optimizer.param_groups[0]
            options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
            options["lr"] = config.optim.lr  # for a rate on the device it would wait, once for every parameter
            self.stepper.optimizer = PlainAdamW(model.parameters(), **options, foreach=False, fused=False)
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
        rows = self.rows.to(self.device, non_blocking=True)  # else the host would wait for the last step
        return self.maker.make(raw.to(self.device), self.done, rows, shape)

    def steps(self, count: int = 1) -> dict[str, float]:
        """Mean seconds of ``count`` whole steps (waited for once, at the end) and of making their batches."""
        begun, made = self._now(), 0.0
        for _ in range(count):
            before = time.perf_counter()
            batch = self.batch()
            made += time.perf_counter() - before
            self.stepper.step([batch])
            self.done += 1
        return {"step_s": (self._now() - begun) / count, "data_s": made / count}

    def phases(self) -> dict[str, float]:
        """Seconds of data, forward, backward and optimiser, each waited for (so their sum is more than a step)."""
        marks = [self._now()]
        batch = self.batch()
        marks.append(self._now())
        with autocast(self.config.runtime, self.device):
            losses = self.stepper.pretraining_losses(batch)
        marks.append(self._now())
        losses.total.backward()
        marks.append(self._now())
        self.stepper.optimizer.step()
        self.stepper.optimizer.zero_grad(set_to_none=True)
        marks.append(self._now())
        self.done += 1
        return {f"{n}_s": b - a for n, a, b in zip(("data", "forward", "backward", "optimizer"), marks, marks[1:])}

    def computed(self) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
        """The dtype of the next step's products, and its losses and gradients by name, on the host."""
        batch = self.batch()
        with autocast(self.config.runtime, self.device):
            low = torch.is_autocast_enabled(self.device.type)
            losses = self.stepper.pretraining_losses(batch)
        losses.total.backward()
        found = {name: getattr(losses, name).detach().cpu() for name in LOSSES}
        for name, parameter in self.stepper.model.named_parameters():
            grad = parameter.grad  # None: no output reads it
            found[name] = torch.zeros(parameter.shape) if grad is None else grad.cpu()
        return torch.bfloat16 if low else torch.float32, found

    def executed_flops(self) -> float:
        """FLOPs of forward and backward of one batch: matrix products, convolutions and the operators of FORMULAS."""
        from torch.utils.flop_counter import FlopCounterMode

        runtime = self.config.runtime
        with compilation.uncompiled(runtime), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            with autocast(runtime, self.device):  # in float32 it would not fit beside a CUDA graph's memory
                losses = pretraining_losses(self.stepper.model, self.batch(), self.config.loss)
            losses.total.backward()
        self.stepper.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def dense_flops(bench: Bench) -> float:
    """FLOPs of forward and backward of the dense network on the next batch of ``bench``; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    batch = bench.batch()
    runtime = dataclasses.replace(bench.config.runtime, device="cpu", compile=False, **DENSE)
    with FakeTensorMode() as mode:
        model = DBeta(bench.config.model, runtime)
        for field in dataclasses.fields(batch):
            if isinstance(value := getattr(batch, field.name), torch.Tensor):
                setattr(batch, field.name, mode.from_tensor(value.cpu()))
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            pretraining_losses(model, batch, bench.config.loss).total.backward()
    return float(counter.get_total_flops())


def check(providers: tuple[str, ...], config: Config, where: torch.device) -> None:
    """Hold losses and gradients of each provider to the reference's, on a batch of ``real``; once in a process.

    Raises:
        ArithmeticError: a provider computes something else.
    """
    model = dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0)  # each draws its own
    config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch=CHECKED))
    truths: dict[Config, dict[str, torch.Tensor]] = {}

    def computed(provider: str, held: Config) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
        found = Bench(provider, "real", held, where).computed()
        _release(where)
        return found

    for provider in providers:
        if provider == "reference" or (provider, config) in _checked:
            continue
        held = _shallow(config) if PROVIDERS[provider].get("compile") else config
        truth = truths[held] = truths.get(held) or computed("reference", held)[1]
        dtype, found = computed(provider, held)
        norms = {name: (_norm(found[name] - exact), _norm(exact)) for name, exact in truth.items()}
        losses = {name: norms.pop(name) for name in LOSSES}
        whole = {"whole gradient": tuple(math.hypot(*each) for each in zip(*norms.values()))}
        gradients = {f"gradient of {name}": norm for name, norm in norms.items()}
        for part, limit in zip((losses, whole, gradients), TOLERANCE[dtype]):
            for name, (error, size) in part.items():
                if not error <= limit * size:
                    raise ArithmeticError(
                        f"{provider}: {name} is off by {error:.2g}, the reference's is {size:.2g}; more than {limit:g} "
                        f"of it in {str(dtype).removeprefix('torch.')}; no time is given"
                    )
        _checked.add((provider, config))


def _shallow(config: Config) -> Config:
    """Two layers of a kind, or as many as the MEM decoder needs: compiling takes the longer, the more there are."""
    model = config.model
    layers = {name: min(2, getattr(model, name)) for name in ("ecg_layers", "text_layers", "mem_layers")}
    fusion = min(model.fusion_layers, max(2, model.mem_tap + 1))
    return dataclasses.replace(config, model=dataclasses.replace(model, fusion_layers=fusion, **layers))


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def run(
    *,
    device: str = "cpu",
    workloads: tuple[str, ...] = (),
    providers: tuple[str, ...] = (),
    batch: int | None = None,
    alternations: int = 5,
    preset: str = "paper",
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of medians per workload and provider, behind a check of every provider against the reference.

    On a CPU providers take turns, so that a slow minute hits all alike. A GPU has a steady clock and no room for all of
    them at once: there one follows the other, a time is the mean of 8 steps that the host does not wait for, and a
    provider that does not fit in memory is named and left out.

    Args:
        workloads: none: real and uniform64, and on a GPU also uniform40 and uniform128.
        providers: none: reference, removals and fused (on a CPU: the operators' forms for it); on a GPU all.
        batch: records per step; none: 8, on a GPU 128.
        alternations: timed turns of each provider, after one that is not counted (it compiles).
        overrides: ``section.key=value`` of the configuration, as for ``dbeta-pretrain --set``.

    Raises:
        ValueError: an unknown workload or provider.
        ArithmeticError: a provider that fails the check; nothing is timed then.
    """
    where = torch.device(device)
    gpu = where.type == "cuda"
    workloads = workloads or (("uniform40", "real", "uniform64", "uniform128") if gpu else ("real", "uniform64"))
    providers = providers or (tuple(PROVIDERS) if gpu else ("reference", "removals", "fused"))
    if unknown := [name for name in providers if name not in PROVIDERS]:
        raise ValueError(f"provider {', '.join(unknown)}; accepted: {', '.join(PROVIDERS)}")
    batch = batch or (128 if gpu else 8)
    config = Config.load(preset, [f"train.batch={batch}", f"runtime.device={device}", *overrides])
    for name in workloads:
        workload(name)
    check(providers, config, where)
    ceiling = roofline.measure(where).flops_per_s[torch.bfloat16 if gpu else torch.float32]
    rows = []
    for name in workloads:
        base = None
        for group in [[p] for p in providers] if gpu else [list(providers)]:
            try:
                found = _measure(group, name, config, where, alternations, 8 if gpu else 1)
            except torch.cuda.OutOfMemoryError:
                say(f"{name:10} {group[0]:20} does not fit in memory")
                continue
            finally:
                _release(where)
            for row in found:
                base = base or row["step_s"]
                row |= {"ratio": row["step_s"] / base, "mfu": row["dense_flops"] / row["step_s"] / ceiling}
                rows.append(row)
                say(
                    f"{name:10} {row['provider']:20} {row['step_s']:8.3f} s  {row['ratio']:5.2f}x  "
                    f"{row['records_per_s']:8.1f} records/s  {row['mfu']:5.1%} of the bf16 ceiling"
                    if gpu
                    else f"{name:10} {row['provider']:20} {row['step_s']:8.3f} s  {row['ratio']:5.2f}x  "
                    f"{row['records_per_s']:8.1f} records/s"
                )
    return rows


def _measure(
    providers: list[str], name: str, config: Config, where: torch.device, alternations: int, steps: int
) -> list[dict[str, Any]]:
    """Rows of providers that take turns."""
    benches = {provider: Bench(provider, name, config, where) for provider in providers}
    times: dict[str, list[float]] = {provider: [] for provider in providers}
    of = (name, config.model, config.data, config.loss, config.train)
    if of not in DENSE_FLOPS:
        DENSE_FLOPS[of] = dense_flops(next(iter(benches.values())))
    dense = DENSE_FLOPS[of]
    warm = {provider: bench.steps(steps)["step_s"] * steps for provider, bench in benches.items()}
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(alternations):
        for provider, bench in benches.items():
            bench.done = 0  # the same batches again, so that no new shape has to be compiled
            times[provider].append(bench.steps(steps)["step_s"])
    # Reserved: what a CUDA graph takes is not allocated again when it is replayed.
    peak = torch.cuda.max_memory_reserved() if where.type == "cuda" else None
    rows = []
    for provider, bench in benches.items():
        median, batch = statistics.median(times[provider]), config.train.batch
        row = {
            "workload": name, "provider": provider, "batch": batch, "steps_per_s": 1 / median,
            "records_per_s": batch / median, "step_s": median, "step_s_all": times[provider],
            "first_steps_s": warm[provider], "dense_flops": dense, "peak_bytes": peak,
        }  # fmt: skip
        bench.done = 0
        rows.append(row | bench.phases() | {"executed_flops": bench.executed_flops()})
    return rows


def _release(where: torch.device) -> None:
    """Give back the memory of benches that are gone; compiled code holds on to theirs."""
    torch.compiler.reset()
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()
