"""Fuzz targets: headers, tars (corpora), configurations and checkpoints, from a seeded mutator of whole examples.

    python -m tests.fuzz TARGET SECONDS [SEED]

An input may be read or refused with a ValueError. Anything else, more than ``MEMORY`` bytes, more than ``SLOW_S`` for
one input, or a file outside the folder it works in, is a finding: exit code 1, and the input stays in that folder.
"""

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

MEMORY, SLOW_S = 6 << 30, 10.0
TOKENS = (
    b"\0", b"\xff\xfe", b"-1", b"0", b"99999999999999999999", b"4294967296", b"-2147483649", b"nan", b"inf", b"1e309",
    b"../../../etc/passwd", b"/etc/passwd", b"\r\n", b"#", b"16x9", b"524", b"(", b")", b"/uV", b"~", b"{", b"}", b"[",
    b"null", b"true", b'""', b"\xc3\x28", b" " * 300, b"[" * 2000, b'{"a":' * 2000,
)  # fmt: skip
HEADER = b"""r 12 500 100
%s# Age: 60
#Dx: 426783006
"""
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few random edits: bytes changed, cut out, repeated, replaced by ``TOKENS``."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at, length = chance.randrange(len(data) + 1), chance.choice((0, 1, 2, 4, 16, 200))
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = chance.choice(TOKENS)
        elif chance.random() < 0.3:
            del data[at:]
    return bytes(data)


def headers(folder: Path) -> Callable[[random.Random], None]:
    """A WFDB record whose header, or now and then whose signals, are not what they should be."""
    from dbeta.data.records import read_ecg

    signals = np.random.default_rng(0).integers(-500, 500, (100, 12)).astype("<i2")
    sums = signals.sum(0)
    text = HEADER % b"".join(
        f"r.dat 16 200(0)/mV 16 0 {signals[0, i]} {sums[i] % 65536} 0 {lead}\n".encode() for i, lead in enumerate(LEADS)
    )

    def once(chance: random.Random) -> None:
        (folder / "r.dat").write_bytes(
            signals.tobytes() if chance.random() < 0.8 else mutated(signals.tobytes(), chance)
        )
        (folder / "r.hea").write_bytes(mutated(text, chance))
        ecg = read_ecg(folder / "r")
        assert ecg.shape[0] == 12 and np.isfinite(ecg).all()

    return once


def one_of(source: Path, folder: Path, files: list[str], chance: random.Random) -> Path:
    """A copy of ``source`` with one of its files mutated."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    target = copy / chance.choice(files)
    target.write_bytes(mutated(target.read_bytes(), chance))
    return copy


def tars(folder: Path) -> Callable[[random.Random], None]:
    """A corpus with one damaged file; sizes in corpus.json follow, as an attacker would see to."""
    from dbeta.config import Config
    from dbeta.data.corpus import Corpus
    from dbeta.data.inputs import load_inputs
    from dbeta.data.loader import make_loader
    from dbeta.data.prepare import prepare

    prepare("synthetic", None, folder / "corpus", limit=6, workers=1)
    config = Config.load("smoke", ("train.batch=2", "data.workers=1"))
    load_inputs(Corpus.open(folder / "corpus"), config)
    files = [p.relative_to(folder / "corpus").as_posix() for p in (folder / "corpus").rglob("*") if p.is_file()]

    def once(chance: random.Random) -> None:
        copy = one_of(folder / "corpus", folder, files, chance)
        described = json.loads((folder / "corpus" / "corpus.json").read_text())
        if (copy / "corpus.json").read_bytes() == (folder / "corpus" / "corpus.json").read_bytes():
            for shard in described["shards"]:
                shard["bytes"] = (copy / "shards" / shard["name"]).stat().st_size
            (copy / "corpus.json").write_text(json.dumps(described))
        corpus = Corpus.open(copy)
        loader = make_loader(corpus, split="all", batch=2, engine="reference", workers=1, repeat=False)
        try:
            for _ in loader:
                pass
        finally:
            loader.close()
        load_inputs(corpus, config)

    return once


def configs(folder: Path) -> Callable[[random.Random], None]:
    """A TOML preset, a run's config.json, or an override."""
    from dbeta.config import Config

    default = Config()
    toml = "".join(
        f"[{s}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
        for s, values in default.to_dict().items()
        if isinstance(values, dict)
    ).encode()

    def once(chance: random.Random) -> None:
        path, kind = folder / "given", chance.randrange(3)
        path.write_bytes(mutated(toml if kind == 0 else default.to_json().encode(), chance))
        if kind == 0:
            Config.load(str(path))
        elif kind == 1:
            Config.load_json(path)
        else:
            Config.load("smoke", [mutated(b"train.steps=100", chance).decode(errors="replace")])

    return once


