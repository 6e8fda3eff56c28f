"""A log as lanes of bars over time: what the page, the picture and the Perfetto trace all show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.engine.logbook.reading import Entry
from holdfast.engine.logbook.sentences import seconds, words
from holdfast.engine.logbook.spans import SPAN_EVENTS, OpenSpans, Span
from holdfast.engine.logbook.writing import printable
from holdfast.states import State

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Iterator

    from holdfast.engine.logbook.reading import Problem


class TooMuch(ValueError):  # noqa: N818 - says what the log is, as a sentence does
    """A log has nothing to draw, or more than a page can show."""


_LANES = ("state", "jobs", "waiting", "requests", "passes", "steps")
_LANE_OF = {
    "job": "jobs",
    "request": "requests",
    "pass": "passes",
    "export": "export",
    "imports": "imports",
    "download": "download",
}
_LAST = "events"
_LASTING = frozenset({"held", *(state.value for state in State)})


@dataclass(frozen=True)
class Bar:
    """
    Something on a lane, from one moment to another.

    Attributes:
        begin: Where it begins.
        end: Where it ends; the same moment for an instant.
        label: Short, for the bar itself.
        kind: What it is: a state's name, ``"waiting"``, ``"held"``, ``"step"``, ``"told"``,
            ``"warning"``, ``"error"``, a pass's mode, or a span's prefix; with ``" failed"``,
            ``" cancelled"`` or ``" cut"`` after it where it did not end well.
        details: All of it, for a reader who points at it: printable lines.
        line: Line in the log of the event that it begins with, from 1.
    """

    begin: dt.datetime
    end: dt.datetime
    label: str
    kind: str
    details: str
    line: int

    @property
    def lasts(self) -> bool:
        """Whether it goes on while nothing is done: a state, or a component that is held."""
        return self.kind.partition(" ")[0] in _LASTING


@dataclass
class Lanes:
    """
    One engine's lanes.

    Attributes:
        engine_id: The engine.
        bars: The bars of each lane, by its name, in the order in which they ended.
        memory: Resident bytes by moment.
    """

    engine_id: str
    bars: dict[str, list[Bar]] = field(default_factory=lambda: {lane: [] for lane in _LANES})
    memory: list[tuple[dt.datetime, float]] = field(default_factory=list)

    def lanes(self) -> Iterator[tuple[str, list[list[Bar]]]]:
        """Give each lane in the order of reading, in rows in which no two bars overlap."""
        for lane in sorted(self.bars, key=_reading_order):
            rows: list[list[Bar]] = []
            for bar in sorted(self.bars[lane], key=lambda bar: bar.begin):
                free = (row for row in rows if row[-1].end <= bar.begin)
                row = next(free, None)
                if row is None:
                    rows.append(row := [])
                row.append(bar)
            if rows:
                yield lane, rows


def _reading_order(lane: str) -> tuple[int, str]:
    if lane in _LANES:
        return _LANES.index(lane), lane
    return len(_LANES) + (lane == _LAST), lane


def lanes(items: Iterable[Entry | Problem]) -> list[Lanes]:
    """Sort a log's events into the lanes of each engine, in the order in which engines appear."""
    drawn: dict[str, _Drawing] = {}
    for item in items:
        if isinstance(item, Entry):
            drawn.setdefault(item.engine_id, _Drawing(item)).take(item)
    return [drawing.finish() for drawing in drawn.values()]


