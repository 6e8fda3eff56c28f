"""A job: one piece of work of an engine, which any thread may wait for, watch and stop."""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import threading
import time
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from holdfast.engine.errors import Cancelled, HoldfastError
from holdfast.engine.faults import let_go
from holdfast.engine.progress import Course, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextvars import Context

    from PIL.Image import Image

    from holdfast.engine.owner import Owner

T = TypeVar("T")
Keep = Literal["nothing", "first_pass"]
Status = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]

_doing: ContextVar[Job[Any] | None] = ContextVar("doing", default=None)


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
        id: Known to the holder alone, and not to be guessed: who has it may stop the job.
        kind: What was asked for, for example ``"hires"`` or ``"configure"``.
        request_id: What the log calls it. No secret, and no use for stopping it.
        priority: Higher ones come first.
    """

    def __init__(
        self,
        owner: Owner,
        kind: str,
        work: Callable[[Job[T]], T],
        *,
        request_id: str,
        priority: int = 0,
        recompiles: Callable[[], bool] | None = None,
        alone: bool = False,
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.kind = kind
        self.request_id = request_id
        self.priority = priority
        self.alone = alone
        self.recompiles = recompiles
        self.announced = False
        self.overtaken = 0
        self._owner = owner
        self._work: Callable[[Job[T]], T] | None = work
        self._context: Context | None = copy_context()
        self._lock = threading.RLock()
        self._future: Future[T] = Future()
        self._future.set_running_or_notify_cancel()
        self._status: Status = "queued"
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
        return self._owner.position(self)

    @property
    def progress(self) -> Progress:
        """How far it has come, over the whole request."""
        return self._course.progress

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
        self._owner.refuse_waiting(self)
        return self._future.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return the error it ended with, or None. Raises as `result` does."""
        self._owner.refuse_waiting(self)
        return self._future.exception(timeout)

    def bound_result(self) -> T:
        """Wait for the result; an interrupt of the waiting thread, as by Ctrl-C, stops the job."""
        try:
            return self.result()
        except BaseException:
            self.cancel()
            raise

    def __await__(self) -> Generator[object, None, T]:
        """Wait for the result in any asyncio loop. Cancelling the task leaves the job running."""
        self._owner.refuse_waiting(self)
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

        It runs where the job ended, which is the engine's thread unless it never began, and must
        be quick. It may submit jobs, not wait for them.
        """
        self._future.add_done_callback(lambda _: callback(self))

    def cancel(self, keep: Keep = "nothing") -> bool:
        """
        Ask the job to stop. Returns at once; `result` then raises `Cancelled`.

        Args:
            keep: ``"first_pass"``: the error, and `kept`, hold the first pass's images where the
                first pass was complete. The first request to stop decides.

        Returns:
            False where it had already ended. A job that ends before it notices ends as done.
        """
        return self.stop(keep, "the holder asked for it")

    def stop(self, keep: Keep, why: str) -> bool:
        """Ask the job to stop, and say why: the one way in for holders, deadlines and closing."""
        clock, wall = time.monotonic(), dt.datetime.now(dt.UTC)
        with self._lock:
            if self._future.done():
                return False
            if self._asked:
                return True
            self._asked = True
        try:
            # Told before it can be noticed; outside the lock, as a log handler may look at the job.
            self._owner.emit("cancel.requested", request_id=self.request_id, keep=keep, why=why)
        finally:
            with self._lock:
                self._ask = _Ask(why, keep, self._phase, wall, clock)
                if self._interrupt is not None:
                    self._interrupted = True
                    self._interrupt()
            if self._owner.withdraw(self):
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
        if work is None or context is None:
            return
        self._status = "running"
        self._course.begin()
        try:
            self.checkpoint("queued")
            context.run(_doing.set, self)
            result = context.run(work, self)
        except Cancelled as error:
            self.end("cancelled", error=error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to who waits for it
            self.end("failed", error=error)
        else:
            self._course.finish()
            self.end("done", result)
        finally:
            del work, context  # an error's traceback holds this frame

    def end(
        self, status: Status, result: T | None = None, error: BaseException | None = None
    ) -> None:
        """Tell everybody who waits, and let go of all that the work held."""
        self._status = status
        self._work = self._context = self.recompiles = None
        if self._deadline is not None:
            self._deadline.cancel()
        if error is None:
            self._future.set_result(result)  # type: ignore[arg-type]  # no error: a T, which may be None
            return
        let_go(error)
        self._future.set_exception(error)

    def limit(self, seconds: float) -> None:
        """Stop the job when so many seconds have passed."""
        why = f"its deadline of {seconds:g} s passed"
        self._deadline = threading.Timer(seconds, self.stop, ("nothing", why))
        self._deadline.daemon = True
        self._deadline.start()
        if self.done():
            self._deadline.cancel()

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
            self._owner.emit(
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
