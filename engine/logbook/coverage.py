"""How much of the time that jobs took the log explains."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from holdfast.engine.logbook.axis import merged
from holdfast.engine.logbook.spans import OpenSpans

if TYPE_CHECKING:
    from collections.abc import Iterable

    from holdfast.engine.logbook.reading import Entry


class Coverage(NamedTuple):
    """
    What a log tells of the time in which an engine had a job.

    Attributes:
        seconds: That its jobs took.
        unexplained: Of these, seconds of which neither a span nor an event says what was done.
    """

    seconds: float
    unexplained: float

    @property
    def share(self) -> float:
        """Share of the jobs' time that nothing explains, from 0 to 1."""
        return self.unexplained / self.seconds if self.seconds else 0.0


def coverage(entries: Iterable[Entry]) -> dict[str, Coverage]:
    """
    Return for each engine how much of its jobs' time is explained by what was done within them.

    A job with nothing of any length within it, such as an unload, explains itself.
    """
    open_spans: dict[str, OpenSpans] = defaultdict(OpenSpans)
    jobs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    done: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        span = open_spans[entry.engine_id].fold(entry)
        end, seconds = entry.at.timestamp(), entry.event.get("seconds")
        if span is not None:
            if span.prefix != "request":  # which says what was asked for, and not what was done
                kept = jobs if span.prefix == "job" else done
                kept[entry.engine_id].append((span.started.at.timestamp(), end))
        elif isinstance(seconds, (int, float)) and entry.name != "state.changed":
            done[entry.engine_id].append((end - seconds, end))
    return {engine: _covered(jobs[engine], merged(done[engine], 0.0)) for engine in jobs}


def _covered(jobs: Iterable[tuple[float, float]], done: Iterable[tuple[float, float]]) -> Coverage:
    explained = list(done)
    seconds = unexplained = 0.0
    for begin, end in jobs:
        within = sum(max(0.0, min(end, last) - max(begin, first)) for first, last in explained)
        seconds += end - begin
        unexplained += end - begin - within if within else 0.0
    return Coverage(seconds, unexplained)
