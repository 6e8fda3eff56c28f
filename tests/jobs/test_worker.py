from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.errors import (
    Cancelled,
    EngineClosed,
    HoldfastError,
    InvalidRequest,
    QueueFull,
)
from holdfast.engine.jobs.worker import MAX_OVERTAKEN
from tests.support.workbench import PATIENCE, Bench, python, raise_in, until_stopped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine.jobs.job import Job


# One thread ---------------------------------------------------------------------------------------


def test_one_thread_does_all_jobs_one_at_a_time(bench: Bench) -> None:
    """Jobs of many threads are done in one thread, which is none of theirs, and never overlap."""
    inside, overlaps, threads = [0], [0], set()

    def work(_: Job[int]) -> int:
        inside[0] += 1
        overlaps[0] += inside[0] > 1
        threads.add(threading.get_ident())
        inside[0] -= 1
        return 1

    def host(_: int) -> tuple[int, int]:
        return threading.get_ident(), sum(
            bench.worker.submit("x", work).result() for _ in range(25)
        )

    with ThreadPoolExecutor(8) as pool:
        hosts = list(pool.map(host, range(8)))
    assert [count for _, count in hosts] == [25] * 8
    assert overlaps == [0]
    assert len(threads) == 1
    assert not threads & {thread for thread, _ in hosts}


def test_no_thread_starts_before_the_first_job(bench: Bench) -> None:
    """A worker that was never given a job has no thread, and closes without one."""
    before = threading.active_count()
    assert bench.worker.close()
    assert threading.active_count() == before


def test_the_work_sees_the_context_of_its_submitter(bench: Bench) -> None:
    """What the submitting thread bound in its context variables is bound in its job alone."""
    user = contextvars.ContextVar("user", default="nobody")
    user.set("ada")
    hers = bench.worker.submit("x", lambda _: user.get())
    empty = contextvars.Context().run(lambda: bench.worker.submit("x", lambda _: user.get()))
    assert (hers.result(), empty.result()) == ("ada", "nobody")


# Order --------------------------------------------------------------------------------------------


def test_equal_jobs_run_as_submitted(bench: Bench) -> None:
    """Without priorities, the order of submission is the order of work."""
    bench.busy()
    jobs = [bench.named(str(number)) for number in range(20)]
    bench.gate.set()
    jobs[-1].result(PATIENCE)
    assert bench.order == [str(number) for number in range(20)]


def test_higher_priorities_run_first(bench: Bench) -> None:
    """A higher priority overtakes lower ones; the equal ones keep their order."""
    bench.busy()
    jobs = [
        bench.named(f"{priority}{letter}", priority=priority)
        for letter in "ab"
        for priority in (0, 2, 1)
    ]
    assert [job.position for job in jobs] == [5, 1, 3, 6, 2, 4]
    bench.gate.set()
    jobs[3].result(PATIENCE)
    assert bench.order == ["2a", "2b", "1a", "1b", "0a", "0b"]


@pytest.mark.parametrize("order", ["fair", "fewest_recompiles"])
def test_nothing_passes_a_change(benches: Callable[..., Bench], order: str) -> None:
    """A change to the engine comes after all queued before it, and before the later ones."""
    bench = benches(order=order)
    bench.busy()
    bench.named("before", recompiles=lambda: True)
    with ThreadPoolExecutor(1) as pool:
        change = pool.submit(
            bench.worker.call, "configure", lambda _: bench.order.append("configure")
        )
        while not any(job.kind == "configure" for job in bench.worker._waiting):
            assert not change.done()
        after = bench.named("after", priority=9, recompiles=lambda: False)
        bench.gate.set()
        change.result(PATIENCE)
        after.result(PATIENCE)
    assert bench.order == ["before", "configure", "after"]


def test_only_the_host_lets_requests_overtake(benches: Callable[..., Bench]) -> None:
    """Under "fewest_recompiles" the requests that need no recompile go ahead, under "fair" none."""
    orders = {}
    for order in ("fair", "fewest_recompiles"):
        bench = benches(order=order)
        bench.busy()
        bench.named("slow", recompiles=lambda: True)
        bench.named("quick", recompiles=lambda: False)
        bench.named("urgent", recompiles=lambda: True, priority=1)
        bench.gate.set()
        bench.worker.call("last", lambda _: None)
        orders[order] = bench.order
    assert orders["fair"] == ["urgent", "slow", "quick"]
    assert orders["fewest_recompiles"] == ["urgent", "quick", "slow"]


