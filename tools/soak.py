"""Train while everything goes wrong, and hold the end against an undisturbed run, bit for bit.

    python tools/soak.py --kills 50 --out bench/results/soak-cpu.json

Kills come at random moments of a process's life, start included; a third while a checkpoint is being written; after
another third the newest checkpoint is damaged as well. For every five kills there is one SIGTERM (the run must save and
exit 0) and one full disk: a tmpfs where this machine lets us mount one, else a limit on the size of files. After every
blow the run is started again with --resume, and must go on. Whenever it reaches its end, weights, moments and metrics
must equal those of the undisturbed run, and another one begins. Exit code 1 if anything differs. With ``--ranks 2`` the
run is one of torchrun's whose weights, moments and checkpoints are sharded (FSDP2), and a kill hits torchrun or a rank.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dbeta import checkpoint
from dbeta_bench import results

SETTINGS = (
    "train.steps=100", "train.batch=8", "train.log_every=3", "train.eval_every=45", "train.eval_records=16",
    "train.checkpoint_every=4", "train.keep_checkpoints=3", "data.workers=1", "model.dropout=0.1",
)  # fmt: skip
RECORDS = 120
FULL_BYTES = 48 << 20  # of the tmpfs
STOP_S = 30.0  # a run must have saved and ended this long after SIGTERM
KILLS = ("kill", "kill while writing", "kill and damage")


class Soak:
    """One run folder and the blows it takes; counts what happened."""

    def __init__(self, folder: Path, seed: int, ranks: int = 1):
        self.folder, self.run, self.ranks = folder, folder / "run", ranks
        self.random = random.Random(seed)
        self.count = dict.fromkeys((*KILLS, "sigterm", "full disk"), 0)
        self.damaged = self.resumed = self.ends = self.identical = 0
        self.longest_stop = 0.0
        self.tmpfs = mount(folder / "run")

    def start(self, out: Path) -> subprocess.Popen:
        """The training command, from the beginning or from where it was."""
        sharded = () if self.ranks == 1 else ("runtime.strategy=fsdp",)
        settings = [word for value in (*SETTINGS, *sharded) for word in ("--set", value)]
        resume = ["--resume"] if (out / "config.json").is_file() else []
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        command = [sys.executable, *(torchrun if self.ranks > 1 else ()), "-m", "dbeta.pretrain", "--preset", "smoke"]
        command += ["--device", "cpu", *settings, *resume, "--data", str(self.folder / "corpus"), "--out", str(out)]
        log = (self.folder / "log").open("w")
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def undisturbed(self) -> None:
        """Make the corpus and the run that the others are held against; how long it takes is the span of the blows."""
        command = [sys.executable, "-m", "dbeta.cli", "prepare", "synthetic", "--limit", str(RECORDS), "--workers", "1"]
        subprocess.run([*command, "--out", str(self.folder / "corpus")], check=True, capture_output=True)
        for out in ("warm", "whole"):  # the first one makes the table of negatives and the tokenizer
            started = time.monotonic()
            self.must(self.start(self.folder / out).wait() == 0, "the undisturbed run failed")
            self.span = time.monotonic() - started
        self.truth = state_of(self.folder / "whole")

    def strike(self, kind: str) -> None:
        """Start or go on, and let one thing happen; then the run must be able to go on."""
        process = self.start(self.run)
        if kind == "kill while writing":
            self.wait_for(process, lambda: any((self.run / "checkpoints").glob(".step-*.partial/*")))
            time.sleep(self.random.uniform(0, 0.02))
        elif kind in ("sigterm", "full disk"):
            before = len(self.lines())
            self.wait_for(process, lambda: len(self.lines()) != before)
            time.sleep(self.random.uniform(0, 0.3))
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.random.uniform(0, self.span))
        if process.poll() is not None:
            self.must(process.returncode == 0, "a resumed run failed")
            return self.compare()
        {"sigterm": self.terminate, "full disk": self.fill}.get(kind, self.kill)(process)
        self.count[kind] += 1
        self.resumed += 1  # what fails to go on ends the soak at its next start
        if kind == "kill and damage":
            self.damage()

    def kill(self, process: subprocess.Popen) -> None:
        """One process of the run; the others end by themselves (ranks without a torchrun save first)."""
        ranks = self.ranks_of(process)
        os.kill(self.random.choice(ranks), signal.SIGKILL)
        process.wait()
        for path in (Path(f"/proc/{pid}/cmdline") for pid in ranks):
            with contextlib.suppress(OSError):  # it is gone
                while path.read_bytes():
                    time.sleep(0.01)

    def ranks_of(self, process: subprocess.Popen) -> list[int]:
        """The processes of the run: one, or torchrun and its ranks."""
        found = ["pgrep", "-P", str(process.pid)] if self.ranks > 1 else ["true"]
        return [process.pid, *map(int, subprocess.run(found, capture_output=True, check=False).stdout.split())]

    def terminate(self, process: subprocess.Popen) -> None:
        started = time.monotonic()
        process.send_signal(self.random.choice((signal.SIGTERM, signal.SIGUSR1)))
        code = process.wait(STOP_S)
        self.longest_stop = max(self.longest_stop, time.monotonic() - started)
        good = (code == 0 or self.ranks > 1) and "--resume" in self.said()  # torchrun's own code is another
        self.must(good or self.finished(), f"SIGTERM: exit code {code}")

    def fill(self, process: subprocess.Popen) -> None:
        """No space from now on: an error that says so, and the last checkpoint untouched."""
        filler = self.run / "filler"
        if self.tmpfs:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
        else:
            for pid in self.ranks_of(process):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, 2000))
        code = process.wait(STOP_S)
        filler.unlink(missing_ok=True)
        good = code == (2 if self.ranks == 1 else 1) and "Error:" in self.said()
        self.must(good or self.finished(), f"full disk: exit code {code}")

    def damage(self) -> None:
        """Cut the newest checkpoint short or change a byte of it, where there is an earlier one."""
        sound = [path for path in checkpoint.whole(self.run / "checkpoints") if checkpoint.damage(path) is None]
        if len(sound) < 2:
            return
        file = self.random.choice(sorted(sound[-1].iterdir()))
        place = self.random.randrange(file.stat().st_size)
        with file.open("r+b") as opened:
            if self.random.random() < 0.5:
                opened.truncate(place)
            else:
                opened.seek(place)
                byte = opened.read(1)[0]
                opened.seek(place)
                opened.write(bytes([byte ^ 1 << self.random.randrange(8)]))
        self.damaged += 1
        self.must(
            checkpoint.latest(self.run / "checkpoints") == sound[-2], f"{sound[-1]} was damaged and is not refused"
        )

    def finish(self) -> None:
        """Let the run come to its end."""
        self.must(self.start(self.run).wait() == 0, "the resumed run failed")
        self.compare()

    def compare(self) -> None:
        """The end of a disturbed run against that of the undisturbed one; the folder is then empty for the next."""
        self.ends += 1
        self.must(state_of(self.run) == self.truth, "the end differs from that of the undisturbed run")
        self.identical += 1
        for path in self.run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def wait_for(self, process: subprocess.Popen, happened) -> None:
        while process.poll() is None and not happened():
            time.sleep(0.001)

    def lines(self) -> list[str]:
        path = self.run / "metrics.jsonl"
        return path.read_text().splitlines() if path.is_file() else []

    def finished(self) -> bool:
        return (self.run / "report.html").is_file()

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            raise SystemExit(f"soak: {what} after {self.count} in {self.folder}; its output:\n{self.said()[-3000:]}")


def state_of(run: Path) -> tuple:
    """What must be equal at the end: weights, moments, and metrics but for rates."""
    newest = checkpoint.latest(run / "checkpoints")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "records_per_s"} for line in lines]
    return newest.name, {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}, metrics


def mount(folder: Path) -> bool:
    """A small tmpfs at ``folder``, where this machine allows it."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={FULL_BYTES}", "none", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def in_own_namespace() -> None:
    """Start this script again where it may mount, and where its mounts vanish with it, if that is possible."""
    again = ["unshare", "--map-root-user", "--mount"]
    if "DBETA_SOAK" in os.environ or not shutil.which("unshare"):
        return
    if subprocess.run([*again, "true"], check=False, capture_output=True).returncode == 0:
        os.execvpe(again[0], [*again, sys.executable, *sys.argv], {**os.environ, "DBETA_SOAK": "1"})


