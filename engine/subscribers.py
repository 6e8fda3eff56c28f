"""What hosts are told while an engine works: typed events, in the order of the log."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from holdfast.engine.errors import EngineClosed, HoldfastError, InvalidRequest
from holdfast.engine.requests.told import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from PIL.Image import Image

    from holdfast.engine.jobs.progress import Progress
    from holdfast.engine.jobs.worker import Worker

LIMIT = 64
"""Events that may wait for one slow subscriber before previews, then progress, are left out."""

PATIENCE = 5.0
"""Seconds that a close waits for a subscriber that is in the middle of its callback."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """
    Something that an engine did.

    Attributes:
        request_id: The request that it belongs to, as `Job.request_id` and the log name it; None
            if it belongs to none.
    """

    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Transition(Event):
    """The lifecycle moved: the keys of ``state.changed``."""

    trigger: str
    source: str
    dest: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Progressed(Event):
    """A job made progress: it entered a phase or finished a step."""

    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Preview(Event):
    """
    The image as it stands after a step.

    Attributes:
        pass_number: 1 or 2.
        step: Steps that are done in the pass.
        steps: Steps of the pass.
    """

    pass_number: int
    step: int
    steps: int
    draw: Callable[[], Image]

    @cached_property
    def image(self) -> Image:
        """A small picture, a pixel for each latent pixel; drawn when it is first asked for."""
        return self.draw()


@dataclass(frozen=True, kw_only=True)
class CompileHeartbeat(Event):
    """A component is still being compiled: the keys of ``compile.heartbeat``."""

    component: str
    elapsed_seconds: float
    expected_seconds: float | None
    rss_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Degraded(Event):
    """Something was not done as asked, which the host allows: the keys of ``degradation``."""

    kind: str
    asked: object
    given: object


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """
    A request ended, and so did its job: `Job.result` returns at once.

    Attributes:
        status: ``"done"``, ``"failed"`` or ``"cancelled"``, as its job has it.
        error: What it failed with; None otherwise.
    """

    status: str
    error: str | None = None


class Subscribers:
    """
    The subscribers of one engine, each with a thread of its own, so that none delays another.

    Args:
        worker: Does the jobs whose progress is told.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._all: tuple[_Subscriber, ...] = ()
        self._told: tuple[object, ...] = ()
        self._listening = False
        self._closed = False

    def subscribe(
        self,
        callback: Callable[[Any], object],
        kinds: Collection[type[Event]] | None = None,
        *,
        preview_every: int = 1,
    ) -> Callable[[], None]:
        """
        Call `callback` with every later event.

        It runs in a thread of its own, one event after the other, in the order of the log. When it
        is slow, it misses previews first and then progress, never anything else. When it raises,
        ``subscriber.failed`` is logged and it goes on receiving. It may call every method of the
        engine. What it holds, the engine among them, stays alive until it is unsubscribed.

        Args:
            callback: Takes one event.
            kinds: Classes of events to receive. None: all.
            preview_every: Steps from one preview to the next; the last step of a pass has one.

        Returns:
            A function that ends it; once that has returned, no other call begins.

        Raises:
            InvalidRequest: `callback` cannot be called, `kinds` are no classes of events, or
                `preview_every` is no number of steps from 1 on.
            EngineClosed: The engine tells nothing any more.
            HoldfastError: No thread can be started.
        """
        wanted = _checked(callback, kinds, preview_every)
        with self._lock:
            if self._closed:
                msg = "a subscriber came to an engine that is closed; open another engine"
                raise EngineClosed(msg)
            subscriber = _Subscriber(callback, wanted, preview_every, self._worker)
            if not self._listening:
                self._worker.emit.add_sink(self)
                self._listening = True
            self._all += (subscriber,)

        def unsubscribe() -> None:
            with self._lock:
                self._all = tuple(each for each in self._all if each is not subscriber)
            subscriber.stop()

        return unsubscribe

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Take one record of the log and hand on what it tells, without waiting for anybody."""
        if not self._all:
            return
        try:
            self._hand_on(record)
        except Exception as error:  # noqa: BLE001 - one event that cannot be told must not end all others
            self._worker.emit("subscriber.failed", error=repr(error), subscriber=repr(self))

    def _hand_on(self, record: Mapping[str, Any]) -> None:
        event = _typed(record)
        if event is not None:
            self._offer(event)
        job = self._worker.running
        if job is None or record["event"].startswith("job."):  # its beginning and end: no progress
            return
        progress = job.progress
        told = (job.request_id, progress.phase, progress.step)
        if told != self._told or record["event"] == "compile.heartbeat":
            self._told = told
            self._offer(Progressed(request_id=job.request_id, progress=progress))

    def wants_preview(self, step: int, steps: int) -> bool:
        """Whether anybody wants a preview after this step."""
        return any(each.wants_preview(step, steps) for each in self._all)

    def preview(self, preview: Preview) -> None:
        """Hand on a preview."""
        self._offer(preview)

    def close(self, patience: float = PATIENCE) -> None:
        """
        Deliver what waits and end every thread.

        Args:
            patience: Seconds to wait for that, all together. A thread that is still in its
                callback then ends after it.
        """
        with self._lock:
            self._closed = True
            subscribers, self._all = self._all, ()
        for each in subscribers:
            each.finish()
        until = time.monotonic() + patience
        for each in subscribers:
            each.join(max(until - time.monotonic(), 0.0))

    def _offer(self, event: Event) -> None:
        for each in self._all:
            each.offer(event)


class _Subscriber:
    """One callback, its queue, and the thread that calls it."""

    def __init__(
        self,
        callback: Callable[[Any], object],
        kinds: tuple[type[Event], ...],
        preview_every: int,
        worker: Worker,
    ) -> None:
        self._callback = callback
        self._kinds = kinds
        self._preview_every = preview_every
        self._worker = worker
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(
            target=self._deliver, name="holdfast-subscriber", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            msg = (
                f"a subscriber's thread could not be started ({error}): this process has "
                "reached its limit of threads. End some threads and subscribe again."
            )
            raise HoldfastError(msg) from error

    def wants_preview(self, step: int, steps: int) -> bool:
        due = step % self._preview_every == 0 or step == steps
        return due and issubclass(Preview, self._kinds)

    def offer(self, event: Event) -> None:
        if not isinstance(event, self._kinds):
            return
        if isinstance(event, Preview) and not self.wants_preview(event.step, event.steps):
            return
        with self._changed:
            if len(self._waiting) >= LIMIT:
                self._leave_out()
            self._waiting.append(event)
            self._changed.notify()

    def stop(self) -> None:
        """Deliver nothing more."""
        with self._changed:
            self._waiting.clear()
        self.finish()

    def finish(self) -> None:
        """Deliver what waits, then end."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def join(self, timeout: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _leave_out(self) -> None:
        for kind in (Preview, Progressed, CompileHeartbeat):
            for place, event in enumerate(self._waiting):
                if isinstance(event, kind):
                    del self._waiting[place]
                    return

    def _deliver(self) -> None:
        while (event := self._next()) is not None:
            if isinstance(event, Finished):
                self._let_end(event)
            try:
                self._callback(event)
            except BaseException as error:  # noqa: BLE001 - whatever a host's callback raises, the next event comes
                self._worker.emit(
                    "subscriber.failed", error=repr(error), subscriber=repr(self._callback)
                )

    def _let_end(self, event: Finished) -> None:
        """Wait for the moment in which the job ends, which comes right after it is logged."""
        job = self._worker.running
        if job is not None and job.request_id == event.request_id:
            job.exception()

    def _next(self) -> Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._open)
            return self._waiting.popleft() if self._waiting else None


