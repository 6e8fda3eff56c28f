from __future__ import annotations

import asyncio
import functools
import gc
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from holdfast.engine.errors import (
    GenerationError,
    HoldfastError,
)
from tests.support.workbench import PATIENCE, Bench, python

if TYPE_CHECKING:
    from holdfast.engine.jobs.job import Job


def test_a_timeout_leaves_the_job_running(bench: Bench) -> None:
    """result(timeout) gives up waiting and nothing else."""
    job = bench.busy()
    with pytest.raises(TimeoutError):
        job.result(timeout=0.01)
    assert job.status == "running"
    bench.gate.set()
    assert job.result(PATIENCE) is None
    assert job.status == "done"


def test_a_failure_is_told_as_it_was_raised(bench: Bench) -> None:
    """Result raises the error of the work, exception returns it, and the next job runs."""

    def fail(_: Job[None]) -> None:
        msg = "the VAE is missing"
        raise GenerationError(msg)

    job = bench.worker.submit("x", fail)
    with pytest.raises(GenerationError, match="the VAE is missing"):
        job.result(PATIENCE)
    assert isinstance(job.exception(), GenerationError)
    assert job.status == "failed"
    assert bench.worker.submit("y", lambda _: 7).result(PATIENCE) == 7


def test_a_failed_job_keeps_nothing_alive(bench: Bench) -> None:
    """A host that keeps a failed job keeps its error and where it was raised, not what it used."""

    class Pipeline:
        pass

    def fail(used: Pipeline, _: Job[None]) -> None:
        msg = f"{used} failed"
        try:
            int(msg)
        except ValueError as error:
            raise GenerationError(msg) from error

    pipeline = Pipeline()
    gone = weakref.ref(pipeline)
    job = bench.worker.submit("x", functools.partial(fail, pipeline))
    error = job.exception(PATIENCE)
    bench.worker.call("last", lambda _: None)
    del pipeline
    gc.collect()
    assert gone() is None
    assert error is not None
    assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"


def test_the_thread_lets_go_of_what_it_has_done(bench: Bench) -> None:
    """Between jobs nothing of the last one is held, so that its engine can be collected."""

    class Engine:
        def work(self, _: Job[int]) -> int:
            return 1

    engine = Engine()
    gone = weakref.ref(engine)
    job = bench.worker.submit("x", engine.work)
    assert job.result(PATIENCE) == 1
    bench.worker.submit("y", lambda _: None).result(PATIENCE)
    del engine
    gc.collect()
    assert gone() is None


def test_any_loop_can_await_a_job(bench: Bench) -> None:
    """One job may be awaited in several asyncio loops, and after its end."""

    async def wait(job: Job[int]) -> int:
        return await job

    bench.busy()
    job = bench.worker.submit("x", lambda _: 5)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(asyncio.run, wait(job)) for _ in range(3)]
        bench.gate.set()
        assert [each.result(PATIENCE) for each in waiting] == [5, 5, 5]
    assert asyncio.run(wait(job)) == 5


@pytest.mark.parametrize("bound", [False, True])
def test_a_cancelled_task_cancels_its_job_only_where_it_was_bound(
    bench: Bench, *, bound: bool
) -> None:
    """A cancelled task that awaits ``job`` leaves it alone; with ``job.bound()`` it stops it."""
    bench.busy()
    job = bench.worker.submit("x", lambda _: 5)

    async def abandon() -> None:
        async def wait() -> int:
            return await (job.bound() if bound else job)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(abandon())
    assert job.status == ("cancelled" if bound else "queued")
    bench.gate.set()
    if not bound:
        assert job.result(PATIENCE) == 5


def test_an_interrupt_of_the_waiting_thread_stops_the_job() -> None:
    """Ctrl-C in bound_result ends the wait at once and the job with it."""
    ran = python("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        job = worker.submit("x", forever)
        runs.wait()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            job.bound_result()
        except KeyboardInterrupt:
            print(type(job.exception()).__name__, worker.close())
        """)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("Cancelled True\n", "", 0)


def test_callbacks_are_called_once_with_the_job(bench: Bench) -> None:
    """A callback gets its job when it has ended, or at once; one that raises harms nobody."""
    called: list[object] = []

    def broken(job: Job[int]) -> None:
        called.append(job)
        raise ZeroDivisionError

    bench.busy()
    job = bench.worker.submit("x", lambda _: 5)
    job.add_done_callback(broken)
    job.add_done_callback(called.append)
    bench.gate.set()
    bench.worker.call("last", lambda _: None)
    job.add_done_callback(called.append)
    assert called == [job, job, job]
    assert job.result() == 5


def test_the_engines_thread_cannot_wait_for_itself(bench: Bench) -> None:
    """Inside a job, submitting works; waiting for a job that is to come is refused in words."""

    def work(_: Job[object]) -> tuple[Job[int], str, str]:
        inner = bench.worker.submit("inner", lambda _: 3)
        with pytest.raises(HoldfastError) as waited:
            inner.result()
        with pytest.raises(HoldfastError) as called:
            bench.worker.call("configure", lambda _: None)
        return inner, str(waited.value), str(called.value)

    inner, waited, called = bench.worker.submit("outer", work).result(PATIENCE)
    assert "inner was to be waited for in the engine's own thread" in waited
    assert "configure was to be waited for in the engine's own thread" in called
    assert inner.result(PATIENCE) == 3