def test_nobody_starves(benches: Callable[..., Bench]) -> None:
    """A request that needs a recompile is overtaken a bounded number of times."""
    bench = benches(order="fewest_recompiles")
    bench.busy()
    bench.named("slow", recompiles=lambda: True)
    for number in range(3 * MAX_OVERTAKEN):
        bench.named(str(number), recompiles=lambda: False)
    bench.gate.set()
    bench.worker.call("last", lambda _: None)
    assert bench.order.index("slow") == MAX_OVERTAKEN


def test_a_request_that_cannot_be_planned_fails_by_itself(benches: Callable[..., Bench]) -> None:
    """An error while the order is chosen harms no other job."""
    bench = benches(order="fewest_recompiles")

    def refuse(*_: object) -> Any:
        msg = "no such LoRA"
        raise InvalidRequest(msg)

    bench.busy()
    bad = bench.worker.submit("bad", refuse, recompiles=refuse)
    good = bench.named("good", recompiles=lambda: True)
    bench.gate.set()
    assert isinstance(bad.exception(PATIENCE), InvalidRequest)
    assert good.exception(PATIENCE) is None


def test_a_full_queue_says_how_long_it_is(benches: Callable[..., Bench]) -> None:
    """A request too many is refused with the queue's length; changes are always taken."""
    bench = benches(queue_limit=2)
    bench.busy()
    waiting = [bench.named("a"), bench.named("b")]
    with pytest.raises(QueueFull, match=r"2 jobs wait and the limit is 2"):
        bench.named("c")
    with ThreadPoolExecutor(1) as pool:
        change = pool.submit(bench.worker.call, "unload", lambda _: "unloaded")
        while len(bench.worker._waiting) < 3:
            assert not change.done()
        assert waiting[0].cancel()
        bench.gate.set()
        assert change.result(PATIENCE) == "unloaded"
    bench.named("c").result(PATIENCE)


def test_the_queueing_is_logged_before_the_work(bench: Bench) -> None:
    """request.queued tells how many are ahead, and precedes all that its job logs."""
    for number in range(50):
        request_id = f"request-{number}"
        bench.worker.submit(
            "x",
            lambda job: bench.emit("memory.sampled", rss_bytes=0, held_bytes=0, of=job.request_id),
            request_id=request_id,
        )
    bench.worker.call("last", lambda _: None)
    seen: set[str] = set()
    for record in bench.events("request.queued", "memory.sampled"):
        if record["event"] == "request.queued":
            assert record["ahead"] >= 0
            seen.add(record["request_id"])
        else:
            assert record["of"] in seen
    assert len(seen) == 50


# Closing ------------------------------------------------------------------------------------------


def test_closing_lets_the_running_job_end(bench: Bench) -> None:
    """close() waits for the running job, cancels those that wait, and refuses new ones."""
    running, waiting = bench.busy(), bench.named("waiting")
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(bench.worker.close)
        assert isinstance(waiting.exception(PATIENCE), Cancelled)
        with pytest.raises(EngineClosed, match="open another engine"):
            bench.named("late")
        assert not closing.done()
        bench.gate.set()
        assert closing.result(PATIENCE)
    assert running.status == "done"
    assert "the engine was closed" in str(waiting.exception())


def test_closing_without_waiting_cancels(bench: Bench) -> None:
    """With no time to wait the running job is asked to stop; a later close waits for the end."""
    job = bench.worker.submit("x", until_stopped)
    bench.worker.close(cancel=True, timeout=0)
    assert bench.worker.close(timeout=PATIENCE)
    assert isinstance(job.exception(0), Cancelled)


def test_closing_gives_up_in_time(bench: Bench) -> None:
    """close(timeout) returns False in time, having asked a job that goes on to stop."""
    job = bench.busy()
    assert not bench.worker.close(timeout=0.05)
    assert job.status == "cancelling"
    assert not bench.worker.close(timeout=0)
    bench.gate.set()
    assert bench.worker.close(timeout=PATIENCE)


