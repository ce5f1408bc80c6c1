"""The commands ``dbeta`` and ``dbeta-pretrain``: options in, one call out. Lazy imports keep help instant."""

import click

from dbeta.evaluation.commands import register as register_evaluate
from dbeta.one_line import Command, Group, PathType

SOURCES = ("mimic-iv-ecg", "ptb-xl", "cpsc2018", "csn", "cinc2021", "code-test", "code-15", "ptb", "sph", "synthetic")
DEVICE = click.Choice(["auto", "cpu", "cuda"])
FOLDER = PathType()
LENGTHS_HELP = "Records that are not 10 s: zero-padded if shorter; their first 10 s or the mean of windows if longer."


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--preset", help="smoke, paper, released, hopper, or a TOML file.  [default: smoke]")
@click.option("--data", type=FOLDER, help="Corpus made by `dbeta prepare`; without it, the built-in synthetic one.")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/PRESET-TIME]")
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in --out.")
@click.option("--compile/--no-compile", "compile_", default=None, help="torch.compile the step.")
@click.option("--device", type=DEVICE, help="Where to train.  [default: auto]")
@click.option("--seed", type=int, help="Seed of every random draw.  [default: 0]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value, e.g. train.steps=100."
)
@click.option("--show-examples", is_flag=True, help="Show a record in report.html even if it is not synthetic.")
def pretrain(preset, data, out, resume, compile_, device, seed, overrides, show_examples):
    """Pre-train D-BETA on a corpus of ECGs and reports."""
    from dbeta.config import Config
    from dbeta.pretrain import run

    given = {"runtime.compile": compile_, "runtime.device": device, "train.seed": seed}
    overrides = [*overrides, *(f"{key}={str(value).lower()}" for key, value in given.items() if value is not None)]
    stored = out / "config.json" if out else None
    if resume and preset is None and stored is not None and stored.is_file():
        config = Config.load_json(stored, overrides)
    else:
        config = Config.load(preset or "smoke", overrides)
    run(config, data=data, out=out, resume=resume, show_examples=show_examples)


@click.group(cls=Group, context_settings={"show_default": True})
@click.version_option(package_name="dbeta")
def main():
    """Pre-train and use D-BETA, a model that learns 12-lead ECGs and their reports together."""


@main.command()
@click.argument("source", type=click.Choice(SOURCES))
@click.argument("root", type=FOLDER, required=False)
@click.option("--out", type=FOLDER, required=True, help="Corpus folder to write.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Processes that read records.")
@click.option("--limit", type=click.IntRange(1), help="Stop after this many records (synthetic: make this many).")
@click.option("--seed", type=int, default=0, help="Of the record order, the split, and synthetic records.")
@click.option("--cleaning", type=click.Choice(["paper", "released"]), default="paper", help="Report cleaning.")
def prepare(source, root, out, workers, limit, seed, cleaning):
    """Read a data set's raw records into a corpus."""
    from dbeta.data.prepare import prepare

    prepare(source, root, out, workers=workers, limit=limit, seed=seed, cleaning=cleaning)


@main.command()
@click.argument("corpus", type=FOLDER)
@click.option(
    "--encoder", default="auto", help="Hub id or folder of a text encoder, or hashing (no model); auto: cached Flan-T5."
)
@click.option("--k", type=click.IntRange(1), default=64, help="Far reports kept for each report.")
@click.option("--device", type=DEVICE, default="auto", help="Where to embed and search.")
@click.option("--engine", type=click.Choice(["auto", "faiss", "torch"]), default="auto", help="Search engine.")
@click.option(
    "--remedy", type=click.Choice(["none", "centre", "local-scaling"]), default="none", help="Against hub reports."
)
def negatives(corpus, encoder, k, device, engine, remedy):
    """Find each report's farthest reports (N3S) and store the table that training draws from."""
    from dbeta.data.negatives import negatives

    negatives(corpus, encoder=encoder, k=k, device=device, engine=engine, remedy=remedy)


@main.command("import-checkpoint")
@click.argument("released", type=FOLDER)
@click.option("--config", type=FOLDER, help="The released JSON configuration, where the file carries none.")
@click.option("--lead-order", type=click.Choice(["canonical", "mimic"]), default="canonical", help="Of its ECGs.")
@click.option("--tokenizer", default="", help="Folder or hub id of its tokenizer (Flan-T5's), kept with the model.")
@click.option("--out", type=FOLDER, required=True, help="Model folder to write.")
def import_checkpoint(released, config, lead_order, tokenizer, out):
    """Turn a checkpoint of the authors' release into a model folder; prints what was mapped."""
    from dbeta.files import must_be_writable
    from dbeta.models.released import import_checkpoint

    must_be_writable(out / "model.safetensors")

    def say(line):
        click.echo(line, err=True)

    model = import_checkpoint(released, config, lead_order=lead_order, tokenizer=tokenizer, say=say)
    model.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{out}: {count:,} parameters, {len(model.state_dict())} tensors mapped from {released}")


