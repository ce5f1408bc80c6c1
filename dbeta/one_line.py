"""Every mistake on the command line is one line on standard error and exit code 2. For all commands of the project."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


class Mistake(click.ClickException):
    """What a user can put right."""

    exit_code = 2


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn what the code within raises into a ``Mistake``: neither a traceback nor click's lines of usage."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # a command alone shows its help
        raise
    except click.UsageError as error:
        said = _flat(error.format_message()).rstrip(".")
        where = error.ctx.command_path if error.ctx else ""
        raise Mistake(f"{where}: {said} (see {where} --help)" if where else said) from error
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        raise Mistake(_flat(str(error))) from error


class PathType(click.Path):
    """A path, as a ``Path``; an empty one, as an unset shell variable gives, would be the folder one is in."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; give one, or . for this folder", param, ctx)
        return super().convert(value, param, ctx)


def _flat(text: str) -> str:
    return " ".join(text.split())


class _OneLine(click.Command):
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line():
            return super().invoke(ctx)


class Command(_OneLine):
    """A command whose mistakes are one line."""


class Group(_OneLine, click.Group):
    """A group of such commands and groups."""

    command_class = Command
    group_class = type
