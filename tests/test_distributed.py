"""Several gloo processes give what one gives with the whole batch: the ETS loss, and the steps of training."""

import dataclasses
import errno
import functools
import hashlib
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from dbeta import checkpoint
from dbeta.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from dbeta.counters import Counters
from dbeta.data.batch import Batch
from dbeta.distributed import Ranks, share_of, whole
from dbeta.ets import CachedEts, ring_ets_loss
from dbeta.models.dbeta import DBeta
from dbeta.shards import snapshot
from dbeta.trainer import Stepper
from dbeta_kernels.ets_loss import ets_loss
from tests.models.small import SMALL
from tests.team import Team

ROWS, WIDTH = 12, 8


# --- the ETS loss --------------------------------------------------------------------------------------------------


def whole_batch():
    generator = torch.Generator().manual_seed(0)
    ecg, text = (torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    aligned = torch.rand(ROWS, generator=generator) < 0.5
    reports = torch.randint(0, 5, (2, ROWS), generator=generator)  # some texts occur on several ranks
    return ecg.requires_grad_(), text.requires_grad_(), aligned, reports


def alone(options: dict):
    """The loss of the whole batch in one process, and its features with their gradients."""
    ecg, text, aligned, (own, shown) = whole_batch()
    loss = ets_loss(ecg, text, aligned, ecg_reports=own, text_reports=shown, backend="reference", **options)
    loss.backward()
    return loss, ecg, text


def ring(ranks: Ranks, options: dict):
    ecg, text, aligned, (own, shown) = whole_batch()
    rows = ranks.rows(ROWS)
    mine = [part.detach()[rows].requires_grad_() for part in (ecg, text)]
    loss = ring_ets_loss(*mine, aligned[rows], ranks=ranks, ecg_reports=own[rows], text_reports=shown[rows], **options)
    loss.backward()
    # What DDP and FSDP do to gradients of shared weights: the mean over ranks.
    return ranks.mean(loss.detach()), *(part.grad / ranks.world for part in mine)


def cached(ranks: Ranks, options: dict):
    """The same in three micro-batches, whose pairs are those of the whole batch."""
    ecg, text, aligned, (own, shown) = whole_batch()
    rows = ranks.rows(ROWS, 3).chunk(3)
    mine = [[part.detach()[r].requires_grad_() for part in (ecg, text)] for r in rows]
    parts = ([aligned[r] for r in rows], [own[r] for r in rows], [shown[r] for r in rows])
    losses = [ets(*m) for ets, m in zip(CachedEts(mine, *parts, ranks=ranks, **options), mine)]
    torch.stack(losses).mean().backward()
    order = torch.cat(rows).argsort()
    gradients = (torch.cat([m[i].grad for m in mine])[order] / ranks.world for i in range(2))
    return ranks.mean(losses[0].detach()), torch.cat(rows)[order], *gradients


OPTIONS = [("batch", "negative"), ("mean", "ignore"), ("batch", "positive")]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("reduction", "same_report"), OPTIONS)
def test_ring_equals_one_process(world, reduction, same_report, teams):
    options = {"reduction": reduction, "same_report": same_report}
    expected, ecg, text = alone(options)
    losses, *gradients = zip(*teams(world)(ring, options))
    torch.testing.assert_close(torch.stack(losses), expected.detach().expand(world), rtol=0, atol=1e-10)
    for got, leaf in zip(gradients, (ecg, text)):
        torch.testing.assert_close(torch.cat(got), leaf.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("reduction", "same_report"), OPTIONS)
def test_cached_features_give_the_loss_of_the_whole_batch(world, reduction, same_report, teams):
    options = {"reduction": reduction, "same_report": same_report}
    expected, ecg, text = alone(options)
    results = [cached(Ranks(), options)] if world == 1 else teams(world)(cached, options)
    for loss, rows, d_ecg, d_text in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(d_ecg, ecg.grad[rows], rtol=0, atol=1e-10)
        torch.testing.assert_close(d_text, text.grad[rows], rtol=0, atol=1e-10)


