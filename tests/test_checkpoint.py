"""Checkpoints that are damaged, cut, forged or of something else are refused by name, and nothing is changed."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbeta import checkpoint, shards
from dbeta.models.dbeta import DBeta
from tests.test_pretrain import corpus, run  # noqa: F401 (fixtures)


def test_a_checkpoint_cut_at_a_hundred_places_is_refused(run, tmp_path, capfd):  # noqa: F811
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    before, newest = checkpoint.whole(folder)
    chance = random.Random(0)
    for _ in range(100):
        file = chance.choice(sorted(newest.iterdir()))
        content = file.read_bytes()
        file.write_bytes(content[: chance.randrange(len(content))])
        assert checkpoint.latest(folder) == before
        said = capfd.readouterr().err
        assert "WARNING" in said and f"{newest} is damaged" in said
        file.write_bytes(content)
    assert checkpoint.latest(folder) == newest
    for path in (before, newest):
        (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        checkpoint.latest(folder)


def test_a_changed_bit_is_refused(tmp_path, capfd):
    before, newest = (checkpoint.write(tmp_path, step, {"model.weight": torch.ones(2)}, {}, 2) for step in (1, 2))
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert checkpoint.latest(tmp_path) == before
        assert file.name.split(".")[0] in capfd.readouterr().err
        file.write_bytes(content)
    assert checkpoint.latest(tmp_path) == newest


def test_a_damaged_later_checkpoint_does_not_push_out_the_whole_one(run, tmp_path):  # noqa: F811
    folder = tmp_path / "checkpoints"
    before, newest = (Path(shutil.copytree(p, folder / p.name)) for p in checkpoint.whole(run / "checkpoints"))
    (newest / "state.json").write_text("{}")
    step = int(before.name[5:]) + 1  # gone on with, and stopped by a signal after a step
    written = checkpoint.write(folder, step, {"model.weight": torch.ones(2)}, {}, keep=1)
    assert checkpoint.whole(folder) == [written, newest] and checkpoint.latest(folder) == written


def test_a_name_is_given_and_taken_at_once(tmp_path, monkeypatch):
    """All that a checkpoint holds is on the disk before its name is; what has a final name is renamed to be deleted."""
    synced, fsync, replace, rmtree = set(), os.fsync, os.replace, shutil.rmtree

    def syncing(descriptor):
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def renaming(partial, path):
        assert {partial, *partial.iterdir()} <= synced and len(list(partial.iterdir())) == 3
        synced.clear()
        replace(partial, path)

    def deleting(path):
        assert path.name.startswith(".")
        rmtree(path)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    monkeypatch.setattr(shutil, "rmtree", deleting)
    (tmp_path / ".step-00000002.partial").mkdir()  # of a run that was killed
    for step in (1, 2, 2):
        written = checkpoint.write(tmp_path, step, {"model.weight": torch.ones(2)}, {}, keep=1)
        assert tmp_path in synced and list(tmp_path.iterdir()) == [written]


@pytest.mark.parametrize(
    "change",
    [
        {"best": {}}, {"best": {"score": "x", "step": 3}}, {"counters": {}}, {"loader": {"epoch": 0}}, {"step": -7},
        {"loader": {"epoch": -1, "position": 0}},
        {"counters": {"sums": {"total": "x"}, "counted": 1, "skipped": [0, 0]}},
        {"counters": {"sums": {}, "counted": 0, "skipped": [0, "x"]}},
        {"counters": {"sums": {}, "counted": 0, "skipped": [0]}},
    ],
)  # fmt: skip
def test_a_state_that_no_run_wrote_is_refused(change, run, tmp_path):  # noqa: F811
    newest = Path(shutil.copytree(checkpoint.latest(run / "checkpoints"), tmp_path / "step-00000014"))
    state = json.loads((newest / "state.json").read_text())
    model = DBeta.from_pretrained(run)
    assert checkpoint.load(newest, model) == state
    (newest / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(ValueError, match=r"its state.json does not hold step, loader, best, counters"):
        checkpoint.load(newest, model)


def test_a_file_that_nobody_listed_is_refused(run, tmp_path):  # noqa: F811
    newest = Path(shutil.copytree(checkpoint.latest(run / "checkpoints"), tmp_path / "step-00000014"))
    save_file({"model.extra": torch.ones(1)}, newest / "shard-00009.safetensors")
    assert checkpoint.damage(newest) == "shard-00009.safetensors is not in the manifest"


def test_pipes_and_endless_files_are_refused(run, tmp_path):  # noqa: F811
    """Whoever reads a pipe waits for ever, whatever the manifest says; JSON takes twenty times its size, parsed."""
    newest = Path(shutil.copytree(checkpoint.latest(run / "checkpoints"), tmp_path / "step-00000014"))
    described = json.loads((newest / "manifest.json").read_text()) | {"pipe": {"bytes": 0, "sha256": "missing"}}
    (newest / "manifest.json").write_text(json.dumps(described))
    os.mkfifo(newest / "pipe")
    assert checkpoint.damage(newest) == "pipe is no file"
    (newest / "pipe").unlink()
    for name in ("state.json", "manifest.json"):
        with (newest / name).open("ab") as file:
            file.write(b" " * checkpoint.MAX_JSON)
    assert "manifest.json is longer than 4,194,304 bytes" in checkpoint.damage(newest)
    with pytest.raises(ValueError, match=r"state.json is longer than 4,194,304 bytes"):
        checkpoint.load(newest, DBeta.from_pretrained(run))
    (newest / "manifest.json").unlink()
    os.mkfifo(newest / "manifest.json")
    assert checkpoint.damage(newest) == "manifest.json is no file"


def test_copies_and_links_beside_checkpoints(tmp_path):
    """A copy is not taken for a checkpoint, nor given up; of one that lies elsewhere only the link is."""
    folder, tensors = tmp_path / "checkpoints", {"model.weight": torch.ones(2)}
    first = checkpoint.write(folder, 1, tensors, {}, keep=1)
    copy = Path(shutil.copytree(first, folder / "step-00000001.good"))
    moved = first.rename(tmp_path / "elsewhere")
    first.symlink_to(moved)
    assert checkpoint.latest(folder) == first
    newest = checkpoint.write(folder, 2, tensors, {}, keep=1)
    assert checkpoint.whole(folder) == [newest] and sorted(folder.iterdir()) == [copy, newest]
    assert checkpoint.damage(moved) is None


# --- shards --------------------------------------------------------------------------------------------------------

VALUE = torch.arange(15.0).view(5, 3)


def linear(weight: torch.Tensor = VALUE) -> torch.nn.Module:
    module = torch.nn.Linear(3, 5, bias=False)
    module.weight.data = weight.clone()
    return module


def forged(folder: Path, *parts: tuple[torch.Tensor, object]) -> Path:
    """Shards of ``model.weight``, each with what its header says of where it lies."""
    folder.mkdir()
    for index, (part, info) in enumerate(parts):
        metadata = {"DCP_SHARDING_INFO": json.dumps(info)} if info is not None else None
        save_file({"model.weight": part.contiguous()}, folder / f"shard-{index}.safetensors", metadata)
    return folder


def at(*offsets: object) -> dict:
    return {"model.weight": {"saved_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "parts",
    [
        [(VALUE, None)], [(VALUE, at(0, 0))], [(VALUE[:2], at(0, 0)), (VALUE[2:], at(2, 0))],
        [(VALUE[3:], at(3, 0)), (VALUE[:3], at(0, 0)), (VALUE[5:], at(5, 0))],
    ],
)  # fmt: skip
def test_shards_make_a_whole(parts, tmp_path):
    module = linear(torch.zeros(5, 3))
    shards.load(forged(tmp_path / "shards", *parts), module, None)
    assert torch.equal(module.weight, VALUE)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(VALUE[:2], at(0, 0)), (VALUE[3:], at(3, 0))], "overlap or leave a gap"),
        ([(VALUE[:3], at(0, 0)), (VALUE[2:], at(2, 0))], "overlap or leave a gap"),
        ([(VALUE, at(0, 0)), (VALUE, at(0, 0))], "overlap or leave a gap"),
        ([(VALUE[:, :2], at(0, 0)), (VALUE[:, 2:], at(0, 2))], "overlap or leave a gap"),
        ([(VALUE, at(-5, 0)), (VALUE, at(0, 0))], "overlap or leave a gap"),
        ([(VALUE, at(1 << 60, 0))], "overlap or leave a gap"), ([(VALUE, at(1 << 80, 0))], "cannot be read"),
        ([(VALUE, at(0))], "cannot be read|overlap"), ([(VALUE, at("0", "0"))], "cannot be read"),
        ([(VALUE, [])], "cannot be read|does not fit"), ([(VALUE, {"other": 1})], "cannot be read"),
        ([(VALUE, {"model.weight": None})], "cannot be read"), ([(VALUE, at([], {}))], "cannot be read"),
        ([(VALUE[:4], at(0, 0))], r"model.weight is \[4, 3\], the model has \[5, 3\]"),
        ([(VALUE[:4, :2], at(1, 1))], "overlap or leave a gap"),
        ([(VALUE.double(), None)], "model.weight is torch.float64, the model has torch.float32"),
        ([], "1 missing: model.weight"),
    ],
)  # fmt: skip
def test_shards_that_lie_are_refused_and_change_nothing(parts, message, tmp_path):
    module = linear()
    with pytest.raises(ValueError, match=message):
        shards.load(forged(tmp_path / "shards", *parts), module, None)
    assert torch.equal(module.weight, VALUE)


def test_a_header_without_end_is_refused(tmp_path):
    (tmp_path / "shard-00001.safetensors").write_bytes(struct.pack("<Q", shards.MAX_HEADER + 1) + b"{" + b" " * 10)
    with pytest.raises(ValueError, match=r"the header of shard-00001.safetensors is longer than 4,194,304 bytes"):
        shards.load(tmp_path, linear(), None)


def test_moments_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    module = linear()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    trained = module.weight.detach().clone()
    path = checkpoint.write(tmp_path, 1, shards.snapshot(module, optimizer), {}, keep=1)
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    for name, change in (("exp_avg", {}), ("exp_avg_sq", {"optimizer.weight:exp_avg_sq": torch.ones(3, 5)})):
        key = f"optimizer.weight:{name}"
        save_file({n: t for n, t in tensors.items() if n != key} | change, file)
        fresh = linear()
        empty = torch.optim.AdamW(fresh.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=key):
            shards.load(path, fresh, empty)
        assert torch.equal(fresh.weight, VALUE) and not empty.state
    save_file(tensors, file)
    shards.load(path, fresh, empty)
    assert torch.equal(fresh.weight, trained)
    for name, value in optimizer.state[module.weight].items():
        assert torch.equal(empty.state[fresh.weight][name], value)
