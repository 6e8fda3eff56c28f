"""Where an engine stood: its events folded, one by one, with the chart that the engine obeys."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.engine.logbook.holdings import Holdings, lora_set
from holdfast.engine.logbook.reading import Entry
from holdfast.engine.logbook.spans import OpenSpans
from holdfast.states import CHART, IllegalTransition, Mode, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from holdfast.engine.logbook.reading import Problem

_AGAIN = "asked for"
"""Reason of a recompile that a host asked for though nothing had changed."""
_MODE_OF: Mapping[str, Mode] = {
    make(mode): mode for mode in Mode for make in (Trigger.load, Trigger.switch)
}


def step_of(event: Mapping[str, Any]) -> str | None:
    """Return the step of a plan that `event` says was done, as a plan writes it."""
    if event["event"] == "component.compile.completed":
        return f"compile {event.get('component')} {event.get('key')}"
    if event["event"] == "state.changed":
        trigger = str(event.get("trigger"))
        if trigger == Trigger.RECOMPILE:
            return f"recompile {event.get('origin')}"
        if trigger in _MODE_OF:
            return f"{trigger.split('-', maxsplit=1)[0]} {_MODE_OF[trigger]}"
    return None


@dataclass
class Run:
    """
    One request under way.

    Attributes:
        started: The event ``request.started``.
        passes: The latest event of each pass, by its number.
        steps: How many ``step.completed`` the pass under way has told, by image.
        upscale: The event ``upscale.completed``, once there is one.
        made: Digest of what was made last: by a pass, an upscale, a cut or a paste.
        picture: Digest of the whole pictures, or their latents, as they stand.
        cut: The event ``region.cut`` of the region that is being redrawn; None outside of one.
    """

    started: Mapping[str, Any]
    passes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    upscale: Mapping[str, Any] | None = None
    made: object = None
    picture: object = None
    cut: Mapping[str, Any] | None = None

    def make(self, event: Mapping[str, Any]) -> None:
        """Take in what was made; outside of a region it is the whole pictures."""
        self.made = event.get("output_digest")
        if self.cut is None:
            self.picture = self.made


@dataclass
class Course:
    """
    One engine, as far as its log has been read.

    Attributes:
        engine_id: The engine.
        events: Number of events folded.
        first_seq: `seq` of the first event; over 1 where the log begins late.
        seq: Highest `seq` so far.
        last: The latest event.
        state: The lifecycle state; None where the log began later than the engine.
        holdings: The components that are held and in service.
        spans: What has begun and not ended.
        runs: Requests under way, by their id.
        job: The job that is being done; None where none is, or the log does not tell.
        again: Whether a recompile of everything that serves was asked for and is under way.
        unfit: The job whose plan does not fit into the memory budget; None where there is none.
        planned: What the plan in force still expects to be done; None where there is none.
        degraded: Kinds of degradation that were told.
        debug: Whether events of level debug are in the log.
        closed: Whether the engine was closed.
    """

    engine_id: str
    events: int = 0
    first_seq: int = 0
    seq: int = 0
    last: Entry | None = None
    state: str | None = None
    holdings: Holdings = field(default_factory=Holdings)
    spans: OpenSpans = field(default_factory=OpenSpans)
    runs: dict[str, Run] = field(default_factory=dict)
    job: str | None = None
    again: bool = False
    unfit: str | None = None
    planned: Counter[str] | None = None
    degraded: set[str] = field(default_factory=set)
    debug: bool = False
    closed: bool = False

    @property
    def mode(self) -> Mode | None:
        """The mode in service, or the one that a recompile began in."""
        return State(self.state).mode if self.state in set(State) else None

    def fold(self, entry: Entry) -> None:
        """Take in the engine's next event."""
        event, seq = entry.event, entry.seq
        self.first_seq = self.first_seq or seq
        self.seq = max(self.seq, seq)
        self.events += 1
        self.last = entry
        if event.get("level") == "debug":
            self.debug = True
        self.spans.fold(entry)
        if folding := _FOLDS.get(event["event"]):
            folding(self, event)

    def run_of(self, event: Mapping[str, Any]) -> Run | None:
        """Return the request under way that `event` belongs to."""
        return self.runs.get(str(event.get("request_id")))

    def as_snapshot(self) -> dict[str, Any]:
        """Return what ``engine.snapshot`` should say here."""
        loras = frozenset() if self.state == State.UNLOADED else self.holdings.loras
        return {
            "state": self.state,
            "mode": self.mode,
            "held": sorted(self.holdings.held),
            "lora": None if loras is None else sorted(loras),
        }


def _opened(course: Course, _: Mapping[str, Any]) -> None:
    course.state = State.UNLOADED.value


def _closed(course: Course, _: Mapping[str, Any]) -> None:
    course.closed = True


def _moved(course: Course, event: Mapping[str, Any]) -> None:
    try:
        course.state = CHART.dest(str(event.get("trigger")), course.state or "").value
    except IllegalTransition:
        course.state = str(event.get("dest"))
    if course.state == State.UNLOADED:
        course.holdings = Holdings()
    elif event.get("trigger") == Trigger.RECOMPILE_ROLLED_BACK:
        course.holdings.roll_back()
    else:
        course.holdings.commit()
    _did(course, event)
    recompiling = event.get("trigger") == Trigger.RECOMPILE
    course.again = recompiling and event.get("reason") == _AGAIN


