"""``dbeta-bench``: every benchmark of the project, as JSON that can be compared and tabulated. No logic here."""

import importlib

import click

from dbeta.one_line import Group, PathType

BENCHMARKS = ("kernels", "attention", "loader", "negatives", "step", "ranks", "encode")


def _options(command):
    for option in (
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--against", type=PathType(exists=True, dir_okay=False), help="Older results."),
        click.option("--out", type=PathType(dir_okay=False), help="Write the results as JSON."),
    ):
        command = option(command)
    return command


def _run(names, out, against, device, **options) -> None:
    from dbeta.runtime import resolve_device
    from dbeta_bench import results

    failed, rows = [], {}
    older = results.load(against) if against else None
    where = str(resolve_device(device))
    for name in names:
        click.echo(f"== {name}")
        try:
            rows[name] = importlib.import_module(f"dbeta_bench.{name}").run(device=where, say=click.echo, **options)
        except (ArithmeticError, AssertionError) as error:  # a check in front of a time has failed
            failed.append(f"{name}: {error}")
    document = results.document(where, rows)
    if out:
        results.save(out, document)
        click.echo(f"written: {out}")
    for line in results.compare(document, older) if older else ():
        click.echo(line)
    if failed:
        raise click.ClickException("; ".join(failed))


@click.group(cls=Group)
def main() -> None:
    """Measure dbeta on this machine."""


@main.command()
@_options
@click.option("--compile-only", is_flag=True, help="Compile every tuned configuration for sm_90; print its resources.")
@click.option("--operator", "operators", multiple=True, help="Only this one (may be repeated).")
def kernels(out, against, device, compile_only, operators) -> None:
    """Fused operators against their references, torch.compile and peers."""
    if not compile_only:
        return _run(["kernels"], out, against, device, operators=operators)
    if out or against or operators:
        raise click.UsageError("--compile-only prints a table of all configurations; it takes no other option")
    from dbeta_kernels import aot

    click.echo(aot.table(aot.compile_all()))


def _plain(name: str, summary: str) -> None:
    @main.command(name, help=summary)
    @_options
    def command(out, against, device) -> None:
        _run([name], out, against, device)


_plain("attention", "Attention back-ends on the shapes of the network.")
_plain("loader", "Records per second of the loaders.")


@main.command()
@_options
@click.option("--reports", multiple=True, type=click.IntRange(128), help="Unique reports (may be repeated): 10000.")
@click.option("--whole", is_flag=True, help="Also build each whole table, with its time and peak memory.")
def negatives(out, against, device, **options) -> None:
    """Embedding, search and draw of N3S negatives."""
    _run(["negatives"], out, against, device, **options)


@main.command()
@_options
@click.option("--workload", "workloads", multiple=True, help="real or uniformN (may be repeated).")
@click.option("--provider", "providers", multiple=True, help="Only this one (may be repeated).")
@click.option("--batch", type=click.IntRange(1), help="Records per step: 8, on a GPU 128.")
def step(out, against, device, **options) -> None:
    """One training step: dense, compiled, with exact removals, with kernels, and all of it."""
    _run(["step"], out, against, device, **options)


_plain("ranks", "The ETS loss over several processes: round the ring, and gathered.")
_plain("encode", "ECG features from a trained model: latency and throughput.")


@main.command("all")
@_options
def everything(out, against, device) -> None:
    """All benchmarks; a failed check is reported at the end."""
    _run(BENCHMARKS, out, against, device)


if __name__ == "__main__":
    main()
