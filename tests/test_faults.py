"""Nothing is lost: several processes, signals, dead ranks, a full disk, corrupt records, damaged checkpoints."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dbeta import checkpoint
from dbeta.config import Config
from dbeta.data.corpus import Corpus
from dbeta.data.loader import make_loader
from dbeta.models.dbeta import DBeta
from dbeta.report import RunLog
from dbeta.trainer import train
from tests.test_pretrain import command, corpus, metrics, run  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[1]
SMOKE = ("--preset", "smoke", "--device", "cpu")


def start(arguments: list[str], ranks: int = 1, **more) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    begin = [sys.executable] if ranks == 1 else launcher
    # A lone process has the threads of the run it is compared with: sums round differently on another number.
    environment = os.environ if ranks == 1 else {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*begin, "-m", "dbeta.pretrain", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more,
    )  # fmt: skip


def ended(process: subprocess.Popen, code: int | None = 0, timeout: float = 200) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert code is None or process.returncode == code, output
    return output


def wait_until(process: subprocess.Popen, happened, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- several processes ---------------------------------------------------------------------------------------------


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def test_torchrun_trains_and_any_number_of_ranks_goes_on(corpus, tmp_path):  # noqa: F811
    """Two processes to step 30; from there one and four (a copy of the run each) continue the same curve."""
    quick = settings("train.log_every=5", "train.eval_every=30", "train.eval_records=16", "data.workers=1")
    out = tmp_path / "two"
    arguments = [*SMOKE, "--data", str(corpus), "--out", str(out), *quick]
    ended(start([*arguments, *settings("train.steps=30")], ranks=2))
    first = metrics(out)
    assert [line["step"] for line in first if line["kind"] == "train"] == [5, 10, 15, 20, 25, 30]
    assert first[-1]["total"] < first[0]["total"]
    curves = []
    for ranks in (1, 4):
        copy = tmp_path / f"on-{ranks}"
        shutil.copytree(out, copy)
        more = [*SMOKE, "--data", str(corpus), "--out", str(copy), *quick, *settings("train.steps=40"), "--resume"]
        ended(start(more, ranks=ranks))
        assert metrics(copy)[: len(first)] == first
        curves.append([line for line in metrics(copy)[len(first) :] if line["kind"] == "train"])
    assert [line["step"] for line in curves[0]] == [35, 40]
    for line, alone in zip(*curves):
        for name, value in alone.items():
            assert line[name] == (value if name == "kind" else pytest.approx(value, rel=2e-3, abs=2e-3)), name


@pytest.mark.slow
def test_fsdp_checkpoints_are_those_of_any_run(corpus, tmp_path):  # noqa: F811
    """What two ranks wrote of their shards, one goes on from, with the losses of two."""
    quick = settings("train.log_every=2", "train.eval_every=4", "train.eval_records=16", "data.workers=1")
    sharded = settings("runtime.strategy=fsdp")
    for ranks in (2, 1):
        out = tmp_path / str(ranks)
        arguments = [*SMOKE, "--data", str(corpus), "--out", str(out), *quick]
        if ranks == 2:
            ended(start([*arguments, *sharded, *settings("train.steps=4")], ranks=2))
            shutil.copytree(out, tmp_path / "1")
        ended(start([*arguments, *sharded, *settings("train.steps=6"), "--resume"], ranks=ranks))
    for alone, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2")):
        for name, value in alone.items():
            assert two[name] == (value if name == "kind" else pytest.approx(value, rel=2e-3, abs=2e-3)), name
    report = tmp_path / "2" / "report.html"
    reconstructed = report.read_text().split("<img")[3]
    report.unlink()  # the run was killed while it wrote it; no step is left
    arguments[arguments.index("--out") + 1] = str(tmp_path / "2")
    ended(start([*arguments, *sharded, *settings("train.steps=6"), "--resume"], ranks=2))
    assert report.read_text().split("<img")[3] == reconstructed


def test_a_hanging_rank_ends_the_others_with_the_reason(corpus, tmp_path):  # noqa: F811
    """Without torchrun's supervision: one rank stops answering, the other one waits no longer than the timeout."""
    out = tmp_path / "out"
    arguments = [
        *command(corpus, out),
        *settings("train.steps=100000", "runtime.timeout_s=4", "train.eval_every=90000"),
    ]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dbeta.pretrain", *arguments], cwd=ROOT, text=True,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        wait_until(processes[0], lambda: len(checkpoint.whole(out / "checkpoints")) > 0)
        processes[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        output = ended(processes[0], code=2, timeout=60)
        assert time.monotonic() - stopped < 20
    finally:
        for process in processes:
            process.kill()
    assert "another rank has ended, or was silent for 4 s" in output and "--resume" in output
    assert "Traceback" not in output
    assert checkpoint.latest(out / "checkpoints")


def test_a_dead_rank_ends_the_run(corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    process = start([*command(corpus, out), *settings("train.steps=100000", "train.eval_every=90000")], ranks=2)
    wait_until(process, lambda: len(checkpoint.whole(out / "checkpoints")) > 0)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    victim = next(p for p in ranks if b"RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    output = ended(process, code=1, timeout=60)
    assert "another rank has ended" in output or "Signal 9 (SIGKILL)" in output
    assert checkpoint.latest(out / "checkpoints")


# --- signals -------------------------------------------------------------------------------------------------------


def test_a_signal_before_the_first_step_waits_for_it(corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    process = start(command(corpus, out))
    wait_until(process, lambda: (out / "config.json").is_file())
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal: step 1 is saved" in ended(process)
    assert [path.name for path in checkpoint.whole(out / "checkpoints")] == ["step-00000001"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_0(number, run, corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    process = start(command(corpus, out))
    wait_until(process, lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) > 0)
    process.send_signal(number)
    asked = time.monotonic()
    output = ended(process)
    assert time.monotonic() - asked < 10
    assert "go on with --resume" in output
    assert not (out / "report.html").exists()
    if number == signal.SIGTERM:
        ended(start(command(corpus, out, "--resume")))
        assert metrics(out) == metrics(run)


def test_sigterm_to_torchrun_saves_once_on_all_ranks(corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    process = start([*command(corpus, out), *settings("train.steps=100000", "train.eval_every=90000")], ranks=2)
    wait_until(process, lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) > 0)
    process.send_signal(signal.SIGTERM)
    output = ended(process, code=None, timeout=40)  # torchrun's own exit code says that it was stopped
    assert output.count("is saved in") == 1, output
    step = int(output.split("step ")[-1].split()[0])
    assert checkpoint.latest(out / "checkpoints").name == f"step-{step:08d}"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_whose_torchrun_has_died_save_and_end(number, corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    process = start([*command(corpus, out), *settings("train.steps=100000", "train.eval_every=90000")], ranks=2)
    wait_until(process, lambda: (out / "metrics.jsonl").is_file() and len(metrics(out)) > 0)
    process.send_signal(number)
    output = ended(process, code=-number, timeout=40)  # its ranks hold the other end: they have ended too
    step = int(output.split("stopped by a signal: step ")[-1].split()[0])
    assert checkpoint.latest(out / "checkpoints").name == f"step-{step:08d}"


# --- the disk ------------------------------------------------------------------------------------------------------


def limited_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(corpus, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    ended(start([*command(corpus, out), *settings("train.steps=6")]))
    good = checkpoint.latest(out / "checkpoints")
    resumed = [*command(corpus, out, "--resume"), *settings("train.eval_every=50")]
    output = ended(start(resumed, preexec_fn=limited_files), code=2)
    assert "checkpoint at step 8 not written" in output and "the one before it is whole" in output
    assert "Traceback" not in output
    assert checkpoint.latest(out / "checkpoints") == good
    assert not list((out / "checkpoints").glob(".*"))


def test_a_full_disk_leaves_the_best_model(run):  # noqa: F811
    before = (run / "model" / "model.safetensors").read_bytes()
    model, limits = DBeta.from_pretrained(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model not written to .*; free some space"):
            model.save_pretrained(run / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert not list((run / "model").glob(".*"))


def test_a_log_that_was_damaged_is_cut(tmp_path):
    log = RunLog(tmp_path, 9)
    lines = b'{"step": 1}\n5\n\xff\xfe\n\0\0\n{"step": 3}\n{"st'
    log.path.write_bytes(lines)
    log.truncate(2)
    assert log.path.read_text() == '{"step": 1}\n'


def test_soak_of_three_kills():
    command = [sys.executable, "tools/soak.py", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["kill"] == row["kill while writing"] == row["kill and damage"] == 1
    assert row["runs that ended"] == row["bit for bit equal"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_soak_of_fifty_kills():
    command = [sys.executable, "tools/soak.py", "--kills", "50", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2900, check=False)
    assert done.returncode == 0, done.stderr


# --- guards --------------------------------------------------------------------------------------------------------


def configured(*overrides: str) -> Config:
    quick = ("train.steps=6", "train.batch=8", "train.log_every=3", "train.eval_every=6", "train.eval_records=8")
    return Config.load(
        "smoke", (*quick, "train.checkpoint_every=3", "data.workers=1", "runtime.device=cpu", *overrides)
    )


def test_skipped_steps_are_counted_and_their_records_dumped(corpus, tmp_path):  # noqa: F811
    """Of a record whose gain is next to nothing the loss is infinite: its step is skipped, the others are not."""
    copy = poisoned(corpus, tmp_path / "corpus", record_in_step=4)
    opened = Corpus.open(copy)
    config = configured("loss.mem_normalise=false")
    train(config, opened, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "nonfinite.jsonl").read_text().splitlines()]
    loader = make_loader(opened, batch=8, engine="reference")
    assert [(line["step"], line["records"]) for line in lines] == [(5, loader.order.batch_of(4).tolist())]
    loader.close()
    assert [m["skipped"] for m in metrics(tmp_path / "out") if m["kind"] == "train"] == [0, 1]
    with pytest.raises(ArithmeticError, match=r"1 steps in a row .*nonfinite.jsonl"):
        train(configured("loss.mem_normalise=false", "optim.max_nonfinite=1"), opened, tmp_path / "stops")


def poisoned(corpus: Path, copy: Path, record_in_step: int) -> Path:  # noqa: F811
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(corpus, copy)
    loader = make_loader(Corpus.open(copy), batch=8, engine="reference")
    record = int(loader.order.batch_of(record_in_step)[3])
    loader.close()
    table = pq.read_table(copy / "records.parquet")
    gains = table["gain"].to_pylist()
    gains[record] = [1e-30] * 12
    place = table.column_names.index("gain")
    table = table.set_column(place, table.field(place), pa.array(gains, table.field(place).type))
    pq.write_table(table, copy / "records.parquet")
    return copy


@pytest.mark.parametrize("engine", ["reference", "dali"])
def test_a_corrupt_record_stops_or_is_replaced(engine, corpus, tmp_path, capfd):  # noqa: F811
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    opened = Corpus.open(copy)
    ids = opened.split_ids("train")
    shard = opened.shard_path(0)
    last = int(ids[-1])
    os.truncate(shard, int(opened.column("offset")[last]) + 100)  # while the run reads it
    options = {"batch": 8, "seed": 0, "engine": engine, "workers": 1}
    whole = make_loader(Corpus.open(corpus), **options)
    with pytest.raises(ValueError, match=f"record {last}"):
        stopping = make_loader(opened, **options)
        for _ in range(len(ids) // 8 + 1):
            next(stopping)
    loader, replaced = make_loader(opened, skip=True, **options), 0
    for _ in range(2 * (len(ids) // 8)):  # two epochs; a record may be among the few that one leaves out
        got, expected = next(loader), next(whole)
        differs = got.records != expected.records
        replaced += got.replaced
        assert differs.sum() == got.replaced and got.records[differs].tolist() == [int(ids[0])] * got.replaced
        assert torch.equal(got.adc[~differs], expected.adc[~differs])
        if got.replaced:
            np.testing.assert_array_equal(got.adc[differs][0].numpy(), opened.read_adc(int(ids[0]), 5000))
    assert 1 <= replaced <= 2
    said = capfd.readouterr().err  # also of what was read ahead
    assert said.count(f"record {int(ids[0])} takes its place (data.on_corrupt=skip)") >= replaced
    loader.close()
    whole.close()


def test_replaced_records_are_counted(corpus, tmp_path):  # noqa: F811
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    opened = Corpus.open(copy)
    record = int(opened.split_ids("train")[-1])
    os.truncate(opened.shard_path(0), int(opened.column("offset")[record]) + 100)
    train(configured("data.on_corrupt=skip", "train.steps=40", "data.engine=reference"), opened, tmp_path / "out")
    lines = [line for line in metrics(tmp_path / "out") if line["kind"] == "train"]
    loader = make_loader(opened, batch=8, engine="reference")
    drawn = sum(record in loader.order.batch_of(step) for step in range(40))
    loader.close()
    assert sum(line["replaced"] for line in lines) == pytest.approx(drawn) and drawn > 0
