"""The commands of ``holdfast``."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import platformdirs
import typer
from rich.console import Console
from rich.table import Table

from holdfast.engine import Engine
from holdfast.engine.bundle import bundle
from holdfast.engine.cli.bar import wait
from holdfast.engine.cli.options import read_config, read_request, with_fields
from holdfast.engine.cli.showcase import make_showcase
from holdfast.engine.errors import HoldfastError, InvalidRequest, ModelSourceError
from holdfast.engine.logbook.cli import app as log_app
from holdfast.engine.logbook.story import size
from holdfast.engine.logbook.write import printable
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

    from holdfast.engine.doctor import Report

FAILURE, BAD_INPUT, INTERRUPTED = 1, 2, 130
_STYLES = {"wrong": "bold red", "note": "yellow"}

app = typer.Typer(
    name="holdfast",
    help="Diffusion images on OpenVINO, in two passes where wanted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(log_app, name="log")
app.command()(bundle)

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw; may be empty.")]
IsHires = Annotated[bool, typer.Option("--hires", help="Make it in two passes: hires fix.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]
CacheDir = Annotated[Path | None, typer.Option(metavar="PATH", help="Where exports are kept.")]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        return int(app(arguments, prog_name=app.info.name, standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return 0
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = "holdfast" if context is None else context.command_path
        _complain(f"{error.format_message()}\nSee {command} --help.")
        return BAD_INPUT


@app.callback(invoke_without_command=True)
def root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Hold what goes before every command."""
    if version:
        typer.echo(f"holdfast {metadata.version('holdfast')}")
        raise typer.Exit


@app.command()
@with_fields
def generate(
    prompt: Prompt,
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where the image goes, as PNG.")
    ] = Path("out.png"),
    first_pass: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the first pass goes, whatever the second does."),
    ] = None,
    hires: IsHires = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Make an image: from a prompt, from an image (--image), or in two passes (--hires)."""
    with _told(debug=debug):
        request = read_request(prompt, given, hires=hires)
        if first_pass is not None and not hires:
            msg = "--first-pass belongs to --hires: add that, or leave --first-pass out."
            raise InvalidRequest(msg)
        for file in filter(None, (output, first_pass)):
            _check_writable(file)
        with Engine(read_config(given)) as engine:
            job = engine.submit(request)
            try:
                result = wait(engine, job)
            finally:
                if first_pass is not None:
                    for image, file in _numbered(job.kept, first_pass):
                        image.save(file, "PNG")
                        typer.echo(f"{file}: first pass, {image.width}x{image.height}")
        files = result.save(output)
        for file, image, seed in zip(files, result.images, result.seeds, strict=True):
            typer.echo(f"{file}: {image.width}x{image.height}, seed {seed}")
        for each in result.degradations:
            _complain(f"{each.kind}: the model did not see {each.words!r}")


@app.command()
@with_fields
def plan(prompt: Prompt, *, hires: IsHires = False, debug: Debug = False, **given: Any) -> None:
    """Show what an image would take, and why: what is read, compiled, reused. Makes nothing."""
    with _told(debug=debug):
        request = read_request(prompt, given, hires=hires)
        with Engine(read_config(given)) as engine, _busy("finding the model"):
            made = engine.plan(request)
    typer.echo(str(made))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A diffusers folder, a hub id or .safetensors.")],
    output: Annotated[
        Path | None, typer.Argument(help="A new folder for it. By default it stays in the cache.")
    ] = None,
    *,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Convert a model to OpenVINO IR, once, and tell where it lies."""
    from holdfast.engine.source import resolve

    with _told(debug=debug):
        if output is not None and output.exists():
            msg = f"The model was to go to {output}, but that is there already: name a new folder."
            raise InvalidRequest(msg)
        cache = cache_dir or Path(platformdirs.user_cache_dir("holdfast"))
        with _busy(f"exporting {model} to OpenVINO"):
            found = resolve(model, cache, lambda *_, **__: None).path
            if output is not None:
                found = Path(shutil.copytree(found, output))
    typer.echo(str(found))


