"""
The timeline as a trace that https://ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format" (Google, 2016), JSON object form, times in microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.engine.logbook.writing import printable

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator, Sequence

    from holdfast.engine.logbook.timeline import Lanes


def trace(engines: Sequence[Lanes]) -> bytes:
    """Write each engine as a process, each row of its lanes as a thread, memory as a counter."""
    moments = [bar.begin for each in engines for bars in each.bars.values() for bar in bars]
    events = [
        event
        for process, each in enumerate(engines, start=1)
        for event in _events(each, process, min(moments, default=None))
    ]
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


def _events(lanes: Lanes, process: int, begin: dt.datetime | None) -> Iterator[dict[str, Any]]:
    def micros(at: dt.datetime) -> float:
        return 0.0 if begin is None else (at - begin).total_seconds() * 1e6

    yield _named("process_name", f"engine {printable(lanes.engine_id)}", process, 0)
    rows = ((name, bars) for name, rows in lanes.lanes() for bars in rows)
    for thread, (name, bars) in enumerate(rows, start=1):
        yield _named("thread_name", name, process, thread)
        yield {
            "ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread,
            "args": {"sort_index": thread},
        }  # fmt: skip
        for bar in bars:
            lasts = {"ph": "X", "dur": micros(bar.end) - micros(bar.begin)}
            yield {
                "name": bar.label, "cat": bar.kind, "pid": process, "tid": thread,
                "ts": micros(bar.begin), "args": {"details": bar.details},
                **(lasts if bar.end > bar.begin else {"ph": "i", "s": "t"}),
            }  # fmt: skip
    for at, rss in lanes.memory:
        yield {
            "ph": "C", "name": "resident memory", "pid": process, "tid": 0, "ts": micros(at),
            "args": {"bytes": rss},
        }  # fmt: skip


def _named(what: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
