"""A job: one piece of work of an engine, which any thread may wait for, watch and stop."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import secrets
import threading
import time
from concurrent.futures import Future, wait
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from holdfast.engine.errors import Cancelled, HoldfastError, let_go
from holdfast.engine.jobs.progress import Course, Progress
from holdfast.engine.logbook.events import error_words

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextvars import Context

    from PIL.Image import Image

    from holdfast.engine.logbook.events import Emitter

T = TypeVar("T")
Keep = Literal["nothing", "first_pass"]
Status = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]

_LOOK_SECONDS = 1.0
"""Seconds after which somebody who waits looks whether the engine's thread is still there."""

_doing: ContextVar[Job[Any] | None] = ContextVar("doing", default=None)


class Queue(Protocol):
    """What a job asks of the worker that it was given to."""

    emit: Emitter

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked off the one that does the jobs."""

    @property
    def state(self) -> str:
        """The state of what the jobs work on."""

    def position(self, job: Job[Any]) -> int | None:
        """How many jobs come before a waiting one, the running one included."""

    def withdraw(self, job: Job[Any]) -> bool:
        """Take a job out of the queue. Returns whether it was still there."""

    def refuse_waiting(self, job: Job[Any]) -> None:
        """Raise a `HoldfastError` where waiting for the job would never end; asked repeatedly."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request to stop: who asked for what, when, and what was going on then."""

    why: str
    keep: Keep
    phase: str
    wall: dt.datetime
    clock: float