def test_shares_are_the_batch_and_micro_batches_do_not_depend_on_the_ranks():
    for world in (1, 2, 4):
        parts = [torch.cat([share_of(24, rank, world, 3).chunk(3)[p] for rank in range(world)]) for p in range(3)]
        assert [part.tolist() for part in parts] == [list(range(8 * p, 8 * p + 8)) for p in range(3)]
    with pytest.raises(ValueError, match="does not divide over 5 ranks"):
        Ranks(0, 5).rows(ROWS)
    with pytest.raises(ValueError, match="2 ranks x 5 micro-batches; use a multiple of 10"):
        Ranks(0, 2).rows(ROWS, 5)


# --- training steps ------------------------------------------------------------------------------------------------

LENGTHS = (17, 3, 24, 9, 1, 12, 6, 30)
TINY = dataclasses.replace(SMALL, ecg_layers=1, text_layers=2, fusion_layers=2, mem_layers=1)
WIDE = ModelConfig(
    ecg_layers=2, text_layers=2, fusion_layers=2, mem_layers=2, mem_tap=1, text_vocab=500, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip


def batch_of(config: ModelConfig, step: int, rows: torch.Tensor) -> Batch:
    """Rows of a global batch of eight, ragged, its masked words spread unevenly; float64 values."""
    generator = torch.Generator().manual_seed(step)
    lengths, longest = torch.tensor(LENGTHS).roll(step), max(LENGTHS)
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(3, config.text_vocab, mask.shape, generator=generator) * mask
    labels = torch.randint(3, config.text_vocab, mask.shape, generator=generator)
    hidden = mask & (torch.rand(mask.shape, generator=generator) < 0.25)
    ecg = torch.randn(len(LENGTHS), config.leads, config.samples, generator=generator, dtype=torch.float64)
    noise = torch.rand(len(LENGTHS), config.ecg_tokens, generator=generator)
    reports = torch.randint(0, 5, (2, len(LENGTHS)), generator=generator)
    mask, hidden = mask[rows], hidden[rows]
    positions = torch.nn.functional.pad(hidden.flatten().nonzero()[:, 0], (0, 2))
    known = torch.nn.functional.pad(labels[rows].flatten()[positions[:-2]], (0, 2), value=-100)
    return Batch(
        records=rows, ecg=ecg[rows], signal=ecg[rows].roll(1, 1), gain=None, baseline=None, mean=ecg[rows].mean(-1),
        rstd=1 / ecg[rows].std(-1), reports=reports[0][rows], text_reports=reports[1][rows],
        aligned=torch.tensor([True, False, True, True, False, False, True, False])[rows], text_ids=ids[rows],
        text_mask=mask, mlm_positions=positions, mlm_labels=known, noise=noise[rows],
        text_tokens=int(mask.sum()) + 2,
    )  # fmt: skip


def steps_of(ranks: Ranks, config: Config, count: int, bad: int = -1):
    """Losses of each step, and the weights after ``count``; the last rank's batch ``bad`` holds a NaN."""
    torch.manual_seed(0)
    model = DBeta(config.model, config.runtime).double()
    stepper = Stepper(model, config, torch.device("cpu"), ranks)
    rows = ranks.rows(config.train.batch, config.train.accumulate).chunk(config.train.accumulate)
    logged = []
    for step in range(count):
        batches = [batch_of(config.model, step, part) for part in rows]
        if step == bad and ranks.rank == ranks.world - 1:
            batches[0].ecg[-1, 0, 0] = torch.nan
        stepper.step(batches)
        skipped = stepper.counters.skipped_steps()
        logged.append(stepper.counters.drain() | {"now": float(len(skipped))})
    return logged, {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


def configured(model: ModelConfig, strategy: str = "ddp", accumulate: int = 1, **loss) -> Config:
    return Config(
        data=DataConfig(), model=model, loss=LossConfig(**loss), optim=OptimConfig(lr=1e-3, clip=1.0),
        train=TrainConfig(batch=len(LENGTHS), accumulate=accumulate),
        runtime=RuntimeConfig(device="cpu", strategy=strategy),
    )  # fmt: skip


def check(team: Team, config: Config, count: int = 20, bad: int = -1) -> list[dict]:
    """Several ranks' metrics and weights are those of one, to rounding in float64."""
    alone, weights = steps_of(Ranks(), config, count, bad)
    for logged, found in team(steps_of, config, count, bad):
        for ours, theirs in zip(logged, alone):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, abs=1e-8, rel=1e-8, nan_ok=True), name
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-8, msg=name)
    return alone


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_twenty_steps_equal_one_process(world, strategy, teams):
    alone = check(teams(world), configured(TINY, strategy))
    assert alone[-1]["total"] < alone[0]["total"] - 0.1