def _compiled(course: Course, event: Mapping[str, Any]) -> None:
    course.holdings.compile(event)
    _did(course, event)


def _evicted(course: Course, event: Mapping[str, Any]) -> None:
    course.holdings.evict(event)


def _reused(course: Course, event: Mapping[str, Any]) -> None:
    course.holdings.reuse(event)


def _snapped(course: Course, _: Mapping[str, Any]) -> None:
    course.holdings.commit()


def _planned(course: Course, event: Mapping[str, Any]) -> None:
    course.planned = Counter(str(step) for step in event.get("steps") or ())
    course.unfit = course.job if event.get("fits") is False else None


def _off_plan(course: Course, _: Mapping[str, Any]) -> None:
    """After a failure or a demand to stop, what is done is undoing: no plan says how."""
    course.planned = None
    course.holdings.drop_staged()


def _stopped(course: Course, event: Mapping[str, Any]) -> None:
    """A job that merely waits can be stopped too, and nothing is undone for it."""
    if course.job in (None, str(event.get("request_id"))):
        _off_plan(course, event)


def _job_began(course: Course, event: Mapping[str, Any]) -> None:
    course.job = str(event.get("request_id"))


def _job_ended(course: Course, event: Mapping[str, Any]) -> None:
    if course.job == str(event.get("request_id")):
        course.job = course.planned = course.unfit = None


def _did(course: Course, event: Mapping[str, Any]) -> None:
    step = step_of(event)
    if course.planned is not None and step and course.planned[step]:
        course.planned[step] -= 1


def _request_began(course: Course, event: Mapping[str, Any]) -> None:
    _job_began(course, event)
    course.runs[str(event.get("request_id"))] = Run(event)


def _request_ended(course: Course, event: Mapping[str, Any]) -> None:
    course.runs.pop(str(event.get("request_id")), None)
    _job_ended(course, event)


def _passed(course: Course, event: Mapping[str, Any]) -> None:
    if run := course.run_of(event):
        run.passes[event.get("pass", 0)] = event
        if event["event"] == "pass.started":
            run.steps.clear()
            course.holdings.commit()
        else:
            run.make(event)


def _stepped(course: Course, event: Mapping[str, Any]) -> None:
    if run := course.run_of(event):
        run.steps[str(event.get("image"))] += 1


def _upscaled(course: Course, event: Mapping[str, Any]) -> None:
    if run := course.run_of(event):
        run.upscale = event
        run.make(event)


def _cut(course: Course, event: Mapping[str, Any]) -> None:
    if run := course.run_of(event):
        run.cut = event
        run.picture = run.picture or event.get("picture_digest")  # the request's own, at first
        run.make(event)


def _pasted(course: Course, event: Mapping[str, Any]) -> None:
    if run := course.run_of(event):
        run.cut = None
        run.make(event)


def _degraded(course: Course, event: Mapping[str, Any]) -> None:
    course.degraded.add(str(event.get("kind")))


_FOLDS: Mapping[str, Callable[[Course, Mapping[str, Any]], None]] = {
    "engine.opened": _opened,
    "engine.closed": _closed,
    "state.changed": _moved,
    "component.compile.completed": _compiled,
    **{
        f"component.{work}.{ending}": _off_plan
        for work in ("read", "fuse", "compile")
        for ending in ("failed", "cancelled")
    },
    "component.reused": _reused,
    "component.evicted": _evicted,
    "engine.snapshot": _snapped,
    "cancel.observed": _stopped,
    "job.started": _job_began,
    **{f"job.{ending}": _job_ended for ending in ("completed", "failed", "cancelled")},
    "recompile.failed": _off_plan,
    "plan.made": _planned,
    "request.started": _request_began,
    "request.completed": _request_ended,
    "request.failed": _request_ended,
    "request.cancelled": _request_ended,
    "pass.started": _passed,
    "pass.completed": _passed,
    "step.completed": _stepped,
    "upscale.completed": _upscaled,
    "region.cut": _cut,
    "region.pasted": _pasted,
    "degradation": _degraded,
}


def courses(items: Iterable[Entry | Problem]) -> Iterator[tuple[Entry, Course]]:
    """Fold a log with any number of engines: each entry with its engine's course after it."""
    known: dict[str, Course] = {}
    for item in items:
        if isinstance(item, Entry):
            course = known.setdefault(item.engine_id, Course(item.engine_id))
            course.fold(item)
            yield item, course


def differences(course: Course, snapshot: Mapping[str, Any]) -> list[str]:
    """Say in what an ``engine.snapshot`` differs from what the events before it add up to."""
    folded = course.as_snapshot()
    told = {
        "state": snapshot.get("state"),
        "mode": snapshot.get("mode"),
        "held": sorted(snapshot.get("held") or ()),
        "lora": sorted(lora_set(snapshot.get("lora") or ())),
    }
    return [
        f"{name}: the events give {folded[name]}, the snapshot says {told[name]}"
        for name in told
        if folded[name] is not None and folded[name] != told[name]
    ]
