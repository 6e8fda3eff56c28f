"""The timeline as one HTML page that needs nothing else: hover, zoom, search, verdict and story."""

from __future__ import annotations

import html
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from holdfast.engine.logbook.coverage import coverage
from holdfast.engine.logbook.drawing import LABELS, LETTER, MARGIN, legend, svg
from holdfast.engine.logbook.sentences import Story, seconds
from holdfast.engine.logbook.writing import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from holdfast.engine.logbook.auditing import Verdict
    from holdfast.engine.logbook.reading import Entry
    from holdfast.engine.logbook.timeline import Lanes

_STYLED = ("error", "warning", "debug")


def page(engines: Sequence[Lanes], entries: Sequence[Entry], verdict: Verdict, title: str) -> str:
    """
    Put a log on one page.

    Args:
        engines: What is drawn.
        entries: The events, told one by one below the drawing.
        verdict: Of the whole log, told above them.
        title: For a person; file names of any kind are safe.

    Raises:
        TooMuch: As `holdfast.engine.logbook.drawing.svg` does.
    """
    template = files("holdfast.engine.logbook").joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(
        title=html.escape(printable(title)),
        drawing=svg(engines).partition("?>")[2],
        legend=legend(),
        verdict="\n".join((*_judged(verdict), *_covered(entries))),
        story="\n".join(_told(entries)),
        labels=LABELS,
        letter=LETTER,
        margin=MARGIN,
    )


def _judged(verdict: Verdict) -> Iterator[str]:
    def told(words: str, level: str = "", link: str = "") -> str:
        return f'<p class="{level}">{link}{html.escape(printable(words))}</p>'

    if verdict.clean:
        yield told(f"No rule is broken{'' if verdict.complete else ' in what there is'}.")
    for engine in verdict.engines:
        name = f"engine {engine.engine_id}"
        for breach in engine.breaches:
            link = f'<a data-line="{breach.line}">Line {breach.line}</a>, '
            yield told(f"{breach.event} breaks {breach.rule!r}: {breach.words}", "error", link)
        if engine.errors:
            errors = ", ".join(f"{error} ({count})" for error, count in engine.errors.items())
            first = engine.first_error
            link = f'<a data-line="{first}">Line {first}</a>, ' if first else ""
            yield told(f"the first of the errors told by {name}: {errors}.", "error", link)
        for missing in engine.missing:
            yield told(f"Not all of {name} is there: {missing}.", "warning")
    for problem in verdict.problems:
        yield told(f"Line {problem.line}, {problem.kind}: {problem.words}.", "warning")


def _covered(entries: Iterable[Entry]) -> Iterator[str]:
    for engine, told in coverage(entries).items():
        words = (
            f"Of the {seconds(told.seconds)} that jobs of engine {printable(engine)} took, "
            f"{seconds(told.unexplained)} ({told.share:.0%}) are explained by no event."
        )
        yield f'<p class="debug">{html.escape(words)}</p>'


def _told(entries: Iterable[Entry]) -> Iterator[str]:
    story = Story()
    for entry in entries:
        if day := story.day(entry):
            yield f'<li class="day">{day}</li>'
        where, told = story.tell(entry)
        level = entry.event.get("level") if story.is_told(entry) else "debug"
        style = f' class="{level}"' if level in _STYLED else ""
        name = html.escape(printable(entry.name))
        text = html.escape((where + told).plain)
        yield f'<li value="{entry.line}"{style} data-event="{name}">{text}</li>'