def compiled_steps_of(ranks: Ranks, config: Config, count: int):
    """``steps_of`` with a compiler that only traces."""
    runtime = dataclasses.replace(config.runtime, compile=True, compile_scope="layers")
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        return steps_of(ranks, dataclasses.replace(config, runtime=runtime), count)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_layers_on_two_ranks(strategy, teams):
    """Compiled in place first, wrapped then; pairs of the whole batch take a pass without gradients as well."""
    config = configured(TINY, strategy, accumulate=2, ets_pairs="batch")
    alone, _ = steps_of(Ranks(), config, 2)
    for logged, _ in teams(2)(compiled_steps_of, config, 2):
        for ours, theirs in zip(logged, alone):
            assert ours == pytest.approx(theirs, abs=1e-8, rel=1e-8)


def test_every_switch_of_the_losses_on_two_ranks(teams):
    switches = {"reconstruct_rows": "matched", "ets_same_report": "positive", "ets_reduction": "mean"}
    check(teams(2), configured(TINY, **switches), count=3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("pairs", ["micro", "batch"])
def test_accumulation_on_two_ranks(strategy, pairs, teams):
    check(teams(2), configured(TINY, strategy, accumulate=2, ets_pairs=pairs), count=3)


def test_cached_pairs_are_those_of_a_batch_at_once():
    """Only the MLM mean, taken per micro-batch, tells accumulated steps from whole ones."""
    whole_ets, _ = steps_of(Ranks(), configured(TINY, mlm=0.0), 3)
    parts, _ = steps_of(Ranks(), configured(TINY, accumulate=4, ets_pairs="batch", mlm=0.0), 3)
    micro, _ = steps_of(Ranks(), configured(TINY, accumulate=4, mlm=0.0), 3)
    for name in ("ets", "etm", "mem", "grad_norm"):
        assert [m[name] for m in parts] == pytest.approx([m[name] for m in whole_ets], rel=1e-9), name
    assert abs(micro[0]["ets"] - whole_ets[0]["ets"]) > 0.1


def test_cached_features_drop_out_what_the_second_pass_does(monkeypatch):
    seen = []

    class Watched(CachedEts):
        def __init__(self, features, *parts, **options):
            super().__init__(features, *parts, **options)
            self.features = features

        def __iter__(self):
            for cached, ets in zip(self.features, super().__iter__()):
                yield lambda *f, cached=cached, ets=ets, **o: seen.append((cached, f[:2])) or ets(*f, **o)

    monkeypatch.setattr("dbeta.trainer.CachedEts", Watched)
    dropped = dataclasses.replace(TINY, dropout=0.2, attention_dropout=0.2)
    steps_of(Ranks(), configured(dropped, accumulate=2, ets_pairs="batch"), 1)
    assert len(seen) == 2
    for first, second in seen:
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_skips_the_step_on_all(strategy, teams):
    alone = check(teams(2), configured(TINY, strategy), count=4, bad=2)
    assert [line["now"] for line in alone] == [0, 0, 1, 0]


def counted(ranks: Ranks) -> dict:
    counters = Counters(configured(TINY), torch.device("cpu"), ranks)
    counters.add("total", torch.tensor(float(ranks.rank)))
    counters.end_step(ranks.any(torch.tensor(not ranks.first)).float())
    counters.skipped_steps()
    return counters.state_dict()


def test_what_a_checkpoint_keeps_of_a_log_window_is_of_all_ranks(teams):
    assert teams(2)(counted) == [{"sums": {"total": 0.5}, "counted": 1, "skipped": [1, 1]}] * 2


def stepper_and_batches(ranks: Ranks, config: Config, steps: range) -> tuple[Stepper, list[list[Batch]]]:
    torch.manual_seed(0)
    stepper = Stepper(DBeta(config.model, config.runtime), config, torch.device("cpu"), ranks)
    return stepper, [[singles(batch_of(config.model, step, ranks.rows(config.train.batch)))] for step in steps]


def singles(batch: Batch) -> Batch:
    for name in ("ecg", "signal", "mean", "rstd"):
        setattr(batch, name, getattr(batch, name).float())
    return batch


def state_of(stepper: Stepper) -> dict[str, bytes]:
    """Checksums of weights and moments, whole."""
    found = dict(stepper.model.state_dict())
    for name, parameter in stepper.model.named_parameters():
        found |= {f"{name}:{key}": value for key, value in stepper.optimizer.state[parameter].items()}
    return {n: hashlib.sha256(whole(tensor.detach()).numpy().tobytes()).digest() for n, tensor in found.items()}


def saved(ranks: Ranks, config: Config, folder: Path):
    """Two steps and a checkpoint; the state there, and that after two more steps."""
    stepper, batches = stepper_and_batches(ranks, config, range(4))
    for batch in batches[:2]:
        stepper.step(batch)
    counters = {"sums": {}, "counted": 0, "skipped": [0, 0]}
    state = {"loader": {"epoch": 0, "position": 2}, "best": {"score": 0.0, "step": 0}, "counters": counters}
    with checkpoint.Writer(folder, 1, ranks.apart(100)) as writer:
        writer.save(2, snapshot(stepper.model, stepper.optimizer, first=ranks.first), state)
        there = state_of(stepper)  # while the checkpoint is being written
        for batch in batches[2:]:
            stepper.step(batch)
    return there, state_of(stepper)


def gone_on_with(ranks: Ranks, config: Config, folder: Path, steps: int):
    """The same states of a run that begins with the checkpoint."""
    stepper, batches = stepper_and_batches(ranks, config, range(2, 2 + steps))
    checkpoint.load(folder / "step-00000002", stepper.model, stepper.optimizer)
    there = state_of(stepper)
    for batch in batches:
        stepper.step(batch)
    return there, state_of(stepper) if steps else {}


def on(teams, world: int, function, strategy: str, *arguments) -> list:
    config = configured(TINY, strategy)
    return [function(Ranks(), config, *arguments)] if world == 1 else teams(world)(function, config, *arguments)


TEAMS = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")]


@pytest.mark.parametrize(("world", "strategy"), TEAMS)
def test_a_checkpoint_is_gone_on_with_by_any_number_of_ranks(world, strategy, teams, tmp_path):
    """What it holds is the same to the bit for all; so is what follows, where the number of ranks is."""
    there, later = on(teams, world, saved, strategy, tmp_path)[0]
    shards = sorted((tmp_path / "step-00000002").glob("*.safetensors"))
    assert len(shards) == (world if strategy == "fsdp" else 1)
    for readers, theirs in TEAMS:
        same = (readers, theirs) == (world, strategy)
        for found, after in on(teams, readers, gone_on_with, theirs, tmp_path, 2 if same else 0):
            assert found == there and (after == later or not same)


def no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(ranks: Ranks, config: Config, folder: Path) -> tuple[str]:
    """What a rank says of a checkpoint that the last one cannot write, or sees elsewhere."""
    stepper, batches = stepper_and_batches(ranks, config, range(1))
    stepper.step(batches[0])
    mine = folder if ranks.first or folder.name == "full" else folder / str(ranks.rank)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as error:
        if folder.name == "full" and not ranks.first:
            patch.setattr(os, "fsync", no_space)
        tensors = snapshot(stepper.model, stepper.optimizer, first=ranks.first)
        checkpoint.write(mine, 1, tensors, {}, 1, ranks)
    return (str(error.value),)


@pytest.mark.parametrize(("name", "reason"), [("full", "No space left"), ("apart", "must see the same --out")])
def test_a_checkpoint_that_one_rank_could_not_write_is_none(name, reason, teams, tmp_path):
    for (said,) in on(teams, 2, failing, "fsdp", tmp_path / name):
        assert "checkpoint at step 1 not written" in said and reason in said and "Traceback" not in said
    assert not checkpoint.whole(tmp_path / name) and not list((tmp_path / name).rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_full_width(strategy, teams):
    check(teams(2), configured(WIDE, strategy), count=2)
