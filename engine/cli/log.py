"""
``holdfast log``: show, list, audit, replay and draw a log file.

Ends with 0, with 1 where a rule is broken, and with 2 where the input cannot be used.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from holdfast.engine.logbook.auditing import Verdict, audit
from holdfast.engine.logbook.events import PROMPT_KEYS
from holdfast.engine.logbook.reading import Entry, Problem, followed_lines, log_lines, read
from holdfast.engine.logbook.replay import courses, differences
from holdfast.engine.logbook.requests import requests_of
from holdfast.engine.logbook.rules import RULES
from holdfast.engine.logbook.sentences import Story
from holdfast.engine.logbook.writing import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from holdfast.engine.logbook.replay import Course

app = typer.Typer(help="Read what an engine did from its log alone.", no_args_is_help=True)

BROKEN, BAD_INPUT = 1, 2
_NARROWEST = 20
LogFile = Annotated[str, typer.Argument(metavar="FILE", help="A log of JSON lines; - is stdin.")]
Since = Annotated[str, typer.Option(help="From this time on: 14:05, 14:05:30 or ISO 8601 (UTC).")]
OfRequest = Annotated[str, typer.Option("--request", help="Only this request.")]
OfEngine = Annotated[str, typer.Option("--engine", help="Only this engine (or how its id begins).")]


class Format(StrEnum):
    """What ``holdfast log timeline`` writes."""

    HTML = "html"
    SVG = "svg"
    PERFETTO = "perfetto"


_FORMATS = {
    ".html": Format.HTML, ".htm": Format.HTML, ".svg": Format.SVG, ".json": Format.PERFETTO,
}  # fmt: skip


class Level(StrEnum):
    """Levels of events, the least first."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_SEVERITY = {level.value: severity for severity, level in enumerate(Level)} | {"critical": 4}
_ENDED = {"failed": "red", "refused": "red", "cancelled": "yellow", "cut": "yellow"}


def _severity(entry: Entry) -> int:
    return _SEVERITY.get(str(entry.event.get("level")), _SEVERITY["info"])


@app.command()
def show(
    file: LogFile,
    *,
    request: OfRequest = "",
    engine: OfEngine = "",
    since: Since = "",
    follow: Annotated[bool, typer.Option(help="Go on as the file grows.")] = False,
    level: Annotated[Level, typer.Option(help="From this level on.")] = Level.INFO,
    debug: Annotated[bool, typer.Option("--debug", help="The same as --level debug.")] = False,
) -> None:
    """Tell a log as a story."""
    console = Console(soft_wrap=True, highlight=False)
    wanted = _selection(request, engine, since)
    lowest = _SEVERITY["debug" if debug else level]
    story = Story()
    with _usable(), contextlib.suppress(KeyboardInterrupt):
        lines = followed_lines(file) if follow and file != "-" else log_lines(file)
        for item in _some(read(lines), wanted):
            if isinstance(item, Problem):
                if item.kind != "foreign":
                    console.print(Text(f"line {item.line}: {item.words}", style="dim red"))
            elif story.is_told(item) and wanted(item) and _severity(item) >= lowest:
                if day := story.day(item):
                    console.print(Text(day, "dim"))
                _print(console, *story.tell(item))


@app.command()
def requests(file: LogFile, *, engine: OfEngine = "", since: Since = "") -> None:
    """List the requests of a log: when, what, how long, how each ended, and where in the log."""
    console = Console(soft_wrap=True, highlight=False)
    wanted = _selection("", engine, since)
    with _usable():
        found = list(requests_of(_some(read(log_lines(file)), wanted)))
        chosen = [each for each in found if wanted(each.first)]
        if not chosen:
            raise _NoEventsError("no request is told of in it")
    width = max(len(each.request_id) for each in chosen)
    for each in chosen:
        where = Text(f"{each.first.at:%m-%d %H:%M:%S} {printable(each.request_id):{width}} ")
        _print(console, where, Text(each.words, _ENDED.get(each.ending, "")))


