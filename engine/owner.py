"""The one thread of an engine that makes all of its native calls, and the queue in front of it."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from holdfast.engine.errors import EngineClosed, HoldfastError, InvalidRequest, QueueFull
from holdfast.engine.jobs import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.engine.events import Emitter

T = TypeVar("T")

MAX_OVERTAKEN = 8
"""How often a job may be overtaken by later ones that need no recompile."""

EXIT_PATIENCE = 60.0
"""Seconds that the interpreter's exit waits for a native call that cannot be interrupted."""

_CLOSED = "the engine was closed"


class Owner:
    """
    Does the jobs of one engine, one at a time, in one thread that starts with the first of them.

    Any thread may call any method. The thread holds its engine only while it does a job: an
    engine that nobody else holds is collected.

    Args:
        name: Of the thread.
        emit: Told of queueing and cancelling.
        queue_limit: Requests that may wait at once.
        order: ``"fair"``: by priority, then as submitted. ``"fewest_recompiles"``: a request that
            needs no recompile may also be taken ahead of ones of its priority that do, each of
            which is overtaken `MAX_OVERTAKEN` times at most.
    """

    _ran_in: ClassVar[int | None] = None
    """Process in which an engine's thread first ran: its native threads do not survive a fork."""

    def __init__(self, name: str, emit: Emitter, *, queue_limit: int, order: str) -> None:
        self.emit = emit
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
        self._release: Callable[[], None] | None = None
        self._idle_seconds: float | None = None
        self._idle: weakref.WeakMethod[Callable[[], None]] | None = None

    def submit(
        self,
        kind: str,
        work: Callable[[Job[T]], T],
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        recompiles: Callable[[], bool] | None = None,
    ) -> Job[T]:
        """
        Queue a request.

        Args:
            kind: As the log shows it.
            work: Called with its job in the owner thread, in the caller's context variables.
            request_id: None: made up from `kind`.
            priority: Higher ones come first.
            deadline: Seconds from now, waiting included, after which it is stopped.
            recompiles: Whether it would need a recompile as things stand; called in the owner
                thread, between jobs.

        Raises:
            QueueFull: As many requests wait as may.
            EngineClosed: The engine was closed.
            HoldfastError: The process was forked off the one that the engine runs in.
        """
        job = self._job(kind, work, request_id, priority=priority, recompiles=recompiles)
        self._enqueue(job, deadline)
        return job

    def call(self, kind: str, work: Callable[[Job[T]], T]) -> T:
        """
        Queue a change to the engine itself and wait for it.

        It comes after every job that was queued before it and before every one queued later,
        whatever their priorities: a change never gets between a request and what it relies on.

        Raises:
            HoldfastError: Called in the owner thread, which would wait for itself; or as `submit`.
        """
        job = self._job(kind, work, alone=True)
        self.refuse_waiting(job)
        self._enqueue(job, None)
        return job.bound_result()

    def job(self, job_id: str) -> Job[Any]:
        """
        Return the job with this id: while it waits or runs, and as long as anybody holds it.

        Raises:
            InvalidRequest: There is no such job.
        """
        job = self._jobs.get(job_id)
        if job is None:
            msg = f"no job has the id {job_id!r}: it was never given, or the job has ended"
            raise InvalidRequest(msg)
        return job

    def idle(self, seconds: float, callback: Callable[[], None]) -> None:
        """
        Have a bound method called in the owner thread when there has been no job for a while.

        Args:
            seconds: How long; counted anew after each job.
            callback: Held weakly. What it raises is lost.
        """
        self._idle_seconds, self._idle = seconds, weakref.WeakMethod(callback)
        self._wake.put(None)

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

        Raises:
            HoldfastError: In the owner thread, or in a forked process.
        """
        self._refuse_fork()
        if threading.current_thread() is self._thread and not job.done():
            msg = (
                f"{job.kind} was to be waited for in the engine's own thread, which would have to "
                "do it meanwhile. Submit it there and wait for it in another thread."
            )
            raise HoldfastError(msg)

    def close(
        self,
        *,
        wait: bool = True,
        timeout: float | None = None,
        release: Callable[[], None] | None = None,
    ) -> bool:
        """
        Stop. Jobs that wait are cancelled and new ones refused. May be called again.

        Args:
            wait: Let the running job end and wait for it; else cancel it and return at once.
            timeout: Seconds to wait at most; then the running job is cancelled.
            release: Called once, in the owner thread after its last job, or here where that
                thread was never needed.

        Returns:
            Whether everything has ended. In the owner thread itself, and in a forked process,
            nothing can be waited for.
        """
        if os.getpid() != self._pid:
            return False
        with self._lock:
            self._closed = True
            self._release = self._release or release
            running, thread = self._running, self._thread
        for job in tuple(self._waiting):
            job.stop("nothing", _CLOSED)
        self._leaving = True
        self._wake.put(None)
        if running is not None and not wait:
            running.stop("nothing", _CLOSED)
        if threading.current_thread() is thread:
            return False
        if thread is not None and wait:
            thread.join(timeout)
            if running is not None and thread.is_alive():
                running.stop("nothing", f"{_CLOSED} and {timeout:g} s passed")
        if thread is not None and thread.is_alive():
            return False
        self._give_back()
        return True

    def _job(
        self, kind: str, work: Callable[[Job[T]], T], request_id: str | None = None, **more: Any
    ) -> Job[T]:
        name = request_id or f"{kind}-{next(self._numbers)}"
        return Job(self, kind, work, request_id=name, **more)

    def _enqueue(self, job: Job[Any], deadline: float | None) -> None:
        self._refuse_fork()
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
        finally:
            # Taken only now, so that the log tells of the queueing before the start.
            job.announced = True
            self._wake.put(None)

    @staticmethod
    def _yields(earlier: Job[Any], later: Job[Any]) -> bool:
        return not earlier.alone and earlier.priority < later.priority

    def _start(self) -> None:
        if self._thread is None:
            Owner._ran_in = Owner._ran_in or os.getpid()
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
            atexit.register(self._exit)

    def _serve(self) -> None:
        rested = True
        while True:
            job = self._take()
            if job is not None:
                job.run()
                with self._lock:
                    self._running = None
                del job
                rested = False
                continue
            if self._leaving and not self._waiting:
                break
            try:
                self._wake.get(timeout=None if rested else self._idle_seconds)
            except queue.Empty:
                rested = True
                self._rest()
        self._give_back()
        atexit.unregister(self._exit)

    def _rest(self) -> None:
        callback = self._idle and self._idle()
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
            release, self._release = self._release, _nothing
        if release is not None:
            release()

    def _exit(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.close(wait=False)
        thread = self._thread
        if thread is not None:
            thread.join(EXIT_PATIENCE)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._pid or Owner._ran_in not in (None, self._pid):
            msg = (
                f"an engine was asked for in process {os.getpid()}, which was forked off process "
                f"{Owner._ran_in or self._pid} after an engine had been opened there; native "
                "threads do not survive that. Start processes with the 'spawn' method, or open "
                "the first engine after the fork."
            )
            raise HoldfastError(msg)


def _needs_recompile(job: Job[Any]) -> bool:
    asks = job.recompiles
    try:
        return asks is not None and asks()
    except Exception:  # noqa: BLE001 - a request that cannot be planned fails, with this error, once it is taken
        return False


def _nothing() -> None:
    """Stand for a release that has been done, and keep a later one from being taken."""