def schedule(kills: int, chance: random.Random) -> list[str]:
    """The blows in random order: every kind of kill alike often, and a fifth as many of each of the others."""
    others = ["sigterm", "full disk"] * (kills // 5 or 1)
    blows = [KILLS[i % len(KILLS)] for i in range(kills)] + others
    chance.shuffle(blows)
    return blows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run; several share its state (FSDP2)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs: more would wait for each other wherever something runs beside
    in_own_namespace()
    folder = Path(tempfile.mkdtemp(prefix="dbeta-soak-"))
    soak = Soak(folder, options.seed, options.ranks)
    try:
        soak.undisturbed()
        waiting = schedule(options.kills, soak.random)
        while waiting:
            before = dict(soak.count)
            soak.strike(waiting[0])
            if soak.count != before:  # else the run came to its end first
                print(f"{waiting.pop(0)}: {len(soak.lines())} log lines", file=sys.stderr)
        soak.finish()
    finally:
        if soak.tmpfs:
            subprocess.run(["umount", str(soak.run)], check=False)
    shutil.rmtree(folder)
    struck = sum(soak.count.values())
    row = {
        "ranks": options.ranks, "kills": options.kills, **soak.count, "checkpoints damaged": soak.damaged,
        "resumed": f"{soak.resumed} of {struck}", "runs that ended": soak.ends, "bit for bit equal": soak.identical,
        "longest stop after a signal, s": round(soak.longest_stop, 2), "disk": "tmpfs" if soak.tmpfs else "file limit",
        "seed": options.seed,
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    if options.out:
        results.save(options.out, results.document("cpu", {"soak": [row]}))


if __name__ == "__main__":
    main()
