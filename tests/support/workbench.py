"""A worker with a log and a gate, for tests that need a busy one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

from holdfast.engine.jobs.worker import Worker
from holdfast.engine.logbook.events import Emitter
from holdfast.states import Lifecycle

if TYPE_CHECKING:
    from holdfast.engine.jobs.job import Job

PATIENCE = 30.0


class Bench:
    """A worker, what it logged, and a gate that keeps it busy until it is opened."""

    def __init__(self, **options: Any) -> None:
        self.log: list[dict[str, Any]] = []
        self.emit = Emitter("bench", (lambda record: self.log.append(dict(record)),))
        options = {"queue_limit": 64, "order": "fair"} | options
        self.worker = Worker("bench", self.emit, Lifecycle(), **options)
        self.gate = threading.Event()
        self.order: list[str] = []

    def busy(self) -> Job[None]:
        """Submit a job that runs until the gate opens, and return once it runs."""
        runs = threading.Event()

        def work(_: Job[None]) -> None:
            runs.set()
            assert self.gate.wait(PATIENCE)

        job = self.worker.submit("busy", work)
        assert runs.wait(PATIENCE)
        return job

    def named(self, name: str, **options: Any) -> Job[None]:
        """Submit a job that writes its name into `order`."""
        return self.worker.submit(name, lambda _: self.order.append(name), **options)

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [record for record in self.log if record["event"] in names]


def raise_in(thread: threading.Thread | None, kind: type[BaseException]) -> None:
    """Set an exception into a thread, as debuggers and time limits of hosts do."""
    assert thread is not None
    ident = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(kind))


def until_stopped(job: Job[Any]) -> None:
    """Work, a checkpoint at a time, until somebody stops it."""
    while True:
        job.checkpoint("work")


def python(program: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    setup = """
        import os, sys, threading, time
        from holdfast.engine.logbook.events import Emitter
        from holdfast.engine.jobs.worker import Worker
        from holdfast.states import Lifecycle
        worker = Worker("test", Emitter("test"), Lifecycle(), queue_limit=9, order="fair")
        runs = threading.Event()
        def forever(job):
            while True:
                runs.set()
                job.checkpoint("work")
        """
    return subprocess.run(  # noqa: S603 - the programs stand below
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(program)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
