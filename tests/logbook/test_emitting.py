from __future__ import annotations

import io
import itertools
import logging
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from holdfast.engine import Engine
from holdfast.engine.errors import Cancelled, InvalidRequest
from holdfast.engine.logbook.events import EVENTS, Emitter
from holdfast.states.hosting import LOGGER_NAME
from tests.support.workbench import PATIENCE, Bench

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
from holdfast.engine.logbook.events import Emitter
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

    emit = Emitter("e")
    emit.add_sink(broken)
    emit.add_sink(lambda record: told.append((record["seq"], record["event"])))
    emit("engine.closed", state="unloaded", uptime_seconds=1.0)
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert told == [(1, "engine.closed"), (2, "subscriber.failed"), (3, "memory.sampled")]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_sink_that_exits_is_dropped_as_any_other(kind: type[BaseException]) -> None:
    """Whatever a sink raises in an engine's thread, the event is told and the sink is not again."""
    told: list[str] = []

    def leave(_: Mapping[str, Any]) -> None:
        raise kind

    emit = Emitter("e")
    emit.add_sink(leave)
    emit.add_sink(lambda record: told.append(record["event"]))
    work = threading.Thread(target=emit, args=("engine.closed",), kwargs={"state": "unloaded"})
    work.start()
    work.join()
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert told == ["engine.closed", "subscriber.failed", "memory.sampled"]


def test_the_engines_own_sink_comes_back() -> None:
    """A log file on a disk that is full for a while is told of once, and goes on after that."""
    full, told, file = [True], list[str](), list[str]()

    def write(record: Mapping[str, Any]) -> None:
        if full[0]:
            raise OSError("no space left")
        file.append(record["event"])

    emit = Emitter("e", (write,))
    emit.add_sink(lambda record: told.append(record["event"]))
    for is_full in (True, True, False, False, True):
        full[0] = is_full
        emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert file == ["memory.sampled"] * 2
    assert told == ["memory.sampled", "subscriber.failed", *["memory.sampled"] * 4, told[1]]


def test_ctrl_c_inside_a_sink_is_the_hosts() -> None:
    """A Ctrl-C that comes while the host's own thread tells something reaches it; no sink goes."""
    told: list[int] = []

    def interrupted(record: Mapping[str, Any]) -> None:
        told.append(record["seq"])
        if record["seq"] == 1:
            raise KeyboardInterrupt

    emit = Emitter("e", (interrupted,))
    with pytest.raises(KeyboardInterrupt):
        emit("memory.sampled", rss_bytes=1, held_bytes=0)
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert told == [1, 2]


def test_no_sink_changes_what_another_one_gets(host_log: io.StringIO) -> None:
    """Each sink has a record of its own, down to the lists and mappings in it."""
    given = {"steps": ["compile unet"], "versions": {"openvino": "1"}}

    def spoil(record: Any) -> None:
        record["event"] = "nothing"
        record["steps"].append("more")
        record["versions"]["openvino"] = "2"
        record["seq"] = 99

    told: list[Mapping[str, Any]] = []
    Emitter("e", (spoil, told.append))("plan.made", **given)
    assert (told[0]["event"], told[0]["seq"]) == ("plan.made", 1)
    assert {key: told[0][key] for key in given} == given
    assert given == {"steps": ["compile unet"], "versions": {"openvino": "1"}}
    assert "more" not in host_log.getvalue()


def test_sink_that_calls_back_reorders_nothing() -> None:
    """What comes up while an event is handed out is handed out after it, to everybody."""
    told: tuple[list[int], list[int]] = ([], [])

    def calls_back(record: Mapping[str, Any]) -> None:
        told[0].append(record["seq"])
        if record["seq"] < 4:
            emit("memory.sampled", rss_bytes=1, held_bytes=0)

    emit = Emitter("e", (calls_back, lambda record: told[1].append(record["seq"])))
    emit("memory.sampled", rss_bytes=1, held_bytes=0)
    assert told == ([1, 2, 3, 4], [1, 2, 3, 4])


@pytest.mark.parametrize("name", ["_own", "_Told", "deque"])
def test_event_that_is_broken_into_is_told_once_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No number is missing and none stands twice, wherever memory is short while one is told."""
    from holdfast.engine.logbook import events

    function, told = getattr(events, name), list[int]()
    raised = 0
    for at in range(1, 9):
        calls = itertools.count(1)

        def fail(*facts: Any, at: int = at, calls: Iterator[int] = calls) -> Any:
            if next(calls) == at:
                raise MemoryError
            return function(*facts)

        emit = Emitter("e", (lambda record: told.append(record["seq"]),) * 2)
        told.clear()
        with monkeypatch.context() as patch:
            patch.setattr(events, name, fail)
            try:
                emit("memory.sampled", rss_bytes=1, held_bytes=0)
            except MemoryError:
                raised += 1
        emit("memory.sampled", rss_bytes=1, held_bytes=0)
        assert told in ([1, 1, 2, 2], [1, 1]), at
    assert raised


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
            job = bench.worker.submit("x", lambda _: bench.emit("engine.closed", state="unloaded"))
        job.result(PATIENCE)
    finally:
        bench.worker.close(timeout=PATIENCE)
        structlog.reset_defaults()
    told = {event["event"]: event.get("http_request") for event in captured.entries}
    names = ("request.queued", "job.started", "engine.closed", "job.completed")
    assert told == dict.fromkeys(names, "abc")


def test_event_without_an_entry_in_the_reference_is_refused() -> None:
    """A name that the reference of events does not have cannot be emitted."""
    with pytest.raises(KeyError, match="unheard"):
        Emitter("e")("unheard")
    with Engine() as engine, pytest.raises(InvalidRequest, match="unheard"):
        engine.emit("unheard")
