"""The commands of ``holdfast``."""

from __future__ import annotations

import contextlib
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import msgspec
import typer
from rich.console import Console
from rich.table import Table

from holdfast.engine import Engine
from holdfast.engine.cli.bar import wait
from holdfast.engine.cli.endings import (
    BAD_INPUT,
    FAILURE,
    complain,
    ended_in_words,
)
from holdfast.engine.cli.help import Sections
from holdfast.engine.cli.log import app as log_app
from holdfast.engine.cli.options import (
    read_changes,
    read_config,
    read_request,
    with_fields,
    with_settings,
)
from holdfast.engine.cli.orders import Order, read_orders, with_loras
from holdfast.engine.cli.outputs import Leaving
from holdfast.engine.cli.serving import serve
from holdfast.engine.cli.showcase import make_showcase
from holdfast.engine.cli.words import in_options, of_usage
from holdfast.engine.errors import (
    GenerationError,
    InvalidRequest,
)
from holdfast.engine.logbook.bundle import bundle
from holdfast.engine.logbook.sentences import size
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.engine.cli.doctor import Report
    from holdfast.engine.compiling.plan import Plan

_STYLES = {"wrong": "bold red", "note": "yellow"}

app = typer.Typer(
    name="holdfast",
    help="Diffusion images on OpenVINO: txt2img, img2img and hires fix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables leave twenty columns for words on a terminal of eighty
    add_completion=False,
)
app.add_typer(log_app, name="log")

_prompt = typer.Argument(metavar="PROMPT", help="What to draw, in quotes; may be empty.")
Prompt = Annotated[str, _prompt]
MaybePrompt = Annotated[str | None, _prompt]
AsJson = Annotated[bool, typer.Option("--json", help="Tell it as JSON, for machines.")]
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
        complain(f"{of_usage(error)}\nSee {command} --help.")
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


@app.command(cls=Sections)
@with_fields
def generate(
    prompt: MaybePrompt = None,
    *,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Many prompts on one engine: one a line, or CSV whose first line names columns "
            "'prompt' and options such as 'seed'; - for standard input.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Where the image goes; its ending says the format; - for standard output. "
            "{n} and {seed} stand for an image's number and seed, as in '{n:03}-{seed}.png'. By "
            "default out.png, or out-2.png and so on where that is taken.",
        ),
    ] = None,
    first_output: Annotated[
        str | None,
        typer.Option(
            "--first-pass",
            metavar="FILE",
            help="Where the first pass goes, whatever the second does.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    metadata: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What an image tells of how it was made: public, full (with source images and "
            "paths) or none.",
        ),
    ] = "public",
    hires: IsHires = False,
    json: AsJson = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Make images: from a prompt, from an image, in two passes."""
    with ended_in_words(debug=debug):
        if first_output is not None and not hires:
            msg = "--first-pass belongs to --hires: add that, or leave --first-pass out."
            raise InvalidRequest(msg)
        orders = read_orders(prompt, prompts, given, hires=hires)
        leaving = Leaving(output, first_output, force=force, metadata=metadata, as_json=json)
        leaving.check(order.request for order in orders)
        with Engine(read_config(given)) as engine:
            drawn = [_draw(engine, order, leaving) for order in orders]
        if not all(drawn):
            raise typer.Exit(FAILURE)


def _draw(engine: Engine, order: Order, leaving: Leaving) -> bool:
    """Make the images of one order; among many, one that fails does not stop the others."""
    job = engine.submit(order.request)
    first = order.request.seed or 0
    seeds: Sequence[int] = range(first, first + order.request.batch)
    try:
        result = wait(engine, job)
        seeds = result.seeds
    except (InvalidRequest, GenerationError) as error:
        if not order.place:
            raise
        complain(f"{order.place}: {in_options(str(error))}")
        return False
    finally:
        leaving.first_passes(job.kept, seeds)
    leaving.images(result)
    for each in result.degradations:
        complain(f"{each.kind}: {each.asked} was asked for, {each.given} is given")
    return True


@app.command(cls=Sections, short_help="Make an image again from its file, or one like it.")
@with_fields
def again(
    picture: Annotated[str, typer.Argument(help="A PNG, JPEG, WEBP or AVIF of any program.")],
    *,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="As for generate.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: AsJson = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """
    Make an image again from what its file tells, or another with some options changed.

    Holdfast's own come out the same. Of other programs' what cannot be had is told.
    """
    from holdfast.engine.results.recipes import recipe_from_image

    with ended_in_words(debug=debug):
        config = read_config(given)
        recipe = recipe_from_image(picture, **read_changes(given))
        request = with_loras(recipe.request, config.lora_dir)
        for each in recipe.lost:
            complain(f"{recipe.program}'s {each}")
        leaving = Leaving(output, None, force=force, metadata="public", as_json=json)
        leaving.check([request])
        with Engine(config) as engine:
            if recipe.fingerprint not in {"", engine.model_facts().fingerprint}:
                complain("the image was made with another model; name it with --model")
            _draw(engine, Order(request), leaving)


@app.command(cls=Sections)
@with_fields
def plan(
    prompt: Prompt,
    *,
    hires: IsHires = False,
    json: AsJson = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Show what an image would take, and why. Makes nothing."""
    with ended_in_words(debug=debug):
        request = read_request(prompt, given, hires=hires)
        with Engine(read_config(given)) as engine, _busy("finding the model"):
            made = engine.plan(request)
    typer.echo(_plan_as_json(made) if json else str(made))


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
    """Convert a model to OpenVINO IR and tell where it lies."""
    from holdfast.engine.models.source import resolve
    from holdfast.engine.requests.config import users_cache

    with ended_in_words(debug=debug):
        if output is not None and output.exists():
            msg = f"The model was to go to {output}, but that is there already: name a new folder."
            raise InvalidRequest(msg)
        cache = cache_dir or users_cache()
        with _busy(f"exporting {model} to OpenVINO"):
            found = resolve(model, cache, lambda *_, **__: None).path
            if output is not None:
                found = Path(shutil.copytree(found, output))
    typer.echo(str(found))


