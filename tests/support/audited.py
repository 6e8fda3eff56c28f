"""What holds for the log of every engine, whatever a test did with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.events import COMMON, EVENTS, Emitter
from holdfast.engine.logbook.reading import Entry, log_lines, read
from holdfast.engine.logbook.replay import courses, differences
from holdfast.engine.logbook.writing import line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pytest


def assert_clean(path: Path) -> None:
    """Assert that a log of engines that were closed is sound and whole."""
    assert_sound(list(log_lines(path)), whole=True)


def assert_sound(lines: Sequence[bytes], *, whole: bool) -> None:
    """
    Assert that a log breaks no rule and adds up.

    Every event has a name and the keys of `EVENTS`; the audit is clean and, of a `whole` log,
    complete; and at each ``engine.snapshot`` the events before it add up to what the engine says.
    """
    verdict = audit(read(lines))
    assert verdict.clean, [breach for engine in verdict.engines for breach in engine.breaches]
    assert verdict.complete or not whole, (
        verdict.problems,
        [engine.missing for engine in verdict.engines],
    )
    for entry, course in courses(read(lines)):
        assert not missing_keys(entry), entry
        if entry.name == "engine.snapshot":
            assert not differences(course, entry.event), entry


class Journals:
    """
    What every engine of this process logs, from when `watch` is called, until it is taken.

    Records are kept as they come: nothing runs here that a test could break into by accident.
    """

    def __init__(self) -> None:
        self._kept: list[list[Mapping[str, Any]]] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Listen in on every engine that is opened from now on."""
        monkeypatch.setattr("holdfast.engine.engine.Emitter", self._listened)

    def take(self, *, closed: bool) -> list[list[bytes]]:
        """Give away the logs of the engines that are closed, or of those that are not."""
        taken = [kept for kept in self._kept if _is_closed(kept) is closed]
        self._kept = [kept for kept in self._kept if _is_closed(kept) is not closed]
        return [[line(record) for record in kept] for kept in taken]

    def _listened(self, engine_id: str, sinks: tuple[Any, ...] = ()) -> Emitter:
        kept: list[Mapping[str, Any]] = []
        self._kept.append(kept)
        return Emitter(engine_id, (*sinks, kept.append))


def _is_closed(kept: Sequence[Mapping[str, Any]]) -> bool:
    return any(record["event"] == "engine.closed" for record in kept)


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log, to be changed at will."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def missing_keys(entry: Entry) -> set[str]:
    """Return the keys that `EVENTS` promises, and the event neither has nor says it leaves out."""
    promised = {*COMMON, *EVENTS[entry.name].keys}
    return promised - entry.event.keys() - set(entry.event.get("left_out", ()))
