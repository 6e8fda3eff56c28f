"""The requests of a log, one by one: what each was, how long it took and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.engine.logbook.reading import Entry
from holdfast.engine.logbook.sentences import printed, seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from holdfast.engine.logbook.reading import Problem

_CHANGES = (
    "load", "switch", "configure", "recompile", "unload", "plan", "prepare", "model_facts",
)  # fmt: skip
"""Kinds of jobs that are no requests."""
_ENDINGS = ("completed", "failed", "cancelled", "refused")


@dataclass
class Told:
    """
    What a log tells of one request.

    Attributes:
        request_id: The log's name for it.
        first: The event that it begins with.
        last: The latest event of it.
        ending: ``"completed"``, ``"failed"``, ``"cancelled"``, ``"refused"``, or ``"cut"`` where
            the log ends before it does.
        facts: Every key of its own events, the latest value of each.
        passes: How many passes began.
    """

    request_id: str
    first: Entry
    last: Entry
    ending: str = "cut"
    facts: dict[str, Any] | None = None
    passes: int = 0

    @property
    def words(self) -> str:
        """All of it in one printable line, but for when it began and its id."""
        facts = self.facts or {}
        took = facts.get("seconds")
        words = [
            str(facts.get("kind")),
            f"{facts['width']}x{facts['height']}" if facts.get("width") else "",
            f"{self.passes} pass{'' if self.passes == 1 else 'es'}",
            seconds(took) if isinstance(took, (int, float)) else "",
            {"cut": "has not ended"}.get(self.ending, self.ending),
            f"lines {self.first.line} to {self.last.line}",
        ]
        error = f": {facts['error']}" if self.ending in ("failed", "refused") else ""
        return printed(", ".join(filter(None, words)) + error)


def requests_of(items: Iterable[Entry | Problem]) -> Iterator[Told]:
    """Give each request of a log when it has ended, and then those that have not."""
    known: dict[tuple[str, str], Told] = {}
    for item in items:
        if not isinstance(item, Entry) or not item.event.get("request_id"):
            continue
        job = item.engine_id, str(item.event["request_id"])
        prefix, _, what = item.name.rpartition(".")
        if item.name == "request.queued" or (item.name == "job.refused" and _is_request(item)):
            known.setdefault(job, Told(job[1], item, item))
        told = known.get(job)
        if told is None:
            continue
        told.last = item
        told.passes += item.name == "pass.started"
        if prefix in ("request", "job"):
            took = (told.facts or {}).get("seconds")  # the request's own, where it began
            told.facts = {**(told.facts or {}), **item.event}
            if prefix == "job" and took is not None:
                told.facts["seconds"] = took
            told.ending = what if what in _ENDINGS else told.ending
        if prefix == "job" and what in _ENDINGS:
            yield known.pop(job)
    yield from known.values()


def _is_request(refused: Entry) -> bool:
    asked = refused.event.get("asked")
    kind = refused.event.get("kind")
    return isinstance(asked, dict) and "steps" in asked and kind not in _CHANGES
