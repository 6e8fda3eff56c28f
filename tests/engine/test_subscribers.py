from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine.errors import Cancelled, EngineClosed, InvalidRequest
from holdfast.engine.subscribers import (
    LIMIT,
    CompileHeartbeat,
    Degraded,
    Event,
    Finished,
    Preview,
    Progressed,
    Subscribers,
    Transition,
)
from tests.support.workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.engine.jobs.job import Job

MOVED = {"trigger": "load-txt2img", "source": "unloaded", "dest": "compiled-txt2img"}


class Listener:
    """A subscriber that notes what it gets; its gate can be shut to make it slow."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()

    def __call__(self, event: Event) -> None:
        self.inside.set()
        assert self.gate.wait(PATIENCE)
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def subscribers(bench: Bench) -> Iterator[Subscribers]:
    subscribers = Subscribers(bench.worker)
    yield subscribers
    bench.gate.set()
    subscribers.close()
    for thread in threads():
        thread.join(PATIENCE)
        assert not thread.is_alive()


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "holdfast-subscriber"]


def move(bench: Bench, number: int) -> None:
    bench.emit("state.changed", **MOVED, reason=str(number), seconds=0.0)


def preview(step: int, steps: int = 10**6) -> Preview:
    return Preview(pass_number=1, step=step, steps=steps, draw=lambda: Image.new("RGB", (1, 1)))


def shut(listener: Listener, bench: Bench) -> None:
    """Leave a listener stuck in its callback."""
    listener.gate.clear()
    listener.inside.clear()
    move(bench, -1)
    assert listener.inside.wait(PATIENCE)


def test_every_kind_of_event_is_typed_and_frozen(bench: Bench, subscribers: Subscribers) -> None:
    """Each event has the facts of its record in the log under the same names, and is read-only."""
    listener = Listener()
    subscribers.subscribe(listener)
    with bench.emit.scope(request_id="r1"):
        move(bench, 1)
        bench.emit(
            "compile.heartbeat",
            component="unet", key="k", elapsed_seconds=1.0, expected_seconds=None, rss_bytes=5,
        )  # fmt: skip
        bench.emit("degradation", kind="prompt_truncated", asked="long", given="short")
        subscribers.preview(preview(3))
        bench.emit("request.failed", kind="hires", error="CompileError: no", seconds=1.0)
    subscribers.close()
    moved, beat, degraded, previewed, finished = listener.events
    assert moved == Transition(request_id="r1", **MOVED, reason="1")
    assert beat == CompileHeartbeat(
        request_id="r1", component="unet", elapsed_seconds=1.0, expected_seconds=None, rss_bytes=5
    )
    assert degraded == Degraded(
        request_id="r1", kind="prompt_truncated", asked="long", given="short"
    )
    assert previewed.image.size == (1, 1)
    assert previewed.image is previewed.image
    assert finished == Finished(request_id="r1", status="failed", error="CompileError: no")
    for event in listener.events:
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.request_id = "r2"


@pytest.mark.parametrize(
    ("ending", "status"),
    [("completed", "done"), ("failed", "failed"), ("cancelled", "cancelled")],
)
def test_a_finish_tells_how(
    bench: Bench, subscribers: Subscribers, ending: str, status: str
) -> None:
    """A finished request has the status of its job."""
    listener = Listener()
    subscribers.subscribe(listener, [Finished])
    bench.emit(f"request.{ending}", request_id="r1", seconds=1.0)
    subscribers.close()
    assert listener.events == [Finished(request_id="r1", status=status)]


def test_a_finished_request_has_an_ended_job(bench: Bench, subscribers: Subscribers) -> None:
    """When a subscriber hears of the end, the job has its status and its result."""
    jobs: dict[str, Job[int]] = {}
    heard: list[object] = []
    known = threading.Event()

    def work(job: Job[int]) -> int:
        assert known.wait(PATIENCE)
        bench.emit("request.completed", request_id=job.request_id, seconds=1.0)
        return 5

    def hear(event: Finished) -> None:
        job = jobs[str(event.request_id)]
        heard.append((job.status, job.result(timeout=0)))

    subscribers.subscribe(hear, [Finished])
    for number in range(100):
        known.clear()
        job = jobs[str(number)] = bench.worker.submit("x", work, request_id=str(number))
        known.set()
        job.result(PATIENCE)
    subscribers.close()
    assert heard == [("done", 5)] * 100


def test_a_request_that_never_began_finishes_too(bench: Bench, subscribers: Subscribers) -> None:
    """Cancelling a waiting request tells its subscribers, once."""
    listener = Listener()
    subscribers.subscribe(listener, [Finished])
    bench.busy()
    job = bench.named("x", request_id="r1")
    job.cancel()
    assert isinstance(job.exception(PATIENCE), Cancelled)
    subscribers.close()
    assert listener.events == [Finished(request_id="r1", status="cancelled")]


def test_progress_is_told_at_every_phase_and_step(bench: Bench, subscribers: Subscribers) -> None:
    """The events of one run are its job's progress at each step, never falling."""
    listener = Listener()
    subscribers.subscribe(listener, [Progressed])

    def work(job: Job[None]) -> None:
        job.expect({"prepare 1": 1.0, "pass 1": 9.0})
        job.advance("prepare 1")
        bench.emit("prompt.encoded", prompt_digest="", tokens=1, seconds=0.0)
        bench.emit("prompt.encoded", prompt_digest="", tokens=1, seconds=0.0)
        for step in range(1, 10):
            job.advance("pass 1", pass_number=1, step=step, steps=9)
            bench.emit("step.completed", step=step, steps=9, image=0, seconds=0.0)

    bench.worker.submit("x", work, request_id="r1").result(PATIENCE)
    subscribers.close()
    places = [(event.progress.phase, event.progress.step) for event in listener.events]
    assert places == [("prepare 1", None), *(("pass 1", step) for step in range(1, 10))]
    fractions = [event.progress.fraction for event in listener.events]
    assert fractions == sorted(fractions)
    assert {event.request_id for event in listener.events} == {"r1"}