def checkpoints(folder: Path) -> Callable[[random.Random], None]:
    """A checkpoint, its manifest in order or not, and a model folder."""
    from dbeta import checkpoint
    from dbeta.config import Config
    from dbeta.counters import Counters
    from dbeta.files import file_digest
    from dbeta.models import pretrained
    from dbeta.models.dbeta import DBeta
    from dbeta.shards import snapshot
    from tests.models.small import SMALL

    def fresh() -> tuple[DBeta, torch.optim.Optimizer]:
        model = DBeta(SMALL, Config().runtime)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = fresh()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    counters = {"sums": {"total": 1.5}, "counted": 1, "skipped": [0, 0]}
    state = {"loader": {"epoch": 0, "position": 1}, "best": {"score": 0.0, "step": 4}, "counters": counters}
    written = checkpoint.write(folder / "runs", 5, snapshot(model, optimizer), state, 2)
    model.save_pretrained(folder / "model")
    files = sorted(path.name for path in written.iterdir())

    def once(chance: random.Random) -> None:
        if chance.random() < 0.3:
            pretrained.load(one_of(folder / "model", folder, ["model.safetensors", "config.json"], chance))
            return
        copy = one_of(written, folder, files, chance)
        if chance.random() < 0.5:
            if checkpoint.damage(copy) is not None:
                raise ValueError("refused")
        else:  # checksums that an attacker has put right
            listed = [name for name in files if name != "manifest.json"]
            sound = {
                name: {"bytes": (copy / name).stat().st_size, "sha256": file_digest(copy / name)} for name in listed
            }
            (copy / "manifest.json").write_text(json.dumps(sound))
            assert checkpoint.damage(copy) is None
        state = checkpoint.load(copy, *fresh())
        Counters(Config(), torch.device("cpu")).load_state_dict(state["counters"])

    return once


TARGETS = {"headers": headers, "tars": tars, "configs": configs, "checkpoints": checkpoints}


def main(name: str, seconds: float, seed: int = 0) -> int:
    """Run a target; the number of findings."""
    folder = Path(tempfile.mkdtemp(prefix=f"dbeta-fuzz-{name}-"))
    work = folder / "work"
    work.mkdir()
    os.chdir(work)
    once = TARGETS[name](work)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts, findings = {"read": 0, "refused": 0}, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and not findings:
        number = seed * 10**9 + sum(counts.values())
        started = time.monotonic()
        try:
            once(random.Random(number))
            counts["read"] += 1
        except ValueError:
            counts["refused"] += 1
        except BaseException as error:
            findings += 1
            print(
                f"{name} {number}: {type(error).__name__} {str(error)[:300]}; the input is in {work}", file=sys.stderr
            )
            if os.environ.get("FUZZ_TRACEBACK"):
                raise
        if time.monotonic() - started > SLOW_S:
            findings += 1
            print(f"{name} {number}: took {time.monotonic() - started:.0f} s; the input is in {work}", file=sys.stderr)
        if strays := [path.name for path in folder.iterdir() if path != work]:
            findings += 1
            print(f"{name} {number}: wrote {strays} outside its folder", file=sys.stderr)
    print(json.dumps({"target": name, **counts, "findings": findings}))
    if not findings:
        shutil.rmtree(folder)
    return findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(min(main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:])), 1))
