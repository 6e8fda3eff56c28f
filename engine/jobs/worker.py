"""The one thread of an engine that makes all of its native calls, and the queue in front of it."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from holdfast.engine.errors import EngineClosed, HoldfastError, InvalidRequest, QueueFull
from holdfast.engine.jobs.job import Job
from holdfast.engine.requests.told import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from holdfast.engine.logbook.events import Emitter
    from holdfast.states import Lifecycle

T = TypeVar("T")

MAX_OVERTAKEN = 8
"""How often a job may be overtaken by later ones that need no recompile."""

EXIT_PATIENCE = 60.0
"""Seconds that the interpreter's exit waits for a native call that cannot be interrupted."""

_LONGEST_REST = 1.0
"""Seconds between two turns of the thread where one after the other fails."""

_CLOSED = "the engine was closed"


class Worker:
    """
    Does the jobs of one engine, one at a time, in one thread that starts with the first of them.

    Any thread may call any method. The thread holds its engine only while it does a job: an
    engine that nobody else holds is collected. Whatever is raised in the thread, it goes on; where
    it was ended all the same, the next call finds that out and starts another.

    Args:
        name: Of the thread.
        emit: Told of every job.
        lifecycle: Of what the jobs work on; the log tells its state after each.
        queue_limit: Requests that may wait at once.
        order: ``"fair"``: by priority, then as submitted. ``"fewest_recompiles"``: a request that
            needs no recompile may also be taken ahead of ones of its priority that do, each of
            which is overtaken `MAX_OVERTAKEN` times at most.
    """

    _ran_in: ClassVar[int | None] = None
    """Process in which an engine's thread first ran: its native threads do not survive a fork."""

    def __init__(
        self, name: str, emit: Emitter, lifecycle: Lifecycle, *, queue_limit: int, order: str
    ) -> None:
        self.emit = emit
        self._lifecycle = lifecycle
        self._name = name
        self._queue_limit = queue_limit
        self._order = order
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        # Not a Condition: an engine may be collected, and so closed, in this very thread between
        # a look at the queue and the wait, and only a SimpleQueue remembers that wake-up.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting: list[Job[Any]] = []
        self._jobs: weakref.WeakValueDictionary[str, Job[Any]] = weakref.WeakValueDictionary()
        self._running: Job[Any] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._leaving = False
        self._left = False
        self._faults = 0
        self._rested = True
        self._release: Callable[[], bool] | None = None
        self._unreleased = False
        self._idle_seconds: Callable[[], Callable[[], float | None] | None] = _nothing
        self._idle: Callable[[], Callable[[], None] | None] = _nothing

    def submit(
        self,
        kind: str,
        work: Callable[[Job[T]], T],
        *,
        request_id: str | None = None,
        asked: Mapping[str, object] | None = None,
        priority: int = 0,
        deadline: float | None = None,
        recompiles: Callable[[], bool] | None = None,
    ) -> Job[T]:
        """
        Queue a request.

        Args:
            kind: As the log shows it.
            work: Called with its job in the worker thread, in the caller's context variables.
            request_id: None: made up from `kind`.
            asked: What it is to do, as the log tells it.
            priority: Higher ones come first.
            deadline: Seconds from now, waiting included, after which it is stopped.
            recompiles: Whether it would need a recompile as things stand; called in the worker
                thread, between jobs.

        Raises:
            InvalidRequest: `priority` is no whole number, or `deadline` is not over 0.
            QueueFull: As many requests wait as may.
            EngineClosed: The engine was closed.
            HoldfastError: The process was forked off the one that the engine runs in, or no thread
                can be started.
        """
        self._refuse_fork()
        job = self._job(
            kind, work, request_id, asked=asked, priority=priority, recompiles=recompiles
        )
        with _refusing(job):
            _check_order(kind, priority, deadline)
            self._enqueue(job, deadline)
        return job

    def call(
        self, kind: str, work: Callable[[Job[T]], T], asked: Mapping[str, object] | None = None
    ) -> T:
        """
        Queue a change to the engine itself and wait for it.

        It comes after every job that was queued before it and before every one queued later,
        whatever their priorities: a change never gets between a request and what it relies on.

        Raises:
            HoldfastError: Called in the worker thread, which would wait for itself; or as `submit`.
        """
        self._refuse_fork()
        job = self._job(kind, work, asked=asked, alone=True)
        with _refusing(job):
            self.refuse_waiting(job)
            self._enqueue(job, None)
        return job.bound_result()

    @contextlib.contextmanager
    def checking(self, kind: str, asked: Mapping[str, object] | None = None) -> Iterator[None]:
        """Refuse a job of this kind where what is asked of it is found to be wrong inside."""
        try:
            yield
        except HoldfastError as error:
            self._job(kind, _nothing, asked=asked).refuse(error)
            raise

    def job(self, job_id: str) -> Job[Any]:
        """
        Return the job with this id: while it waits or runs, and as long as anybody holds it.

        Raises:
            InvalidRequest: There is no such job.
        """
        job = self._jobs.get(job_id) if isinstance(job_id, str) else None
        if job is None:
            msg = f"no job has the id {shown(job_id)}: it was never given, or the job has ended"
            raise InvalidRequest(msg)
        return job

    def idle(self, seconds: Callable[[], float | None], callback: Callable[[], None]) -> None:
        """
        Have a bound method called in the worker thread when there has been no job for a while.

        Args:
            seconds: A bound method that says how long, or None for never; asked, and counted, anew
                after each job. Held weakly.
            callback: Held weakly. What it raises is logged.
        """
        self._idle_seconds, self._idle = weakref.WeakMethod(seconds), weakref.WeakMethod(callback)
        self._wake.put(None)

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked off the one that does the jobs."""
        return os.getpid() != self._pid

    @property
    def state(self) -> str:
        """The state of what the jobs work on."""
        return self._lifecycle.state.value

    @property
    def running(self) -> Job[Any] | None:
        """The job that is being done."""
        return self._running

    def position(self, job: Job[Any]) -> int | None:
        """How many jobs come before a waiting one, the running one included."""
        with self._lock:
            if job not in self._waiting:
                return None
            return self._waiting.index(job) + (self._running is not None)

    def withdraw(self, job: Job[Any]) -> bool:
        """Take a job out of the queue. Returns whether it was still there."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
        self._wake.put(None)
        return True

    def refuse_waiting(self, job: Job[Any]) -> None:
        """
        Refuse to wait for a job where that would never end.

        Where the worker thread was ended from outside, another one takes over, and the job that
        was in the middle of it fails.

        Raises:
            HoldfastError: In the worker thread, or in a forked process; or the thread was ended
                and no other can be started.
        """
        self._refuse_fork()
        if job.done():
            return
        if threading.current_thread() is self._thread:
            msg = (
                f"{job.kind} was to be waited for in the engine's own thread, which would have to "
                "do it meanwhile. Submit it there and wait for it in another thread."
            )
            raise HoldfastError(msg)
        with self._lock:
            if self._thread is not None and not self._left:
                self._start()

    def close(
        self,
        *,
        cancel: bool = False,
        timeout: float | None = None,
        release: Callable[[], bool] | None = None,
    ) -> bool:
        """
        Stop. Jobs that wait are cancelled and new ones refused. May be called again.

        Args:
            cancel: Stop the running job too; else it ends in its own time.
            timeout: Seconds to wait at most; then the running job is cancelled. None: until
                everything has ended.
            release: Called in the worker thread after its last job, or here where that thread was
                never needed. Returns whether all was given back; else the next close calls it
                again.

        Returns:
            Whether everything has ended and was given back. In the worker thread itself, and in a
            forked process, nothing can be waited for.
        """
        if self.is_forked:
            return False
        with self._lock:
            if not self._closed:
                self._release = release
            self._closed = True
            running, thread = self._running, self._thread
        for job in tuple(self._waiting):
            job.stop("nothing", _CLOSED)
        self._leaving = True
        self._wake.put(None)
        if running is not None and cancel:
            running.stop("nothing", _CLOSED)
        if thread is not None and threading.current_thread() is thread:
            return False
        if thread is not None:
            thread.join(None if timeout is None else bounded(timeout))
            if thread.is_alive():
                if running is not None and not cancel:
                    running.stop("nothing", f"{_CLOSED} and {timeout:g} s passed")
                return False
        broken = self._running  # by a thread that was ended in the middle of it
        if broken is not None:
            broken.break_off()
            self._running = None
        self._give_back()
        return not self._unreleased

    def _job(
        self, kind: str, work: Callable[[Job[T]], T], request_id: str | None = None, **more: Any
    ) -> Job[T]:
        name = request_id or f"{kind}-{next(self._numbers)}"
        return Job(self, kind, work, request_id=name, **more)

    def _enqueue(self, job: Job[Any], deadline: float | None) -> None:
        with self._lock:
            if self._closed:
                msg = f"{job.kind} was asked of an engine that is closed; open another engine"
                raise EngineClosed(msg)
            if not job.alone and len(self._waiting) >= self._queue_limit:
                msg = (
                    f"{job.kind} was to be queued, but {len(self._waiting)} jobs wait and the "
                    f"limit is {self._queue_limit}. Wait for one to end, cancel one, or open the "
                    "engine with a higher queue_limit."
                )
                raise QueueFull(msg)
            self._start()
            place = len(self._waiting)
            while place and not job.alone and self._yields(self._waiting[place - 1], job):
                place -= 1
            self._waiting.insert(place, job)
            self._jobs[job.id] = job
            ahead = place + (self._running is not None)
        try:
            if not job.alone:
                self.emit("request.queued", request_id=job.request_id, kind=job.kind, ahead=ahead)
            if deadline is not None:
                job.limit(deadline)
        except BaseException:
            job.stop("nothing", "it could not be queued")  # whoever asked will never hold it
            raise
        finally:
            # Taken only now, so that the log tells of the queueing before the start.
            job.announced = True
            self._wake.put(None)

    @staticmethod
    def _yields(earlier: Job[Any], later: Job[Any]) -> bool:
        return not earlier.alone and earlier.priority < later.priority

    def _start(self) -> None:
        """Start the thread where there is none, or where it was ended from outside."""
        if self._thread is not None and self._thread.is_alive():
            return
        thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            msg = (
                f"the engine's thread could not be started ({error}): this process has "
                "reached its limit of threads. Nothing was queued; end some threads and ask again."
            )
            raise HoldfastError(msg) from error
        if self._thread is None:
            atexit.register(self._exit)
        Worker._ran_in = Worker._ran_in or os.getpid()
        self._thread = thread

    def _serve(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return  # whoever started it was interrupted before they knew that it had begun
        while not self._left:
            try:
                self._turn()
                self._faults = 0
            except BaseException as error:  # noqa: BLE001 - who waits would wait for ever without this thread
                self._survive(error)

    def _turn(self) -> None:
        """Do the next job, or wait for one, or leave for good."""
        job = self._running or self._take()
        if job is not None:
            job.run()
            self._running = None
            self._rested = False
        elif self._leaving and not self._waiting:
            self._left = True  # whatever becomes of it: the next close gives back what was not
            self._give_back()
            atexit.unregister(self._exit)
        else:
            self._wait()

    def _survive(self, error: BaseException) -> None:
        """Tell of an error outside of any job's work, and rest where one follows the other."""
        with contextlib.suppress(BaseException):
            self._faults += 1
            self.emit("worker.failed", error=f"{type(error).__name__}: {error}")
            time.sleep(min(0.001 * 2 ** min(self._faults, 10), _LONGEST_REST))

    def _wait(self) -> None:
        asked = None if self._rested else self._idle_seconds()
        seconds = None if asked is None else asked()
        del asked  # which holds the engine
        try:
            self._wake.get(timeout=None if seconds is None else bounded(seconds))
        except queue.Empty:
            self._rested = True
            self._rest()

    def _rest(self) -> None:
        callback = self._idle()
        if callback is not None:
            Job(self, "idle", lambda _: callback(), request_id="idle").run()

    def _take(self) -> Job[Any] | None:
        choice = self._choose() if self._order == "fewest_recompiles" else None
        with self._lock:
            if self._closed or not self._waiting or not self._waiting[0].announced:
                return None
            place = 0
            if choice in self._waiting:
                place = self._waiting.index(choice)
                for passed in self._waiting[:place]:
                    passed.overtaken += 1
            self._running = self._waiting.pop(place)
            return self._running

    def _choose(self) -> Job[Any] | None:
        """Return the first job that may run before the others and needs no recompile, if any."""
        with self._lock:
            waiting = tuple(self._waiting)
        for job in waiting:
            if job.alone or not job.announced or job.priority < waiting[0].priority:
                return None
            if not _needs_recompile(job):
                return job
            if job.overtaken >= MAX_OVERTAKEN:
                return None
        return None

    def _give_back(self) -> None:
        with self._lock:
            release, self._release = self._release, None
            if release is not None:
                self._unreleased = True
        if release is None:
            return
        try:
            self._unreleased = not release()
        finally:
            if self._unreleased:
                self._release = release  # which the next close calls again

    def _exit(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.close(cancel=True, timeout=0)
        thread = self._thread
        if thread is not None:
            thread.join(EXIT_PATIENCE)

    def _refuse_fork(self) -> None:
        if self.is_forked or Worker._ran_in not in (None, self._pid):
            msg = (
                f"an engine was asked for in process {os.getpid()}, which was forked off process "
                f"{Worker._ran_in or self._pid} after an engine had been opened there; native "
                "threads do not survive that. Start processes with the 'spawn' method, or open "
                "the first engine after the fork."
            )
            raise HoldfastError(msg)


@contextlib.contextmanager
def _refusing(job: Job[Any]) -> Iterator[None]:
    """Tell of a job that is not taken on, whatever the reason."""
    try:
        yield
    except HoldfastError as error:
        job.refuse(error)
        raise


def bounded(seconds: float) -> float:
    """Return a time to wait, or the longest that the system can wait at once."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)


def _check_order(kind: str, priority: object, deadline: object) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int):
        msg = (
            f"{kind} was to be queued with the priority {shown(priority)}; a priority is a whole "
            "number, and higher ones come first. It was not queued."
        )
        raise InvalidRequest(msg)
    number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if deadline is not None and not (number and cast("float", deadline) > 0):
        msg = (
            f"{kind} was to be queued with the deadline {shown(deadline)}; a deadline is a number "
            "of seconds from now, over 0. It was not queued."
        )
        raise InvalidRequest(msg)


def _needs_recompile(job: Job[Any]) -> bool:
    asks = job.recompiles
    try:
        return asks is not None and asks()
    except Exception:  # noqa: BLE001 - a request that cannot be planned fails, with this error, once it is taken
        return False


def _nothing(*_: object) -> None:
    """Stand for a weak reference to nothing, and for the work of a job that is not taken on."""
