"""A log file on a disk that fills up: nothing is lost that there is memory for, no line is cut."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.logbook import writing
from holdfast.engine.logbook.events import Emitter
from holdfast.engine.logbook.recorder import FlightRecorder
from holdfast.engine.logbook.writing import JsonLines
from tests.support.audited import events_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    FullDisk = Callable[..., Any]


@pytest.mark.parametrize("whose", ["engine's", "host's"])
def test_a_log_comes_back_after_a_full_disk(
    tmp_path: Path, full_disk: FullDisk, whose: str
) -> None:
    """
    What came up while there was no room is written when there is; the host is told at once.

    So it is with an engine's own log file, and with one that a host attaches to an engine.
    """
    path = tmp_path / "log.jsonl"
    heard: list[str] = []
    sink = JsonLines(path)
    emit = Emitter("e", (sink,) if whose == "engine's" else ())
    if whose == "host's":
        emit.add_sink(sink)
    emit.add_sink(lambda event: heard.append(event["event"]))
    emit("state.changed", reason="before")
    for _ in range(2):
        with full_disk(path.stat().st_size + 40):  # the next line is cut amid it
            emit("state.changed", reason="without room")
            emit("state.changed", reason="without room")
        emit("state.changed", reason="after")
    sink.close()
    events = events_of(path)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    outage = ["state.changed", "subscriber.failed", "state.changed", "state.changed"]
    assert [event["event"] for event in events] == heard == ["state.changed", *outage * 2]
    assert "JsonLines" in events[2]["subscriber"]
    assert "too large" in events[2]["error"]


def test_a_closed_log_of_a_host_is_dropped(tmp_path: Path) -> None:
    """One that can never be written again is told of once, and receives nothing more."""
    heard: list[str] = []
    sink = JsonLines(tmp_path / "log.jsonl")
    emit = Emitter("e")
    emit.add_sink(sink)
    emit.add_sink(lambda event: heard.append(event["event"]))
    sink.close()
    for _ in range(2):
        emit("state.changed", reason="after its end")
    assert heard == ["state.changed", "subscriber.failed", "state.changed"]


def test_a_line_that_was_cut_is_written_anew_behind_others(
    tmp_path: Path, full_disk: FullDisk
) -> None:
    """Where another process wrote meanwhile, the cut line is ended, and comes whole after it."""
    path = tmp_path / "log.jsonl"
    mine, others = JsonLines(path), JsonLines(path)
    with full_disk(5), pytest.raises(OSError, match="too large"):
        mine({"event": "mine"})
    others.append(b'\n{"event":"other"}\n')
    mine({"event": "next"})
    mine.close()
    others.close()
    half, *whole = path.read_bytes().splitlines()
    assert half == b'{"eve'
    assert [one for one in whole if one] == [
        b'{"event":"other"}', b'{"event":"mine"}', b'{"event":"next"}',
    ]  # fmt: skip


def test_what_waits_is_bounded(
    tmp_path: Path, full_disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound later events are lost, which their numbers tell."""
    monkeypatch.setattr(writing, "WAITING_BYTES", 1000)
    sink = JsonLines(tmp_path / "log.jsonl")
    with full_disk():
        for seq in range(1000):
            with pytest.raises(OSError, match="too large"):
                sink({"seq": seq, "text": "x" * 80})
    sink({"seq": 1000})
    numbers = [event["seq"] for event in events_of(sink.path)]
    assert numbers == [*range(len(numbers))]
    assert 5 < len(numbers) < 20
    sink({"seq": 1001})
    assert events_of(sink.path)[-1] == {"seq": 1001}
    sink.close()
    sink.close()


def test_a_recorder_comes_back_after_a_full_disk(tmp_path: Path, full_disk: FullDisk) -> None:
    """The flight recorder is told of once, stays within its bound, and records on afterwards."""
    path = tmp_path / "flight"
    heard: list[str] = []
    recorder = FlightRecorder(path, 4000)
    emit = Emitter("e", (recorder, lambda event: heard.append(event["event"])))
    with emit.span("request", request_id="r1"):
        with full_disk():
            for step in range(100):
                emit("step.completed", step=step, steps=100)
        emit("step.completed", step=100, steps=100)
    recorder.close()
    assert heard.count("subscriber.failed") >= 1
    assert heard.count("subscriber.failed") < 5
    assert b"request.completed" in path.read_bytes()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 8000


def test_a_recorder_that_cannot_turn_over_goes_on_later(tmp_path: Path) -> None:
    """While the older file cannot be replaced events are left out; then it records on."""
    path = tmp_path / "flight"
    recorder = FlightRecorder(path, 2000)
    obstacle = tmp_path / "flight.1"
    obstacle.mkdir()
    (obstacle / "file").touch()
    size = 0
    for step in range(100):
        with contextlib.suppress(OSError):
            recorder({"event": "step.completed", "step": step})
        size = max(size, path.stat().st_size)
    assert size <= 1000
    (obstacle / "file").unlink()
    obstacle.rmdir()
    recorder({"event": "step.completed", "step": "later"})
    assert events_of(path)[-1]["step"] == "later"
    assert obstacle.is_file()
    recorder.close()
