"""How a command ends where something failed: an exit code, and words on standard error."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING

import click
import typer

from holdfast.engine.cli.words import in_options
from holdfast.engine.errors import HoldfastError, InvalidRequest, ModelSourceError
from holdfast.engine.logbook.writing import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILURE, BAD_INPUT, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def ended_in_words(*, debug: bool) -> Iterator[None]:
    """End with an exit code and a line of words where something failed."""
    try:
        yield
    except (typer.Exit, click.ClickException, BrokenPipeError):
        raise
    except KeyboardInterrupt as interrupt:
        complain("interrupted")
        raise typer.Exit(INTERRUPTED) from interrupt
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        known = isinstance(error, (HoldfastError, OSError))
        complain(
            in_options(str(error)) if known else f"{error!r}; --debug shows where this comes from"
        )
        asked = isinstance(error, (InvalidRequest, ModelSourceError))
        raise typer.Exit(BAD_INPUT if asked else FAILURE) from error


def complain(words: str) -> None:
    """Write words on standard error, each line as the command's own."""
    for line in words.splitlines():
        typer.echo(f"holdfast: {printable(line)}", err=True)