def test_events_come_in_the_order_of_the_log(bench: Bench, subscribers: Subscribers) -> None:
    """Whatever threads emit, every subscriber sees the order that the log has."""
    listeners = [Listener(), Listener()]
    for listener in listeners:
        subscribers.subscribe(listener, [Transition])
    numbers = itertools.count()
    hosts = [
        threading.Thread(target=lambda: [move(bench, next(numbers)) for _ in range(200)])
        for _ in range(4)
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    subscribers.close()
    logged = [record["reason"] for record in bench.events("state.changed")]
    assert len(logged) == 800
    for listener in listeners:
        assert [event.reason for event in listener.events] == logged


def test_a_subscriber_gets_the_kinds_it_asked_for(bench: Bench, subscribers: Subscribers) -> None:
    """Kinds are classes; without any, all kinds come."""
    some, every = Listener(), Listener()
    subscribers.subscribe(some, [Transition, Finished])
    subscribers.subscribe(every)
    move(bench, 1)
    bench.emit("degradation", kind="k", asked=1, given=2)
    bench.emit("request.completed", request_id="r1", seconds=1.0)
    subscribers.close()
    assert [type(event) for event in some.events] == [Transition, Finished]
    assert [type(event) for event in every.events] == [Transition, Degraded, Finished]


def test_previews_come_as_often_as_asked(subscribers: Subscribers) -> None:
    """Every n steps and at the end of a pass; the engine can tell whether anybody wants one."""
    listener = Listener()
    assert not subscribers.wants_preview(4, 10)
    subscribers.subscribe(listener, [Preview], preview_every=4)
    wanted = [step for step in range(1, 11) if subscribers.wants_preview(step, 10)]
    assert wanted == [4, 8, 10]
    subscribers.subscribe(lambda _: None, [Preview], preview_every=5)
    for step in range(1, 11):
        subscribers.preview(preview(step, 10))
    subscribers.close()
    assert [event.step for event in listener.events] == [4, 8, 10]


def test_a_preview_that_nobody_looks_at_is_not_drawn(subscribers: Subscribers) -> None:
    """The picture is drawn when it is first looked at, in the subscriber's thread."""
    drawn: list[int] = []
    looked: list[int] = []

    def draw() -> Image.Image:
        drawn.append(threading.get_ident())
        return Image.new("RGB", (1, 1))

    def look(event: Preview) -> None:
        looked.append(threading.get_ident())
        if event.step == 2:
            assert event.image is event.image

    subscribers.subscribe(look, [Preview])
    for step in (1, 2):
        subscribers.preview(Preview(pass_number=1, step=step, steps=9, draw=draw))
    subscribers.close()
    assert drawn == looked[1:]
    assert drawn[0] != threading.get_ident()


def test_a_slow_subscriber_misses_previews_first(bench: Bench, subscribers: Subscribers) -> None:
    """While it is stuck, previews make way, the oldest first; every transition arrives in order."""
    listener = Listener()
    subscribers.subscribe(listener)
    shut(listener, bench)
    for step in range(LIMIT // 2):
        subscribers.preview(preview(step))
    for number in range(LIMIT):
        move(bench, number)
        if number % 2:
            subscribers.preview(preview(1000 + number))
    listener.gate.set()
    subscribers.close()
    assert [event.reason for event in listener.of(Transition)] == ["-1", *map(str, range(LIMIT))]
    assert [event.step for event in listener.of(Preview)] == [1000 + LIMIT - 1]


def test_a_slow_subscriber_misses_progress_next(bench: Bench, subscribers: Subscribers) -> None:
    """The latest progress is kept, so that what comes after the delay is true."""
    listener = Listener()
    subscribers.subscribe(listener)
    shut(listener, bench)

    def work(job: Job[None]) -> None:
        for step in range(10 * LIMIT):
            job.advance("pass 1", step=step, steps=10 * LIMIT)
            bench.emit("step.completed", step=step, steps=10 * LIMIT, image=0, seconds=0.0)

    bench.worker.submit("x", work).result(PATIENCE)
    for number in range(10):
        move(bench, number)
    listener.gate.set()
    subscribers.close()
    assert len(listener.of(Transition)) == 11
    steps = [event.progress.step for event in listener.of(Progressed)]
    assert steps == list(range(10 * LIMIT - LIMIT + 10, 10 * LIMIT))


def test_nothing_but_previews_progress_and_heartbeats_is_ever_left_out(
    bench: Bench, subscribers: Subscribers
) -> None:
    """A stuck subscriber gets all transitions, degradations and endings, however many wait."""
    listener = Listener()
    subscribers.subscribe(listener)
    shut(listener, bench)
    for number in range(3 * LIMIT):
        move(bench, number)
        bench.emit("degradation", kind=str(number), asked=1, given=2)
        bench.emit("request.completed", request_id=str(number), seconds=1.0)
    listener.gate.set()
    subscribers.close()
    names = list(map(str, range(3 * LIMIT)))
    assert [event.reason for event in listener.of(Transition)] == ["-1", *names]
    assert [event.kind for event in listener.of(Degraded)] == names
    assert [event.request_id for event in listener.of(Finished)] == names


def test_a_stuck_subscriber_delays_no_job_and_no_other_subscriber(
    bench: Bench, subscribers: Subscribers
) -> None:
    """Jobs end and other subscribers hear of it while one is in its callback."""
    stuck, other = Listener(), Listener()
    subscribers.subscribe(stuck)
    shut(stuck, bench)
    heard = threading.Event()
    subscribers.subscribe(other)
    subscribers.subscribe(lambda _: heard.set(), [Finished])

    def work(_: Job[int]) -> int:
        bench.emit("request.completed", request_id="r1", seconds=1.0)
        return 5

    assert bench.worker.submit("x", work).result(PATIENCE) == 5
    assert heard.wait(PATIENCE)
    assert stuck.events == []
    stuck.gate.set()


def test_a_raising_subscriber_is_told_of_and_goes_on(
    bench: Bench, subscribers: Subscribers
) -> None:
    """Each error is logged as subscriber.failed, which is told to no subscriber; the next comes."""
    got: list[Event] = []

    def broken(event: Event) -> None:
        got.append(event)
        raise SystemExit

    subscribers.subscribe(broken)
    for number in range(3):
        move(bench, number)
    subscribers.close()
    assert len(got) == 3
    failures = bench.events("subscriber.failed")
    assert len(failures) == 3
    assert failures[0]["error"] == "SystemExit()"
    assert "broken" in failures[0]["subscriber"]
    seqs = [record["seq"] for record in bench.log]
    assert seqs == list(range(1, len(seqs) + 1))


def test_a_subscriber_may_use_the_engine(bench: Bench, subscribers: Subscribers) -> None:
    """From its callback it may submit, wait, cancel, subscribe and unsubscribe."""
    found: list[object] = []
    done = threading.Event()

    def busy(event: Transition) -> None:
        if event.reason == "1":
            found.append(bench.worker.submit("x", lambda _: 5).result(PATIENCE))
            found.append(bench.worker.call("configure", lambda _: 6))
            bench.busy()
            found.append(bench.named("y").cancel())
            bench.gate.set()
            subscribers.subscribe(lambda _: None)()
            unsubscribe()
            done.set()

    unsubscribe = subscribers.subscribe(busy, [Transition])
    move(bench, 1)
    move(bench, 2)
    assert done.wait(PATIENCE)
    assert found == [5, 6, True]


def test_nothing_comes_after_unsubscribing(bench: Bench, subscribers: Subscribers) -> None:
    """No call begins once unsubscribe has returned, even for events that waited; twice is fine."""
    listener = Listener()
    unsubscribe = subscribers.subscribe(listener, [Transition])
    shut(listener, bench)
    move(bench, 1)
    unsubscribe()
    unsubscribe()
    listener.gate.set()
    move(bench, 2)
    subscribers.close()
    assert [event.reason for event in listener.events] in ([], ["-1"])


def test_an_unsubscribed_callback_is_let_go(bench: Bench, subscribers: Subscribers) -> None:
    """What a callback held is free once it is unsubscribed and its thread has ended."""
    listener = Listener()
    gone = weakref.ref(listener)
    unsubscribe = subscribers.subscribe(listener)
    move(bench, 1)
    (thread,) = threads()
    unsubscribe()
    thread.join(PATIENCE)
    del listener, unsubscribe
    gc.collect()
    assert gone() is None


def test_closing_delivers_what_waits(bench: Bench, subscribers: Subscribers) -> None:
    """Closing returns when every event has been delivered; afterwards nobody can subscribe."""
    listener = Listener()
    subscribers.subscribe(listener)
    for number in range(LIMIT):
        move(bench, number)
    subscribers.close()
    assert len(listener.events) == LIMIT
    with pytest.raises(EngineClosed, match="open another engine"):
        subscribers.subscribe(listener)


def test_closing_does_not_hang_on_a_stuck_subscriber(
    bench: Bench, subscribers: Subscribers
) -> None:
    """Closing gives up waiting; the thread ends when its callback does."""
    listener = Listener()
    subscribers.subscribe(listener)
    shut(listener, bench)
    subscribers.close(patience=0.05)
    (thread,) = threads()
    listener.gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_without_subscribers_nothing_runs(bench: Bench) -> None:
    """No thread and no sink before the first subscriber."""
    before = threading.active_count()
    subscribers = Subscribers(bench.worker)
    move(bench, 1)
    assert threading.active_count() == before
    assert subscribers not in bench.emit._sinks


def test_a_callback_need_not_be_hashable_or_comparable(
    bench: Bench, subscribers: Subscribers
) -> None:
    """The same callback subscribed twice is two subscribers, each ended by its own function."""
    got: list[Event] = []
    first: Callable[[], None] = subscribers.subscribe(got.append, [Transition])
    subscribers.subscribe(got.append, [Transition])
    first()
    move(bench, 1)
    subscribers.close()
    assert len(got) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"callback": "print"}, "is no function"),
        ({"callback": None}, "is no function"),
        *(({"preview_every": each}, "whole number") for each in (0, -1, 1.5, "2", True, None)),
        *(({"kinds": each}, "no class of events") for each in ("Preview", ["Preview"], [int], 7)),
    ],
)
def test_arguments_are_checked_at_the_door(
    subscribers: Subscribers, wrong: dict[str, Any], said: str
) -> None:
    """What can never be told is refused when it is asked for, and no thread is started."""
    before = threads()
    with pytest.raises(InvalidRequest, match=said):
        subscribers.subscribe(**{"callback": print} | wrong)
    assert threads() == before


def test_one_class_is_as_good_as_a_list_of_it(bench: Bench, subscribers: Subscribers) -> None:
    """A class of events by itself stands for the list that holds it."""
    listener = Listener()
    subscribers.subscribe(listener, Transition)
    move(bench, 1)
    bench.emit("degradation", kind="prompt_truncated", asked="long", given="short")
    subscribers.close()
    assert [type(event) for event in listener.events] == [Transition]


def test_an_event_that_cannot_be_told_takes_no_other_with_it(
    bench: Bench, subscribers: Subscribers
) -> None:
    """A record that no event can be made of is logged, and the next one is told."""
    listener = Listener()
    subscribers.subscribe(listener, Event)
    bench.emit("cancel.observed", request_id="r")  # which says nothing of the phase
    move(bench, 1)
    subscribers.close()
    assert [event.reason for event in listener.of(Transition)] == ["1"]
    assert "phase" in bench.events("subscriber.failed")[0]["error"]
