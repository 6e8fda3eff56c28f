"""The verdict on a log: which rules it breaks, and whether all of it is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from holdfast.engine.logbook.reading import Entry
from holdfast.engine.logbook.replay import Course
from holdfast.engine.logbook.rules import GAP, ORDER, RULES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.engine.logbook.reading import Problem

_TOLD_PER_RULE = 20


class Breach(NamedTuple):
    """
    One rule broken by one event.

    Attributes:
        rule: The rule's id.
        line: Line of the event in the log, from 1.
        seq: Number of the event in its engine.
        event: Its name.
        words: What is wrong.
    """

    rule: str
    line: int
    seq: int
    event: str
    words: str


@dataclass
class EngineVerdict:
    """
    What the log shows of one engine.

    Attributes:
        engine_id: The engine.
        events: How many events there are.
        breaches: The first 20 of each rule, in the order of the log.
        counts: How often each rule that is broken is broken.
        missing: Why this is not all that the engine had to tell; empty where it is.
        errors: How often each event of level error stands there. An error breaks no rule.
        first_error: Line of the first of them.
    """

    engine_id: str
    events: int = 0
    breaches: list[Breach] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    first_error: int | None = None


@dataclass
class Verdict:
    """
    What a log shows.

    Attributes:
        engines: One verdict for each engine, in the order in which they appear.
        problems: Lines that are no events: the first 20, in order.
        problem_counts: How many of each kind there are.
    """

    engines: list[EngineVerdict] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    problem_counts: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        """Whether no rule is broken by what is there."""
        return not any(engine.counts for engine in self.engines)

    @property
    def complete(self) -> bool:
        """Whether every engine's events are all there, from its opening to its closing, once."""
        harmed = self.problem_counts["cut"] + self.problem_counts["broken"]
        return bool(self.engines) and not harmed and not any(e.missing for e in self.engines)


def audit(items: Iterable[Entry | Problem]) -> Verdict:
    """
    Hold a log against `RULES`, in one pass and with memory that does not grow with the log.

    Events that are missing from a log without events of level debug were left out by its writer:
    that makes it incomplete, and breaks no rule.

    Args:
        items: As `holdfast.engine.logbook.reading.read` gives them.
    """
    verdict = Verdict()
    courses: dict[str, tuple[Course, EngineVerdict]] = {}
    for item in items:
        if not isinstance(item, Entry):
            verdict.problem_counts[item.kind] += 1
            if len(verdict.problems) < _TOLD_PER_RULE:
                verdict.problems.append(item)
            continue
        if item.engine_id not in courses:
            courses[item.engine_id] = Course(item.engine_id), EngineVerdict(item.engine_id)
        course, engine = courses[item.engine_id]
        _judge(course, engine, item)
        course.fold(item)
    for course, engine in courses.values():
        _close(course, engine)
        verdict.engines.append(engine)
    return verdict


_of_numbers = tuple(rule for rule in RULES if not rule.events)
_by_event = {
    name: tuple(rule for rule in RULES if name in rule.events)
    for name in {name for rule in RULES for name in rule.events}
}


def _judge(course: Course, engine: EngineVerdict, entry: Entry) -> None:
    """Hold an event against the rules that it can break, after what came before it."""
    rules = _by_event.get(entry.name, ())
    if entry.seq != course.seq + 1:
        rules = (*_of_numbers, *rules)
    for rule in rules:
        if words := rule.check(course, entry):
            engine.counts[rule.id] += 1
            if engine.counts[rule.id] <= _TOLD_PER_RULE:
                engine.breaches.append(Breach(rule.id, entry.line, entry.seq, entry.name, words))
    if entry.event.get("level") == "error":
        engine.errors[entry.name] += 1
        engine.first_error = engine.first_error or entry.line


def _close(course: Course, engine: EngineVerdict) -> None:
    """Tell what is not there, and whether that is the engine's fault or the log's."""
    engine.events = course.events
    if course.first_seq > 1:
        engine.missing.append(f"it begins with seq {course.first_seq}")
    if engine.counts[GAP.id] and course.debug:
        engine.missing.append("events are missing from it")
    elif engine.counts[GAP.id]:
        engine.missing.append("events of level debug were not written to it")
        engine.breaches = [breach for breach in engine.breaches if breach.rule != GAP.id]
        del engine.counts[GAP.id]
    if engine.counts[ORDER.id]:
        engine.missing.append("events stand twice or out of order")
    engine.counts = +engine.counts
    if not course.closed and course.last:
        engine.missing.append(_ended_during(course, course.last))


def _ended_during(course: Course, last: Entry) -> str:
    span = course.spans.innermost
    if span is None:
        return f"it ends in state {course.state or 'unknown'}, without engine.closed"
    seconds = (last.at - span.started.at).total_seconds()
    return f"ended during {span}, {seconds:.0f} s in"