def _checked(callback: object, kinds: object, preview_every: object) -> tuple[type[Event], ...]:
    """Return the classes that a subscriber wants, made sure of."""
    if not callable(callback):
        msg = f"{shown(callback)} was to be called with events, but it is no function; give one."
        raise InvalidRequest(msg)
    if isinstance(preview_every, bool) or not isinstance(preview_every, int) or preview_every < 1:
        msg = (
            f"previews were asked for every {shown(preview_every)} steps; give a whole number, 1 "
            "for one after each step."
        )
        raise InvalidRequest(msg)
    single = isinstance(kinds, (str, type)) or not isinstance(kinds, Iterable)
    wanted: tuple[Any, ...] = (kinds,) if single else tuple(cast("Iterable[object]", kinds))
    if kinds is None:
        wanted = (Event,)
    for kind in wanted:
        if not (isinstance(kind, type) and issubclass(kind, Event)):
            msg = (
                f"events of the kind {shown(kind)} were asked for, which is no class of events; "
                "give classes such as Progressed or Preview, or leave kinds out for all."
            )
            raise InvalidRequest(msg)
    return wanted


_SAME: Mapping[str, type[Event]] = MappingProxyType({
    "state.changed": Transition,
    "compile.heartbeat": CompileHeartbeat,
    "degradation": Degraded,
})  # fmt: skip

_ENDINGS = MappingProxyType({
    "request.completed": "done",
    "request.failed": "failed",
    "request.cancelled": "cancelled",
})  # fmt: skip


def _typed(record: Mapping[str, Any]) -> Event | None:
    """Make the typed event of a record of the log; most have none."""
    name = record["event"]
    if name in _SAME:
        kind = _SAME[name]
        return kind(**{field.name: record.get(field.name) for field in fields(kind)})
    request_id = record.get("request_id")
    if name in _ENDINGS:
        return Finished(request_id=request_id, status=_ENDINGS[name], error=record.get("error"))
    if name == "cancel.observed" and record["phase"] == "queued":
        # It never began, so that no ending of a request is logged.
        return Finished(request_id=request_id, status="cancelled")
    return None