app.command(cls=Sections)(with_settings(serve))


@app.command()
def chart() -> None:
    """Print the lifecycle's chart as Mermaid."""
    typer.echo(mermaid(), nl=False)


@app.command()
def doctor(
    *,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """
    Look at this machine: what is there, what is wrong, what to do.

    Ends with 1 where something keeps an engine from working.
    """
    from holdfast.engine.cli.doctor import examine

    with ended_in_words(debug=debug), _busy("looking"):
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
    """Draw hires fix with the embedded model: both passes, and why."""
    with ended_in_words(debug=debug), _busy("drawing; the first time the model is exported"):
        told = make_showcase(folder, cache_dir)
    typer.echo(told)


app.command(short_help="Pack what a bug report needs, without prompts and paths.")(bundle)


def _busy(words: str) -> contextlib.AbstractContextManager[object]:
    """Show a sign of life where standard error is a terminal."""
    console = Console(stderr=True)
    return console.status(words) if console.is_terminal else contextlib.nullcontext()


def _plan_as_json(made: Plan) -> str:
    steps = [
        {
            "action": step.action,
            "subject": step.subject,
            "reason": step.reason,
            "seconds": step.cost.seconds,
            "bytes": step.cost.bytes,
        }
        for step in made.steps
    ]
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "steps": steps,
                "seconds": made.expected_seconds,
                "peak_bytes": None if made.ahead else made.peak_bytes,
                "budget": made.budget,
                "fits": None if made.ahead else made.fits,
            }
        )
    ).decode()


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
    if report.cache_dir is not None:
        room = report.cache_bytes + report.cache_free_bytes
        table.add_row("cache", f"{report.cache_dir}: {_of(report.cache_free_bytes, room)}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    for finding in report.findings:
        console.print(f"\n{finding.kind}: {finding.what}", style=_STYLES[finding.kind])
        console.print(finding.do, soft_wrap=True)  # a command that is broken cannot be copied
    console.print()
    console.print("Holdfast can work here." if report.healthy else "Holdfast cannot work here.")


def _of(free: int, whole: int) -> str:
    return f"{size(free)} free of {size(whole)}"
