"""The flight recorder: what an engine was doing, kept where a crash cannot take it."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from holdfast.engine.logbook.events import PROMPT_KEYS
from holdfast.engine.logbook.reading import Entry, log_lines, read
from holdfast.engine.logbook.spans import OpenSpans
from holdfast.engine.logbook.writing import JsonLines, line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LEFT_OUT = PROMPT_KEYS | {"error"}
_CARRIED = b'{"carried":'


class FlightRecorder:
    """
    A sink that keeps the last events of an engine in two files of bounded size.

    Each event is handed to the operating system before the emitter returns, and so before the
    native call that it announces: it outlives the process, though not a loss of power. The files
    are logs in the format of `JsonLines`, without prompts and texts of errors, whose keys stand
    under ``left_out``; a newer one begins with what was under way when the older one was full, in
    lines that are no events to a reader.
    One path serves one engine at a time.

    Args:
        path: The newer file; the older one stands beside it, with ``.1`` after its name.
        limit_bytes: Bound on both files together.

    Attributes:
        goes_on_after: Errors of a call after which a later one may succeed.

    Raises:
        OSError: The file cannot be opened, or, when called, written now. A later event can be.
    """

    goes_on_after = (OSError,)

    def __init__(self, path: str | os.PathLike[str], limit_bytes: int = 1 << 20) -> None:
        self._path = Path(path)
        self._segment_bytes = limit_bytes // 2
        self._spans = OpenSpans()
        self._lines = JsonLines(self._path)
        self._bytes = self._path.stat().st_size

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write the event; when this returns, the operating system has it."""
        record = {key: event[key] for key in event if key not in _LEFT_OUT} | {"pid": os.getpid()}
        if left_out := sorted(_LEFT_OUT & event.keys()):
            record["left_out"] = left_out
        encoded = line(record)
        try:
            if self._bytes + len(encoded) > self._segment_bytes:
                self._turn_over()
            self._append(encoded)
        finally:
            self._spans.fold(Entry(0, dt.datetime.now(dt.UTC), record))

    def close(self) -> None:
        """Close the file. Closing again does nothing."""
        self._lines.close()

    def __repr__(self) -> str:
        return f"<FlightRecorder {self._path.name}>"

    def _turn_over(self) -> None:
        if self._path.exists():  # else this is tried again, or somebody has removed it
            self._path.replace(_older(self._path))
        lines = JsonLines(self._path)
        self._lines.close()
        self._lines, self._bytes = lines, 0
        carried = (_CARRIED + line(span.started.event)[:-1] + b"}\n" for span in self._spans)
        self._append(b"".join(carried))

    def _append(self, encoded: bytes) -> None:
        self._bytes += len(encoded)  # also where it waits
        self._lines.append(encoded)


def crash_found(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """
    Tell what the process that last used this flight recorder died in.

    Call it before a new `FlightRecorder` is opened on the path.

    Returns:
        The keys of ``engine.crash_found``: ``died_in`` in words, ``pid``, and
        ``elapsed_seconds`` from the start of that until the last sign of life. None where there
        is no recording, its process is alive, or nothing was under way when it ended.
    """
    last: dict[str, Entry] = {}
    spans = OpenSpans()
    for entry in _entries(Path(path)):
        if not last or entry.engine_id != last["sign"].engine_id:
            spans, last = OpenSpans(), {}
        spans.fold(entry)
        last["sign"] = entry
        if entry.name == "step.completed":
            last["step"] = entry
    inner = spans.innermost
    if inner is None or _is_alive(last["sign"]):
        return None
    words = str(inner)
    if inner.prefix == "pass" and "step" in last:
        words += (
            f", after step {last['step'].event.get('step')} of {inner.started.event.get('steps')}"
        )
    return {
        "died_in": words,
        "pid": last["sign"].event.get("pid"),
        "elapsed_seconds": round((last["sign"].at - inner.started.at).total_seconds(), 3),
    }


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _entries(path: Path) -> Iterator[Entry]:
    for segment in (_older(path), path):
        if segment.exists():
            lines = (_uncarried(each) for each in log_lines(segment))
            yield from (item for item in read(lines) if isinstance(item, Entry))


def _uncarried(encoded: bytes) -> bytes:
    carried = encoded.startswith(_CARRIED) and encoded.endswith(b"}\n")
    return encoded[len(_CARRIED) : -2] + b"\n" if carried else encoded


def _is_alive(sign: Entry) -> bool:
    """Say whether the process that wrote it still runs, and not another one with its number."""
    try:
        return psutil.Process(sign.event["pid"]).create_time() <= sign.at.timestamp()
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