def test_closing_leaves_no_thread(bench: Bench) -> None:
    """When close has returned True, the worker's thread is gone; closing again is nothing."""
    before = threading.active_count()
    bench.named("x").result(PATIENCE)
    assert threading.active_count() == before + 1
    assert bench.worker.close()
    assert bench.worker.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("used", [False, True])
def test_the_release_is_done_once_and_last(bench: Bench, *, used: bool) -> None:
    """It runs after the last job, in the thread that did the jobs if there is one."""
    done: list[int] = []
    worker = threading.get_ident()
    if used:
        worker = bench.worker.submit("x", lambda _: threading.get_ident()).result(PATIENCE)

    def release() -> bool:
        done.append(threading.get_ident())
        return True

    for _ in range(3):
        assert bench.worker.close(release=release)
    assert done == [worker]


def test_a_job_may_close_its_own_engine(bench: Bench) -> None:
    """Closing inside a job asks it to stop where asked for, and does not wait for itself."""

    def work(job: Job[None]) -> None:
        assert not bench.worker.close(cancel=True, timeout=0)
        job.checkpoint("after")

    job = bench.worker.submit("x", work)
    assert isinstance(job.exception(PATIENCE), Cancelled)
    assert bench.worker.close(timeout=PATIENCE)


@pytest.mark.parametrize("jobs", ["", "submit", "wait"])
def test_the_interpreter_exits_although_nobody_closed(jobs: str) -> None:
    """Exit cancels a running job and ends, quietly; a thread that waits for the job hears of it."""
    ran = python(f"""
        import atexit
        told = threading.Event()
        def wait():
            print(type(job.exception()).__name__, type(late.exception()).__name__, flush=True)
            told.set()
        if {jobs!r} == "wait":
            atexit.register(told.wait)  # before the worker's own, so that it is called after it
        if {jobs!r}:
            job = worker.submit("x", forever)
            late = worker.submit("y", forever)
            runs.wait()
        if {jobs!r} == "wait":
            threading.Thread(target=wait, daemon=True).start()
        """)
    said = "Cancelled Cancelled\n" if jobs == "wait" else ""
    assert (ran.stdout, ran.stderr, ran.returncode) == (said, "", 0)


def test_a_fork_is_refused() -> None:
    """In a forked process every call says what to do, and none hangs; the parent goes on."""
    ran = python("""
        from holdfast.engine.errors import HoldfastError
        job = worker.submit("x", forever)
        runs.wait()
        child = os.fork()
        if child == 0:
            other = Worker("other", Emitter("other"), Lifecycle(), queue_limit=9, order="fair")
            for call in (
                lambda: worker.submit("x", forever), lambda: worker.call("x", forever), job.result,
                lambda: other.submit("x", forever),
            ):
                try:
                    call()
                except HoldfastError as error:
                    assert "forked off process" in str(error) and "'spawn'" in str(error)
                else:
                    os._exit(1)
            os._exit(0 if worker.close() is False else 2)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), job.cancel(), worker.close())
        """)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("0 True True\n", "", 0)