@app.command("audit")
def audit_command(
    file: LogFile,
    *,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules first.")] = False,
) -> None:
    """Hold a log against the rules; ends with 1 if one is broken."""
    if rules:
        for rule in RULES:
            typer.echo(f"{rule.id:16} {rule.words}")
    with _usable():
        verdict = audit(_some(read(log_lines(file))))
    if json:
        summary = {"clean": verdict.clean, "complete": verdict.complete}
        typer.echo(msgspec.json.encode(summary | msgspec.to_builtins(verdict)))
    else:
        _tell(verdict)
    raise typer.Exit(0 if verdict.clean else BROKEN)


@app.command()
def replay(
    file: LogFile,
    *,
    at: Annotated[str, typer.Option(help="A line number, or a time as for --since.")] = "",
    engine: OfEngine = "",
) -> None:
    """Tell where each engine stood at the end, or at a line or time, and check its snapshots."""
    standing: dict[str, Course] = {}
    differ = False
    with _usable():
        items = itertools.takewhile(_until(at), _some(read(log_lines(file))))
        for entry, course in courses(items):
            standing[course.engine_id] = course
            if entry.name == "engine.snapshot":
                for difference in differences(course, entry.event):
                    differ = True
                    typer.echo(f"line {entry.line}: snapshot differs: {difference}")
    for course in standing.values():
        if course.last and course.engine_id.startswith(engine):
            _print_standing(course, course.last)
    raise typer.Exit(BROKEN if differ else 0)


@app.command()
def timeline(
    file: LogFile,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write it.")],
    format: Annotated[  # noqa: A002 - the option's name
        Format | None, typer.Option(help="By default what the output's name ends in.")
    ] = None,
    request: OfRequest = "",
    engine: OfEngine = "",
    since: Since = "",
    prompts: Annotated[
        bool, typer.Option("--with-prompts", help="Show prompts, if the log has them.")
    ] = False,
) -> None:
    """Draw a log: a page to move about in, a picture, or a trace for ui.perfetto.dev."""
    from holdfast.engine.logbook.timeline import lanes

    kind = format or _FORMATS.get(output.suffix.lower())
    if kind is None:
        known = ", ".join(_FORMATS)
        raise typer.BadParameter(
            f"{output.name} ends in none of {known}: end it so, or give --format"
        )
    wanted = _selection(request, engine, since)
    with _usable():
        items = list(_some(read(log_lines(file)), wanted))
        entries = [
            item if prompts else _without_prompts(item)
            for item in items
            if isinstance(item, Entry) and wanted(item)
        ]
        drawn = lanes(entries)
        match kind:
            case Format.HTML:
                from holdfast.engine.logbook.page import page

                written = page(drawn, entries, audit(items), Path(file).name).encode()
            case Format.SVG:
                from holdfast.engine.logbook.drawing import svg

                written = svg(drawn).encode()
            case Format.PERFETTO:
                from holdfast.engine.logbook.perfetto import trace

                written = trace(drawn)
        output.write_bytes(written)
    typer.echo(f"{output}: {kind} of {len(entries)} events")


class _NoEventsError(ValueError):
    """A file holds no event of any engine, or none of those that were asked for."""


def _some(
    items: Iterable[Entry | Problem], wanted: Callable[[Entry], bool] = lambda _: True
) -> Iterator[Entry | Problem]:
    """Pass everything on, and raise at the end if no event was among it, or none is wanted."""
    found = chosen = False
    for item in items:
        found = found or isinstance(item, Entry)
        chosen = chosen or (isinstance(item, Entry) and wanted(item))
        yield item
    if not found:
        raise _NoEventsError("there is no event of a Holdfast engine in it")
    if not chosen:
        raise _NoEventsError(
            "no event in it is of the request, engine and time that were asked for"
        )


