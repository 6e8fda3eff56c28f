from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from holdfast.engine.errors import Cancelled
from holdfast.engine.events import EVENTS, LOGGER_NAME, Emitter
from tests.engine.workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NASTY = "x\x1b[31m\nWARNING:root:forged\u2028\x9b2J"


@pytest.fixture
def host_log() -> Iterator[io.StringIO]:
    """What a host that routes the library's logger writes."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger(LOGGER_NAME).addHandler(handler)
    yield written
    logging.getLogger(LOGGER_NAME).removeHandler(handler)


class Costly:
    """A value that counts how often it is rendered."""

    def __init__(self) -> None:
        self.rendered = 0

    def __repr__(self) -> str:
        self.rendered += 1
        return "costly"


@pytest.mark.parametrize("also", ["pass", "emit.add_sink(sinks.append)"], ids=["nobody", "a sink"])
def test_event_is_not_rendered_for_a_null_handler(also: str) -> None:
    """Where the host routes nothing, no text is made of an event; its number is used up."""
    program = f"""
import logging
from holdfast.engine.events import Emitter
from tests.logbook.test_emitting import Costly
emit, costly, sinks = Emitter("e"), Costly(), []
{also}
emit("degradation", kind="device", asked=costly, given="CPU")
assert (costly.rendered, len(sinks)) == (0, {int("sink" in also)})
logging.basicConfig()
emit("degradation", kind="device", asked=costly, given="CPU")
"""
    ran = subprocess.run(  # noqa: S603 - the program stands above
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "asked=costly" in ran.stderr
    assert "seq=2" in ran.stderr


def test_capturing_hosts_see_every_event_at_once() -> None:
    """Events that nobody received a moment ago are captured from the next one on."""
    emit = Emitter("e")
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    with structlog.testing.capture_logs() as captured:
        emit("memory.sampled", rss_bytes=2, held_bytes=0)
    assert [(event["seq"], event["rss_bytes"]) for event in captured] == [(2, 2)]


def test_hosts_log_is_not_forged_by_a_value(host_log: io.StringIO) -> None:
    """A value with newlines and escapes is one printable line in the host's own log."""
    Emitter("e")("degradation", kind=NASTY, asked=[NASTY], given={"x": NASTY})
    (line,) = host_log.getvalue().splitlines()
    assert line.isprintable()
    assert line.count("forged") == 3


def test_numbers_have_no_gap_and_every_sink_sees_one_order() -> None:
    """However many threads emit, events are numbered without a gap in the order of every sink."""
    seen: tuple[list[int], list[int]] = ([], [])
    emit = Emitter("e", tuple(lambda record, to=to: to.append(record["seq"]) for to in seen))

    def work() -> None:
        for _ in range(200):
            emit("memory.sampled", rss_bytes=1, held_bytes=0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] == list(range(1, 1601))


def test_sink_that_raises_is_dropped_and_told_of() -> None:
    """A sink that raises receives nothing more; the others learn of it, in the order of events."""
    told: list[tuple[int, str]] = []

    def broken(_: Mapping[str, Any]) -> None:
        raise OSError("no space left")

    emit = Emitter("e", (broken, lambda record: told.append((record["seq"], record["event"]))))
    emit("engine.closed", state="unloaded", uptime_seconds=1.0)
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert told == [(1, "engine.closed"), (2, "subscriber.failed"), (3, "memory.sampled")]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (None, "completed"),
        (ValueError("no"), "failed"),
        (KeyboardInterrupt(), "failed"),
        (Cancelled("enough", phase="step", seconds_to_stop=0.1), "cancelled"),
    ],
)
def test_span_ends_exactly_once(error: BaseException | None, ending: str) -> None:
    """What is begun has one ending, whatever is raised inside, with its facts and its seconds."""
    told: list[dict[str, Any]] = []
    emit = Emitter("e", (lambda record: told.append(dict(record)),))
    begun = emit.span("component.read", component="unet")
    if error is None:
        with begun as learned:
            learned["bytes"] = 7
    else:
        with pytest.raises(type(error)), begun:
            raise error
    assert [event["event"] for event in told] == [
        "component.read.started",
        f"component.read.{ending}",
    ]
    assert {*EVENTS[told[1]["event"]].keys} <= told[1].keys()
    assert told[1]["component"] == "unet"


def test_scope_reaches_the_events_inside_it_alone() -> None:
    """Facts of a scope stand in the events inside it, and in none after it or of other threads."""
    told: list[Mapping[str, Any]] = []
    emit = Emitter("e", (told.append,))
    with emit.scope(request_id="r"), emit.scope(mode="txt2img"):
        emit("memory.sampled", rss_bytes=1, held_bytes=0)
        other = threading.Thread(
            target=emit, args=("memory.sampled",), kwargs={"rss_bytes": 1, "held_bytes": 0}
        )
        other.start()
        other.join()
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert [event.get("request_id") for event in told] == ["r", None, None]


def test_events_of_a_job_have_what_the_host_bound_where_it_was_submitted() -> None:
    """What the host bound around a submit stands in the events of the engine's own thread too."""
    captured = structlog.testing.LogCapture()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, captured])
    bench = Bench()
    try:
        with structlog.contextvars.bound_contextvars(http_request="abc"):
            job = bench.owner.submit("x", lambda _: bench.emit("engine.closed", state="unloaded"))
        job.result(PATIENCE)
    finally:
        bench.owner.close(timeout=PATIENCE)
        structlog.reset_defaults()
    told = {event["event"]: event.get("http_request") for event in captured.entries}
    assert told == {"request.queued": "abc", "engine.closed": "abc"}


def test_event_without_an_entry_in_the_reference_is_refused() -> None:
    """A name that the reference of events does not have cannot be emitted."""
    with pytest.raises(KeyError, match="unheard"):
        Emitter("e")("unheard")