def _reading(command):
    """The options of commands that put a user's records through a model."""
    for option in (
        click.option("--column", default="", help="Column of paths, where a PATH is a table."),
        click.option("--lengths", type=click.Choice(["crop", "mean"]), default="crop", help=LENGTHS_HELP),
        click.option("--batch", type=click.IntRange(1), default=64, help="Records computed at once."),
        click.option("--workers", type=click.IntRange(1), default=2, help="Threads that read records."),
        click.option("--device", type=DEVICE, default="auto", help="Where to compute."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("model")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--out", type=FOLDER, required=True, help="FILE.parquet or FILE.npz to write.")
@_reading
def embed(model, paths, out, column, lengths, batch, workers, device):
    """Features of records: files, folders, globs, tables of paths. Killed, the same command goes on."""
    from dbeta import DBeta
    from dbeta.use.embed import check_out, embed
    from dbeta.use.find import find_records

    check_out(out)
    names = find_records(paths, column)
    model = DBeta.from_pretrained(model, device=device)
    failures = embed(model, names, out, lengths=lengths, batch=batch, workers=workers)
    click.echo(f"{out}: features [{len(names) - len(failures)}, {model.config.width}]", err=True)
    _failed(failures)


@main.command()
@click.argument("model")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--prompts", type=FOLDER, required=True, help="JSON file {name: description or list of descriptions}.")
@click.option("--out", type=FOLDER, help="FILE.csv to write.  [default: show a table]")
@click.option("--tokenizer", default="", help="Folder or hub id, where the model has no tokenizer of its own.")
@_reading
def ask(model, paths, prompts, out, tokenizer, column, lengths, batch, workers, device):
    """Scores of your own descriptions for records: dot products that rank records, not probabilities."""
    from dbeta import DBeta
    from dbeta.evaluation.prompts import read_prompts
    from dbeta.files import must_be_writable
    from dbeta.use.embed import ask, show, write_table
    from dbeta.use.find import find_records

    if out:
        must_be_writable(out)
    texts, names = read_prompts(prompts), find_records(paths, column)
    model = DBeta.from_pretrained(model, tokenizer=tokenizer, device=device)
    rows, failures = ask(model, names, texts, lengths=lengths, batch=batch, workers=workers)
    if out:
        write_table(out, ("record", *texts), rows)
        click.echo(f"{out}: {len(rows):,} records, {len(texts)} descriptions", err=True)
    else:
        _print(show(("record", *texts), rows))
    _failed(failures)


def _print(table):
    """A table to standard output, in full width where that is not a terminal."""
    import sys

    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def _failed(failures):
    """Name what could not be read, and end with exit code 1."""
    for name, reason in failures[:20]:
        click.echo(f"{name}: {reason}", err=True)
    if failures:
        raise click.ClickException(f"{len(failures):,} records could not be read; the rest is done")


@main.command()
@click.argument("path", type=FOLDER)
@click.option("--checksums", is_flag=True, help="Verify every byte of a corpus.")
@click.option("--splits", type=FOLDER, help="Audit a folder of published split files as well.")
@click.option("--against", type=FOLDER, multiple=True, help="Another corpus in which to search for the same signals.")
@click.option("--json", "out", type=FOLDER, help="Write all that was found as JSON.")
@click.option("--limit", type=click.IntRange(1), help="Look at this many records only.")
def doctor(path, checksums, splits, against, out, limit):
    """What is in a folder of records or a corpus; exit code 1 where something would be rejected."""
    import json

    from dbeta.files import must_be_writable, write_whole
    from dbeta.use.doctor import examine, show

    if out:
        must_be_writable(out, option="--json")
    survey = examine(path, checksums=checksums, splits=splits, against=against, limit=limit)
    _print(show(survey))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(survey.to_dict(), indent=1))
    if not survey.sound:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("model")
@click.option("--out", type=FOLDER, required=True, help="FILE.pt2 (torch.export) or FILE.onnx to write.")
def export(model, out):
    """The ECG encoder for other runtimes, checked against PyTorch."""
    from dbeta import DBeta
    from dbeta.files import must_be_writable
    from dbeta.use.export import KINDS, export

    must_be_writable(out, KINDS)
    model = DBeta.from_pretrained(model)
    worst = export(model, out)
    shape = f"ecg float32 [B, {model.config.leads}, {model.config.samples}] -> features [B, {model.config.width}]"
    click.echo(f"{out}: {shape}; differs from PyTorch by {worst:.1e}", err=True)


register_evaluate(main)

if __name__ == "__main__":
    main()