@contextlib.contextmanager
def _usable() -> Iterator[None]:
    """End with 2 and one line of words where the input cannot be used."""
    from holdfast.engine.logbook.timeline import TooMuch

    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, _NoEventsError, TooMuch) as error:
        typer.echo(f"holdfast log: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def _without_prompts(entry: Entry) -> Entry:
    told = {key: value for key, value in entry.event.items() if key not in PROMPT_KEYS}
    return entry._replace(event=told)


def _selection(request: str, engine: str, since: str) -> Callable[[Entry], bool]:
    begun = _reached(since) if since else lambda _: True

    def wanted(entry: Entry) -> bool:
        of_request = not request or entry.event.get("request_id") == request
        return of_request and entry.engine_id.startswith(engine) and begun(entry)

    return wanted


def _until(at: str) -> Callable[[Entry | Problem], bool]:
    """Read ``--at``: say of each line whether it is one to stop behind."""
    if at.isdecimal():
        return lambda item: item.line <= int(at)
    if not at:
        return lambda _: True
    reached = _reached(at)
    return lambda item: isinstance(item, Problem) or not reached(item)


def _reached(text: str) -> Callable[[Entry], bool]:
    """Read a time of any day, or one moment; say of an entry whether it has come to that."""
    with contextlib.suppress(ValueError):
        clock = dt.time.fromisoformat(text)
        return lambda entry: entry.at.astimezone(dt.UTC).time() >= clock
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a time nor ISO 8601: {error}") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    return lambda entry: entry.at >= moment


def _print(console: Console, where: Text, told: Text) -> None:
    """Print one event: on a terminal wrapped behind its time, elsewhere as one line."""
    if not console.is_terminal:
        typer.echo(f"{where.plain}{told.plain}")  # a third of what rich takes
        return
    margin = where.cell_len
    for part in told.wrap(console, max(_NARROWEST, console.width - margin)):
        console.print(where + part)
        where = Text(" " * margin)


def _tell(verdict: Verdict) -> None:
    console = Console(soft_wrap=True, highlight=False)
    words = {rule.id: rule.words for rule in RULES}
    for problem in verdict.problems:
        console.print(Text(f"line {problem.line}: {problem.kind}: {printable(problem.words)}"))
    for engine in verdict.engines:
        console.print(Text(f"engine {printable(engine.engine_id)}: {engine.events} events", "bold"))
        for breach in engine.breaches:
            where = f"  line {breach.line}, {breach.event} (seq {breach.seq}): "
            console.print(Text.assemble(where, (printable(breach.words), "red")))
            console.print(Text(f"    breaks {breach.rule!r}: {words[breach.rule]}", "dim"))
        for rule, count in engine.counts.items():
            if count > sum(breach.rule == rule for breach in engine.breaches):
                console.print(Text(f"  {rule}: {count} in all"))
        if engine.errors:
            told = ", ".join(f"{name} ({count})" for name, count in engine.errors.items())
            console.print(Text(f"  errors told: {printable(told)}", "yellow"))
        for missing in engine.missing:
            console.print(Text(f"  not all of it: {printable(missing)}", "yellow"))
    whole = "" if verdict.complete else " in what there is, and not all is there"
    console.print("rules are broken" if not verdict.clean else f"no rule is broken{whole}")


def _print_standing(course: Course, last: Entry) -> None:
    held = ", ".join(f"{name} {key}" for key, name in sorted(course.holdings.held.items()))
    under_way = ", ".join(str(span) for span in course.spans)
    snapshot = course.as_snapshot()
    for name, value in {
        f"engine {course.engine_id}": f"{course.events} events, to line {last.line}, {last.at}",
        "  state": snapshot["state"] or "not told: the log begins later",
        "  mode": snapshot["mode"],
        "  held": held,
        "  LoRA": "not told" if snapshot["lora"] is None else ", ".join(snapshot["lora"]),
        "  under way": under_way,
    }.items():
        typer.echo(printable(f"{name}: {value or 'none'}"))