def test_forking_before_the_first_job_is_fine() -> None:
    """A server may import and fork first, and open an engine in each of its processes."""
    ran = python("""
        child = os.fork()
        if child == 0:
            own = Worker("own", Emitter("own"), Lifecycle(), queue_limit=9, order="fair")
            os._exit(0 if own.submit("x", lambda job: 5).result() == 5 and own.close() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("0\n", "", 0)


def test_a_spawned_process_has_engines_of_its_own(tmp_path: Path) -> None:
    """Beside an engine that is open, a process that is spawned and not forked opens another."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import multiprocessing
        from holdfast.engine.logbook.events import Emitter
        from holdfast.engine.jobs.worker import Worker
        from holdfast.states import Lifecycle

        def use(answer):
            worker = Worker("test", Emitter("test"), Lifecycle(), queue_limit=9, order="fair")
            done = worker.submit("x", lambda job: answer).result()
            return done, worker

        def serve(answer, results):
            done, worker = use(answer)
            results.put((done, worker.close()))

        if __name__ == "__main__":
            _, worker = use(4)
            spawning = multiprocessing.get_context("spawn")
            results = spawning.SimpleQueue()
            child = spawning.Process(target=serve, args=(5, results))
            child.start()
            print(results.get(), worker.close())
            child.join()
        """)
    )
    ran = subprocess.run(  # noqa: S603 - the program above
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("(5, True) True\n", "", 0)


# Faults in the thread itself ----------------------------------------------------------------------

EXITS = [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, MemoryError]


@pytest.mark.parametrize("kind", EXITS)
def test_no_callback_ends_the_thread(bench: Bench, kind: type[BaseException]) -> None:
    """Whatever a done-callback raises is logged; the job is done, and the next one runs."""

    def leave(_: Job[Any]) -> None:
        raise kind

    bench.busy().add_done_callback(leave)
    bench.gate.set()
    assert bench.named("next").result(PATIENCE) is None
    (told,) = bench.events("subscriber.failed")
    assert kind.__name__ in told["error"]


@pytest.mark.parametrize("kind", EXITS)
def test_no_work_ends_the_thread(bench: Bench, kind: type[BaseException]) -> None:
    """Whatever the work raises belongs to who waits for it, and the next job runs."""

    def leave(_: Job[Any]) -> None:
        raise kind

    job = bench.worker.submit("x", leave)
    assert type(job.exception(PATIENCE)) is kind
    assert bench.named("next").result(PATIENCE) is None


@pytest.mark.parametrize("name", ["_take", "_turn", "_wait", "_rest"])
@pytest.mark.parametrize("kind", [MemoryError, SystemExit])
def test_an_error_in_a_turn_is_survived(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[BaseException]
) -> None:
    """An error of the loop itself is logged, and every job is done all the same."""
    sleeper = Sleeper()
    bench.worker.idle(sleeper.seconds, sleeper.rest)
    bench.named("before").result(PATIENCE)
    function, left = getattr(bench.worker, name), [kind(), kind()]

    def fail() -> Any:
        if left:
            raise left.pop()
        return function()

    monkeypatch.setattr(bench.worker, name, fail)
    assert [bench.named(str(n)).result(PATIENCE) for n in range(5)] == [None] * 5
    until = time.monotonic() + PATIENCE
    while not sleeper.rested.wait(0.05):
        assert time.monotonic() < until
        bench.named("again").result(PATIENCE)
    assert not left
    assert kind.__name__ in bench.events("worker.failed")[0]["error"]


@pytest.mark.parametrize("name", ["end", "break_off"])
def test_an_error_while_a_job_ends_leaves_nobody_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Where the ending itself is broken into, what was done is still done and told."""
    job = bench.busy()
    function, left = getattr(job, name), [MemoryError()]

    def fail(*facts: Any) -> None:
        if left:
            raise left.pop()
        function(*facts)

    monkeypatch.setattr(job, name, fail)
    bench.gate.set()
    assert job.result(PATIENCE) is None
    assert job.status == "done"
    assert bench.named("next").result(PATIENCE) is None


def test_exceptions_set_into_the_thread_never_leave_anybody_waiting(bench: Bench) -> None:
    """
    Two hundred exceptions at random points of the thread: every job ends, the good and the broken.

    Each job is done, or fails with what was set into the thread or with what it was broken off by.
    """
    stop = threading.Event()

    def disturb() -> None:
        for _ in range(200):
            raise_in(bench.worker._thread, SystemExit)
            if stop.wait(0.002):
                return

    bench.named("first").result(PATIENCE)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    jobs: list[Job[Any]] = []
    while disturber.is_alive():
        jobs.append(bench.worker.submit("x", lambda _: sum(range(2000))))
        error = jobs[-1].exception(PATIENCE)
        assert error is None or isinstance(error, (SystemExit, HoldfastError)), error
    stop.set()
    disturber.join()
    assert len(jobs) > 10
    assert bench.named("last").exception(PATIENCE) is None or bench.named("last").result(1) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("begun", [False, True])
def test_a_thread_that_was_ended_has_a_successor(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, begun: bool
) -> None:
    """A job that a dead thread had begun fails, and those that it had not begun are done."""
    bench.busy()
    thread = bench.worker._thread
    assert thread is not None
    job, after = bench.named("job"), bench.named("after")

    def die() -> None:
        if begun:
            job._status = "running"
        raise SystemExit

    def give_up(error: BaseException) -> None:
        raise error

    monkeypatch.setattr(job, "run", die)
    monkeypatch.setattr(bench.worker, "_survive", give_up)
    bench.gate.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    monkeypatch.undo()
    assert after.result(PATIENCE) is None
    error = job.exception(PATIENCE)
    assert (error is not None) == begun
    assert error is None or "broken off" in str(error)
    assert bench.worker._thread is not thread


def test_a_thread_that_cannot_be_started_is_told_of(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no thread left, nothing is queued; once it has, the next call works."""

    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HoldfastError, match=r"could not be started .* Nothing was queued"):
            bench.named("a")
    assert bench.named("b").result(PATIENCE) is None
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HoldfastError, match="was to have a deadline"):
            bench.named("c", deadline=9.0)
    bench.worker.call("last", lambda _: None)
    assert bench.order == ["b"]


def test_no_time_is_too_long(bench: Bench) -> None:
    """Times beyond what the system can wait at once mean as long as it can."""
    sleeper = Sleeper(1e10)
    bench.worker.idle(sleeper.seconds, sleeper.rest)
    job = bench.named("a", deadline=1e300)
    assert job.result(1e300) is None
    assert bench.named("b").exception(float("inf")) is None
    assert not bench.events("worker.failed")
    assert bench.worker.close(timeout=1e300)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        *(({"priority": value}, "priority") for value in (1.5, "high", None, True, math.nan)),
        *(({"deadline": value}, "deadline") for value in (0, -1.0, math.nan, "soon", True)),
    ],
)
def test_a_wrong_order_is_refused_before_it_is_queued(
    bench: Bench, wrong: dict[str, Any], said: str
) -> None:
    """A priority that is no whole number and a deadline that is no time ahead queue nothing."""
    bench.busy()
    with pytest.raises(InvalidRequest, match=f"{said}.*not queued"):
        bench.named("x", **wrong)
    assert not bench.worker._waiting


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", [OSError, SystemExit])
def test_a_release_that_fails_is_told_of_and_done_again(
    bench: Bench, kind: type[BaseException], *, used: bool
) -> None:
    """close() says False where not all was given back, never hangs, and the next tries again."""
    if used:
        bench.named("x").result(PATIENCE)
    fates: list[bool | BaseException] = [True, False, False, kind("locked")]

    def release() -> bool:
        fate = fates.pop()
        if isinstance(fate, BaseException):
            raise fate
        return fate

    ends = []
    for _ in range(4):
        try:
            ends.append(bench.worker.close(timeout=PATIENCE, release=release))
        except kind:
            ends.append(False)
    assert ends[-1]
    assert not ends[0]
    assert fates == []
    assert bench.worker.close()


# Resting ------------------------------------------------------------------------------------------


class Sleeper:
    def __init__(self, wait: float = 0.02) -> None:
        self.wait = wait
        self.rests: list[int] = []
        self.rested = threading.Event()

    def seconds(self) -> float:
        return self.wait

    def rest(self) -> None:
        self.rests.append(threading.get_ident())
        self.rested.set()
        raise ZeroDivisionError


def test_resting_happens_once_after_each_busy_time(bench: Bench) -> None:
    """An idle worker calls back in its own thread, once; again only after another job."""
    sleeper = Sleeper()
    bench.worker.idle(sleeper.seconds, sleeper.rest)
    for number in (1, 2):
        worker = bench.worker.submit("x", lambda _: threading.get_ident()).result(PATIENCE)
        assert sleeper.rested.wait(PATIENCE)
        sleeper.rested.clear()
        assert not sleeper.rested.wait(0.2)
        assert sleeper.rests == [worker] * number


def test_resting_keeps_nobody_alive(bench: Bench) -> None:
    """The callback's object is held weakly."""
    sleeper = Sleeper()
    gone = weakref.ref(sleeper)
    bench.worker.idle(sleeper.seconds, sleeper.rest)
    bench.named("x").result(PATIENCE)
    assert sleeper.rested.wait(PATIENCE)
    bench.named("y").result(PATIENCE)
    del sleeper
    gc.collect()
    assert gone() is None