class _Drawing:
    def __init__(self, first: Entry) -> None:
        self._lanes = Lanes(first.engine_id)
        self._spans = OpenSpans()
        self._since = first
        self._last = first
        self._held: dict[str, Entry] = {}
        self._queued: dict[str, Entry] = {}
        self._requests: set[str] = set()

    def take(self, entry: Entry) -> None:
        self._last = entry
        event, level = entry.event, entry.event.get("level")
        if entry.name.startswith("job.") and self._is_request(entry):
            return  # the request that it is has bars of its own
        span = self._spans.fold(entry)
        if rss := event.get("rss_bytes"):
            self._lanes.memory.append((entry.at, rss))
        if span:
            self._span(span, entry)
        elif entry.name == "state.changed":
            self._state(str(event.get("source")), entry)
        elif entry.name == "component.evicted":
            self._kept(str(event.get("key")), entry)
        elif entry.name == "request.queued":
            self._queued[str(event.get("request_id"))] = entry
        elif entry.name == "step.completed":
            self._add("steps", entry, entry, str(event.get("step")), "step")
        elif level in ("warning", "error"):
            self._add(_LAST, entry, entry, entry.name, level)
        elif level != "debug" and entry.name not in SPAN_EVENTS:
            self._add(_LAST, entry, entry, entry.name, "told")

    def finish(self) -> Lanes:
        """Draw what has no end up to the last event."""
        for span in self._spans:
            self._bar(span, self._last, " cut")
        for request in tuple(self._queued):
            self._wait_ends(request, self._last, " cut")
        for key in tuple(self._held):
            self._kept(key, self._last)
        if self._since is not self._last or not any(self._lanes.bars.values()):
            self._state(str(self._since.event.get("dest", State.UNLOADED)), self._last)
        return self._lanes

    def _span(self, span: Span, entry: Entry) -> None:
        ending = entry.name.rpartition(".")[2]
        self._bar(span, entry, "" if ending == "completed" else f" {ending}")
        if entry.name == "component.compile.completed":
            self._held[str(entry.event.get("key"))] = entry

    def _bar(self, span: Span, end: Entry, how: str) -> None:
        facts = span.started.event
        lane = _LANE_OF.get(span.prefix, str(facts.get("component")))
        label = {
            "request": str(facts.get("request_id")),
            "job": str(facts.get("request_id")),
            "pass": f"{facts.get('pass')} {facts.get('mode')}",
        }.get(span.prefix, span.prefix.rpartition(".")[2])
        kind = str(facts.get("mode")) if span.prefix == "pass" else span.prefix
        self._add(lane, span.started, end, label, f"{kind}{how}")

    def _is_request(self, job: Entry) -> bool:
        """Take in what happens to a job, and return whether it is one that waited as a request."""
        request = str(job.event.get("request_id"))
        if request in self._queued:
            self._wait_ends(request, job, " cancelled" if job.name == "job.cancelled" else "")
            self._requests.add(request)
        return request in self._requests

    def _wait_ends(self, request: str, entry: Entry, how: str) -> None:
        self._add("waiting", self._queued.pop(request), entry, f"{request} waits", f"waiting{how}")

    def _state(self, state: str, entry: Entry) -> None:
        self._add("state", self._since, entry, state, state)
        self._since = entry

    def _kept(self, key: str, entry: Entry) -> None:
        if since := self._held.pop(key, None):
            self._add(str(since.event.get("component")), since, entry, f"held {key}", "held")

    def _add(self, lane: str, begin: Entry, end: Entry, label: str, kind: str) -> None:
        told = dict.fromkeys((_moment(begin), _moment(end)))
        facts = {**begin.event, **end.event}
        details = "\n".join(
            [
                f"{printable(label)}  {_lasted(begin, end)}",
                *told,
                *(printable(f"{key}: {value}") for key, value in facts.items() if key not in _TOLD),
            ]
        )
        until = max(begin.at, end.at)
        bar = Bar(begin.at, until, printable(label), kind, details, begin.line)
        self._lanes.bars.setdefault(printable(lane), []).append(bar)


_TOLD = ("event", "seq", "timestamp", "level", "engine_id", "seconds")


def _moment(entry: Entry) -> str:
    return printable(f"{entry.at:%H:%M:%S.%f} line {entry.line}: {words(entry)}")


def _lasted(begin: Entry, end: Entry) -> str:
    return "" if begin is end else seconds((end.at - begin.at).total_seconds())