@app.command()
def chart() -> None:
    """Print the lifecycle's chart, as Mermaid, drawn from the machine that runs."""
    typer.echo(mermaid(), nl=False)


@app.command()
def doctor(
    *,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Look at this machine: what is there, what is wrong (it then ends with 1), what to do."""
    from holdfast.engine.doctor import examine

    with _told(debug=debug), _busy("looking"):
        report = examine(cache_dir)
    if json:
        typer.echo(report.to_json())
    else:
        _print_report(report)
    raise typer.Exit(0 if report.healthy else FAILURE)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the pictures go.")] = Path("demo"),
    *,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Show hires fix with the embedded model: both passes, a contact sheet, and the log."""
    with _told(debug=debug), _busy("drawing; the first time the model is exported"):
        told = make_showcase(folder, cache_dir)
    typer.echo(told)


@contextlib.contextmanager
def _told(*, debug: bool) -> Iterator[None]:
    """End with an exit code and a line of words where something failed."""
    try:
        yield
    except (typer.Exit, click.ClickException, BrokenPipeError):
        raise
    except KeyboardInterrupt as interrupt:
        _complain("interrupted")
        raise typer.Exit(INTERRUPTED) from interrupt
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        known = isinstance(error, (HoldfastError, OSError))
        _complain(str(error) if known else f"{error!r}; --debug shows where this comes from")
        asked = isinstance(error, (InvalidRequest, ModelSourceError))
        raise typer.Exit(BAD_INPUT if asked else FAILURE) from error


def _complain(words: str) -> None:
    for line in words.splitlines():
        typer.echo(f"holdfast: {printable(line)}", err=True)


def _busy(words: str) -> contextlib.AbstractContextManager[object]:
    """Show a sign of life where standard error is a terminal."""
    console = Console(stderr=True)
    return console.status(words) if console.is_terminal else contextlib.nullcontext()


def _check_writable(file: Path) -> None:
    """Refuse a file that could not be written, before minutes are spent on what goes into it."""
    if file.suffix.lower() != ".png":
        msg = f"{file} was asked for, but images are written as PNG: name a .png file."
        raise InvalidRequest(msg)
    if not file.expanduser().parent.is_dir():
        msg = f"The image was to go to {file}, but there is no folder {file.parent}: make it."
        raise InvalidRequest(msg)


def _numbered(images: Sequence[Image], first: Path) -> Iterator[tuple[Image, Path]]:
    for index, image in enumerate(images, start=1):
        yield image, first if index == 1 else first.with_stem(f"{first.stem}-{index}")


def _print_report(report: Report) -> None:
    table = Table.grid(padding=(0, 2))
    versions = (f"{name} {version or 'missing'}" for name, version in report.versions.items())
    table.add_row("libraries", ", ".join(versions))
    for extra, missing in report.missing.items():
        needs = f"needs {', '.join(missing)}: pip install 'holdfast[{extra}]'"
        table.add_row(f"extra {extra}", needs if missing else "installed")
    table.add_row("system", f"Python {report.python} on {report.platform}")
    table.add_row("processors", str(report.processors))
    for each in report.devices:
        can = ", ".join(each.capabilities)
        words = f"{each.full_name}, computes in {each.precision} unless told otherwise ({can})"
        table.add_row(f"device {each.name}", words)
    table.add_row("memory", _of(report.memory_free_bytes, report.memory_bytes))
    room = report.cache_bytes + report.cache_free_bytes
    table.add_row("cache", f"{report.cache_dir}: {_of(report.cache_free_bytes, room)}")
    for finding in report.findings:
        table.add_row(finding.kind, finding.what, style=_STYLES[finding.kind])
        table.add_row("", finding.do)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print("Holdfast can work here." if report.healthy else "Holdfast cannot work here.")


def _of(free: int, whole: int) -> str:
    return f"{size(free)} free of {size(whole)}"
