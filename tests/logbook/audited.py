"""What holds for the log of every engine, whatever a test did with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from holdfast.engine.events import COMMON, EVENTS
from holdfast.engine.logbook.audit import audit
from holdfast.engine.logbook.read import Entry, log_lines, read
from holdfast.engine.logbook.replay import courses, differences

if TYPE_CHECKING:
    from pathlib import Path


def assert_clean(path: Path) -> None:
    """
    Assert that a log of engines that were closed is whole, breaks no rule and adds up.

    Every event has a name and the keys of `EVENTS`; the audit is clean and complete; and at each
    ``engine.snapshot`` the events before it add up to what the engine says.
    """
    verdict = audit(read(log_lines(path)))
    assert verdict.clean, [breach for engine in verdict.engines for breach in engine.breaches]
    assert verdict.complete, (verdict.problems, [e.missing for e in verdict.engines])
    for entry, course in courses(read(log_lines(path))):
        assert not missing_keys(entry), entry
        if entry.name == "engine.snapshot":
            assert not differences(course, entry.event), entry


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log, to be changed at will."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def missing_keys(entry: Entry) -> set[str]:
    """Return the keys that `EVENTS` promises and the event does not have."""
    return {*COMMON, *EVENTS[entry.name].keys} - entry.event.keys()