class Job(Generic[T]):
    """
    One piece of work of an engine: the holder waits for it, watches it, and may stop it.

    Any thread may call the holder's methods. `checkpoint`, `interruptible`, `expect`, `advance`
    and `keep_first_pass` are for the work itself, in the engine's thread.

    Attributes:
        id: Cannot be guessed. Whoever knows it may stop the job, so keep it secret.
        kind: What was asked for, for example ``"hires"`` or ``"configure"``.
        request_id: Its name in the log. It is no secret, and cannot be used to stop the job.
        asked: What it is to change, as the log tells it.
        priority: Higher ones come first.
    """

    def __init__(
        self,
        queue: Queue,
        kind: str,
        work: Callable[[Job[T]], T],
        *,
        request_id: str,
        asked: Mapping[str, object] | None = None,
        priority: int = 0,
        recompiles: Callable[[], bool] | None = None,
        alone: bool = False,
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.kind = kind
        self.request_id = request_id
        self.asked = dict(asked or {})
        self.priority = priority
        self.alone = alone
        self.recompiles = recompiles
        self.announced = False
        self.overtaken = 0
        self._queue = queue
        self._work: Callable[[Job[T]], T] | None = work
        self._context: Context | None = copy_context()
        self._lock = threading.RLock()
        self._future: Future[T] = Future()
        self._future.set_running_or_notify_cancel()
        self._status: Status = "queued"
        self._since = time.monotonic()
        self._told = False
        self._course = Course()
        self._phase = "queued"
        self._asked = False
        self._ask: _Ask | None = None
        self._interrupt: Callable[[], None] | None = None
        self._interrupted = False
        self._stopped: Cancelled | None = None
        self._kept: tuple[Image, ...] = ()
        self._deadline: threading.Timer | None = None

    def __repr__(self) -> str:
        return f"<Job [{self.kind}, {self.status}, {self.progress.fraction:.0%}]>"

    @property
    def status(self) -> Status:
        """``"cancelling"``: asked to stop, not yet stopped."""
        status = self._status
        return "cancelling" if status == "running" and self._ask is not None else status

    @property
    def position(self) -> int | None:
        """How many jobs come before it, the running one included; None once it runs."""
        return self._queue.position(self)

    @property
    def progress(self) -> Progress:
        """How far it has come, over the whole request."""
        return self._course.progress

    @property
    def seconds(self) -> float:
        """How long it has been at work; while it waits, how long it has waited."""
        return time.monotonic() - self._since

    @property
    def kept(self) -> tuple[Image, ...]:
        """The first pass's images, from the moment when they exist."""
        return self._kept

    def done(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """
        Wait for the result.

        Args:
            timeout: Seconds. None: as long as it takes.

        Raises:
            TimeoutError: It has not ended yet, and goes on.
            Cancelled: It was stopped.
            HoldfastError: What it failed with; or it was called in the engine's own thread,
                which would wait for itself.
        """
        self._wait(timeout)
        return self._future.result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the error it ended with, or None. Raises as `result` does."""
        self._wait(timeout)
        return self._future.exception(0)

    def bound_result(self) -> T:
        """Wait for the result; an interrupt of the waiting thread, as by Ctrl-C, stops the job."""
        try:
            return self.result()
        except BaseException:
            self.cancel()
            raise

    def __await__(self) -> Generator[object, None, T]:
        """Wait for the result in any asyncio loop. Cancelling the task leaves the job running."""
        self._queue.refuse_waiting(self)
        import asyncio

        return asyncio.wrap_future(self._future).__await__()

    async def bound(self) -> T:
        """Wait for the result; cancelling the task that waits stops the job too."""
        import asyncio

        try:
            return await self
        except asyncio.CancelledError:
            self.cancel()
            raise

    def add_done_callback(self, callback: Callable[[Job[T]], object]) -> None:
        """
        Call `callback` with this job when it has ended, at once where it already has.

        It must be quick. It runs in the thread in which the job ended: the engine's thread, unless
        the job never began. It may submit jobs, but must not wait for them. What it raises is
        logged, and nothing else.
        """

        def call(_: Future[T]) -> None:
            try:
                callback(self)
            except BaseException as error:  # noqa: BLE001 - a host's callback must not end the engine's thread
                self._queue.emit("subscriber.failed", error=repr(error), subscriber=repr(callback))

        self._future.add_done_callback(call)

    def cancel(self, keep: Keep = "nothing") -> bool:
        """
        Ask the job to stop. Returns at once; `result` then raises `Cancelled`.

        Args:
            keep: ``"first_pass"``: the error, and `kept`, hold the first pass's images where the
                first pass was complete. The first request to stop decides.

        Returns:
            False if it had already ended, and in a forked process, which cannot stop it. A job
            that ends before it notices the request to stop counts as done.
        """
        return self.stop(keep, "the holder asked for it")

    def stop(self, keep: Keep, why: str) -> bool:
        """Ask the job to stop, and say why: the one way in for holders, deadlines and closing."""
        if self._queue.is_forked:  # asked first: a thread that is not here may have held the lock
            return False
        clock, wall = time.monotonic(), dt.datetime.now(dt.UTC)
        with self._lock:
            if self._future.done():
                return False
            if self._asked:
                return True
            self._asked = True
        try:
            # Told before it can be noticed; outside the lock, as a log handler may look at the job.
            self._queue.emit("cancel.requested", request_id=self.request_id, keep=keep, why=why)
        finally:
            with self._lock:
                self._ask = _Ask(why, keep, self._phase, wall, clock)
                if self._interrupt is not None:
                    self._interrupted = True
                    self._interrupt()
            if self._queue.withdraw(self):
                self.end("cancelled", error=self._cancelled("queued"))
        return True

    # What follows is for the work itself, in the engine's thread.

    def checkpoint(self, phase: str) -> None:
        """
        Stop here if that was asked for.

        Args:
            phase: What comes next, for example ``"compile unet"``.

        Raises:
            Cancelled: The holder, a deadline or the engine's close asked the job to stop.
        """
        self._phase = phase
        if self._ask is not None:
            raise self._cancelled(phase)

    @contextlib.contextmanager
    def interruptible(
        self,
        phase: str,
        interrupt: Callable[[], None],
        means_interrupted: Callable[[Exception], bool] = lambda _: True,
    ) -> Iterator[None]:
        """
        Let a request to stop break into the native call inside, from the thread that asks.

        Args:
            phase: As for `checkpoint`.
            interrupt: Makes the native call raise; never called once the block has been left.
            means_interrupted: Tells what `interrupt` causes from a failure of the same moment.

        Raises:
            Cancelled: In place of what the interrupted call raised.
        """
        with self._lock:
            self.checkpoint(phase)
            self._interrupt, self._interrupted = interrupt, False
        try:
            yield
        except Cancelled:
            raise
        except Exception as error:
            with self._lock:
                interrupted = self._interrupted
            if interrupted and means_interrupted(error):
                raise self._cancelled(phase) from error
            raise
        finally:
            with self._lock:
                self._interrupt = None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how many seconds each phase is expected to take, in the order of the phases."""
        self._course.expect(seconds)

    def advance(
        self,
        phase: str,
        *,
        pass_number: int | None = None,
        step: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Say where the work stands; `step` counts the steps that are done."""
        self._course.advance(phase, pass_number, step, steps)

    def keep_first_pass(self, images: Sequence[Image]) -> None:
        """Hold on to the first pass's images, whatever becomes of the second."""
        self._kept = tuple(images)

    def run(self) -> None:
        """Do the work, in the context of who submitted it, and end in the way that it ends."""
        work, context = self._work, self._context
        if self._status != "queued" or work is None or context is None:
            self.break_off()
            return
        self._status, self._since = "running", time.monotonic()
        result: T | None = None
        error: BaseException | None = None
        status: Status = "done"
        try:
            self._course.begin()
            self.checkpoint("queued")
            context.run(_doing.set, self)
            result = context.run(self._work_on, work)
        except Cancelled as cancelled:
            status, error = "cancelled", cancelled
        except BaseException as failure:  # noqa: BLE001 - whatever it is, it belongs to who waits for it
            status, error = "failed", failure
        try:
            self.end(status, result, error)
        except BaseException:
            self.end(status, result, error)  # what was done is done, whatever broke into its ending
            raise
        finally:
            del work, context, result, error  # the error's traceback holds this frame

    def _work_on(self, work: Callable[[Job[T]], T]) -> T:
        self._tell("started", asked=self.asked)
        with self._queue.emit.scope(request_id=self.request_id):
            return work(self)

    def _tell(self, ending: str, **more: object) -> None:
        """Emit an event of the job's own, with what was bound where it was submitted."""
        facts: dict[str, Any] = {"request_id": self.request_id, "kind": self.kind, **more}
        context = copy_context() if self._context is None else self._context.copy()
        context.run(self._queue.emit, f"job.{ending}", **facts)

    def refuse(self, error: HoldfastError) -> None:
        """Tell that it is not taken on; nothing where it was, and has told its end."""
        if not self.done():
            error.state_after = error.state_after or self._queue.state
            self._tell(
                "refused", asked=self.asked, error=error_words(error), state=error.state_after
            )

    def break_off(self) -> None:
        """End it as failed where the thread was ended in the middle of it; else do nothing."""
        if not self.done():
            msg = (
                f"{self.kind} was broken off: something outside raised in the engine's thread. "
                "The engine is ready for the next job; submit this one again to have it done."
            )
            self.end("failed", error=HoldfastError(msg))

    def end(
        self, status: Status, result: T | None = None, error: BaseException | None = None
    ) -> None:
        """Tell everybody who waits, and let go of all that the work held. Once is enough."""
        if self.done():
            return
        if not self._told:
            more = {} if status != "failed" or error is None else {"error": error_words(error)}
            seconds = round(time.monotonic() - self._since, 6)
            ending = {"done": "completed"}.get(status, status)
            self._tell(ending, **more, state=self._queue.state, seconds=seconds)
            self._told = True
        self._status = status
        self._work = self._context = self.recompiles = None
        if self._deadline is not None:
            self._deadline.cancel()
        if error is None:
            self._course.finish()
            self._future.set_result(result)  # type: ignore[arg-type]  # no error: a T, which may be None
            return
        let_go(error)
        self._future.set_exception(error)

    def limit(self, seconds: float) -> None:
        """
        Stop the job when so many seconds have passed.

        Raises:
            HoldfastError: No thread can be started that would.
        """
        seconds = min(seconds, threading.TIMEOUT_MAX)
        why = f"its deadline of {seconds:g} s passed"
        timer = threading.Timer(seconds, self.stop, ("nothing", why))
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            msg = (
                f"{self.kind} was to have a deadline, but no thread could be started for it "
                f"({error}): this process has reached its limit of threads. It was not queued; "
                "end some threads and ask again."
            )
            raise HoldfastError(msg) from error
        self._deadline = timer
        if self.done():
            timer.cancel()

    def _wait(self, timeout: float | None) -> None:
        """Wait for the end, and look now and then whether there still is who will bring it."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            self._queue.refuse_waiting(self)
            left = until - time.monotonic()
            if wait((self._future,), timeout=max(min(left, _LOOK_SECONDS), 0.0)).done:
                return
            if left <= 0:
                msg = f"{self.kind} has not ended within {timeout:g} s, and goes on"
                raise TimeoutError(msg)

    def _cancelled(self, phase: str) -> Cancelled:
        ask = self._ask
        if ask is None:
            msg = "a job that nobody asked to stop cannot be cancelled"
            raise HoldfastError(msg)
        if self._stopped is None:
            seconds = time.monotonic() - ask.clock
            first_pass = self._kept if ask.keep == "first_pass" else ()
            kept = "first_pass" if first_pass else "nothing"
            self._stopped = Cancelled(
                f"{self.kind} was asked to stop at {ask.wall:%H:%M:%S.%f} UTC ({ask.why}), during "
                f"{ask.phase!r}; it was noticed {seconds:.3f} s later, at {phase!r}; kept: {kept}. "
                "The engine is ready for the next job; submit this one again to have it done.",
                phase=phase,
                seconds_to_stop=seconds,
                first_pass=first_pass,
            )
            self._queue.emit(
                "cancel.observed",
                request_id=self.request_id,
                phase=phase,
                seconds_to_stop=round(seconds, 6),
                kept=kept,
            )
        return self._stopped


@contextlib.contextmanager
def breakable(phase: str, interrupt: Callable[[], None]) -> Iterator[None]:
    """
    Let a request to stop break into what is waited for inside, whichever job it is done for.

    For work that lies far below a job and is done without one too, as `holdfast export` does.

    Args:
        phase: As for `Job.checkpoint`.
        interrupt: As for `Job.interruptible`.

    Raises:
        Cancelled: In place of what the interrupted call raised.
    """
    job = _doing.get()
    with contextlib.nullcontext() if job is None else job.interruptible(phase, interrupt):
        yield


def heed(phase: str) -> None:
    """
    Stop here if that was asked of the job that this is done for, if it is done for any.

    Raises:
        Cancelled: As `Job.checkpoint`.
    """
    job = _doing.get()
    if job is not None:
        job.checkpoint(phase)
