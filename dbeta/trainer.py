"""Pre-training: from a corpus and a configuration to a run folder. Reads from top to bottom.

    RUN/config.json  environment.json  metrics.jsonl  nonfinite.jsonl  tensorboard/  checkpoints/  model/  report.html

``metrics.jsonl`` holds one line per ``log_every`` steps and one per validation. Everything random is a function of
(seed, step, row), so a run that was killed and resumed writes the same lines, times and rates excepted. Of several
ranks the first validates and writes; only dropout depends on how many there are.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbeta import checkpoint, compilation
from dbeta.config import Config
from dbeta.counters import Counters
from dbeta.data.batch import Batch, BatchMaker
from dbeta.data.corpus import Corpus
from dbeta.data.inputs import load_inputs
from dbeta.data.loader import RawBatch, make_loader
from dbeta.distributed import ALONE, Ranks, gradients_of, join, refresh, replica, whole, wrap
from dbeta.ets import CachedEts, ring_ets_loss
from dbeta.losses import Objective
from dbeta.models.card import about_run
from dbeta.models.dbeta import DBeta
from dbeta.models.pretrained import load_text_weights
from dbeta.optim import learning_rate, make_optimizer, set_learning_rate
from dbeta.report import RunLog, write_report
from dbeta.run_folder import open_run
from dbeta.runtime import announce, autocast, prepare_process, resolve_device
from dbeta.shards import snapshot
from dbeta.stopping import StopRequest
from dbeta.validation import Validator


class Stepper:
    """Model, optimiser and counters of a run, and the step itself."""

    def __init__(self, model: DBeta, config: Config, device: torch.device, ranks: Ranks = ALONE):
        self.model, self.config, self.device, self.ranks = model, config, device, ranks
        objective = Objective(model, config.loss, ranks, config.runtime, device)
        self.pretraining_losses = wrap(objective, config.runtime.strategy, ranks)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config.optim)
        # Under CUDA graphs a gradient lies where the next micro-batch writes: they add up in tensors that stay.
        graphs = compilation.uses_graphs(config.runtime, device, alone=ranks.world == 1)
        self.keep_gradients = config.train.accumulate > 1 and graphs
        for parameter in self.parameters if self.keep_gradients else ():
            parameter.grad = torch.zeros_like(parameter)
        self.counters = Counters(config, device, ranks)

    def step(self, batches: list[Batch]) -> None:
        """One update from the micro-batches of one global batch; reads nothing back from the device."""
        loss = 0.0
        for index, (batch, ets) in enumerate(zip(batches, self._ets_losses(batches))):
            with gradients_of(self.pretraining_losses, complete=index == len(batches) - 1):
                with autocast(self.config.runtime, self.device):
                    losses = self.pretraining_losses(batch, ets)  # total = MLM + MEM + ETM + ETS
                (losses.total / len(batches)).backward()
            loss = loss + losses.total.detach()
            for field in dataclasses.fields(losses):
                self.counters.add(field.name, getattr(losses, field.name).detach() * (1 / len(batches)))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip, norm)
        norm = whole(norm)
        bad = self.ranks.any(~(norm.isfinite() & loss.isfinite())).float()
        self.optimizer.found_inf = bad  # the fused kernel leaves weights and moments alone where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        self.counters.add("grad_norm", norm)
        self.counters.end_step(bad)

    def _ets_losses(self, batches: list[Batch]) -> Iterable[Callable[..., Tensor]]:
        """The ETS loss of each micro-batch: of its own pairs, or its part of that of the whole batch."""
        loss = self.config.loss
        if loss.ets_pairs == "micro" or len(batches) == 1:
            return [ring_ets_loss] * len(batches)
        features = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the second pass draws the same dropout
            for batch in batches:
                with torch.no_grad(), autocast(self.config.runtime, self.device):
                    features.append(self.pretraining_losses(batch, None))
        parts = zip(*((batch.aligned, batch.reports, batch.text_reports) for batch in batches))
        return CachedEts(
            features, *parts, ranks=self.ranks, backend=self.config.runtime.kernels,
            same_report=loss.ets_same_report, reduction=loss.ets_reduction,
        )  # fmt: skip


def train(
    config: Config,
    corpus: Corpus,
    out: Path,
    *,
    resume: bool = False,
    show_examples: bool = False,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Pre-train on ``corpus`` and write the run folder ``out``; returns the last metrics, none if it was stopped.

    Args:
        resume: go on from the newest whole checkpoint of ``out``.
        show_examples: show a record in the report even if it is not synthetic.
        stop: what may ask for an end before the last step.

    Raises:
        ValueError: the corpus or the run folder does not fit the configuration.
        ArithmeticError: training diverged (a run of non-finite steps).
    """
    # --- where, and what ---------------------------------------------------------------------------------------------
    device = resolve_device(config.runtime.device)
    prepare_process(config.runtime)
    ranks = join(device, config.runtime.timeout_s)
    restored = ranks.once(lambda: open_run(out, config, resume))
    torch.manual_seed(config.train.seed)
    if ranks.world > 1:
        ranks.once(lambda: bool(load_inputs(corpus, config)))  # what it makes is made by one rank
    host_maker, tokenizer = load_inputs(corpus, config)
    maker = host_maker.to(device)
    model = DBeta(
        config.model, config.runtime, tokenizer=tokenizer, report_cleaning=corpus.info.get("cleaning", "paper")
    )
    if not restored:
        load_text_weights(model, config.model.text_weights)
    model.to(device)
    evaluated = replica(model, config.runtime.strategy, ranks)
    stepper = Stepper(model, config, device, ranks)
    validator = Validator(evaluated, corpus, host_maker, maker, config, device) if ranks.first else None
    loader = make_loader(
        corpus, split="train", batch=config.train.batch, seed=config.train.seed,
        engine=config.data.engine, workers=config.data.workers, skip=config.data.on_corrupt == "skip",
        device=str(device), rank=ranks.rank, world=ranks.world, parts=config.train.accumulate,
    )  # fmt: skip
    log = RunLog(out, config.train.steps, active=ranks.first)
    first, best = 0, {"score": float("-inf"), "step": 0}
    if restored:
        state = checkpoint.load(restored, model, stepper.optimizer)
        refresh(evaluated, model)  # the report needs it even where no step is left
        first, best = state["step"], state["best"]
        stepper.counters.load_state_dict(state["counters"])
        loader.load_state_dict(state["loader"])
        announce(f"resumed {out} at step {first} of {config.train.steps}")
    log.truncate(first)

    # --- the loop ----------------------------------------------------------------------------------------------------
    started, begun, stopped = time.perf_counter(), first, False
    apart = ranks.apart(config.runtime.timeout_s)
    writer = checkpoint.Writer(out / "checkpoints", config.train.keep_checkpoints, apart)
    stop = stop or StopRequest(ranks)
    with writer, log.progress(first) as progress:
        for done, batches, raw, position in _batches(loader, host_maker, maker, config, device, ranks, first):
            torch.manual_seed(config.train.seed * 1_000_003 + done + (ranks.rank << 40))  # of dropout
            rate = learning_rate(done, config.train.steps, config.optim)
            set_learning_rate(stepper.optimizer, rate)
            stepper.step(batches)
            if config.data.on_corrupt == "skip":
                stepper.counters.add("replaced", torch.full((), float(raw.replaced), device=device))
            done += 1
            progress(done)
            writer.check()
            last, stopping = done == config.train.steps, stop.agreed()
            logging = done % config.train.log_every == 0 or last
            saving = done % config.train.checkpoint_every == 0 or last or stopping
            if logging or saving:
                for back in stepper.counters.skipped_steps():
                    log.nonfinite(done + back + 1, loader.order.batch_of(done + back).tolist())
            if logging:
                records_per_s = (done - begun) * config.train.batch / (time.perf_counter() - started)
                log.train(done, stepper.counters.drain() | {"lr": rate}, records_per_s)
                started, begun = time.perf_counter(), done
            if done % config.train.eval_every == 0 or last:
                refresh(evaluated, model)
                if ranks.first:
                    metrics = validator()
                    log.validation(done, metrics)
                    if metrics["score"] > best["score"]:
                        best = {"score": metrics["score"], "step": done}
                        evaluated.about = about_run(config, corpus, done, metrics)
                        evaluated.save_pretrained(out / "model")
                started, begun = time.perf_counter(), done
            if saving:
                counters = stepper.counters.state_dict()
                state = {"loader": position, "best": best, "counters": counters, "config": config.to_dict()}
                writer.save(done, snapshot(model, stepper.optimizer, first=ranks.first), state)
            if stopped := stopping and not last:
                break
    loader.close()
    if compiled := compilation.report():
        announce(compiled)
    if stopped:
        announce(f"stopped by a signal: step {done} is saved in {out}; go on with --resume")
        return {}
    if first == config.train.steps and ranks.first:
        validator()  # no step was left, and the report shows classes
    return write_report(out, config, log, validator, show_examples=show_examples) if ranks.first else {}


def _batches(
    loader: Any, host: BatchMaker, maker: BatchMaker, config: Config, device: torch.device, ranks: Ranks, first: int
) -> Iterator[tuple[int, list[Batch], RawBatch, dict[str, Any]]]:
    """(completed steps, micro-batches on the device, what they were made of, loader state after them).

    The text shape comes from the host's own repetition of the draw, so making a batch never waits for the device.
    """
    bucketed = config.runtime.compile or device.type == "cuda"
    rows = ranks.rows(config.train.batch, config.train.accumulate).chunk(config.train.accumulate)
    for step in range(first, config.train.steps):
        raw: RawBatch = next(loader)
        batches = []
        for index, chunk in enumerate(rows):
            part = raw.rows(slice(index * len(chunk), (index + 1) * len(chunk)))
            shape = host.shape(part.records, step, chunk, bucketed=bucketed)
            batches.append(maker.make(part.to(device), step, chunk.to(device, non_blocking=True), shape))
        yield step, batches, raw, loader.state_dict()
