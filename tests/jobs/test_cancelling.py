from __future__ import annotations

import gc
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine.errors import (
    Cancelled,
    GenerationError,
    InvalidRequest,
)
from tests.support.workbench import PATIENCE, Bench, until_stopped

if TYPE_CHECKING:
    from holdfast.engine.jobs.job import Job


def test_a_waiting_job_is_cancelled_at_once(bench: Bench) -> None:
    """A queued job ends where it waits, while another runs, and is never begun."""
    busy = bench.busy()
    job = bench.named("never")
    assert job.cancel()
    assert job.status == "cancelled"
    assert job.position is None
    with pytest.raises(Cancelled) as told:
        job.result(timeout=0)
    assert told.value.phase == "queued"
    assert busy.status == "running"
    bench.gate.set()
    bench.worker.call("last", lambda _: None)
    assert bench.order == []


def test_a_running_job_stops_at_its_next_checkpoint(bench: Bench) -> None:
    """The error says who asked, when, during what, where it was noticed, and what was kept."""
    job = bench.worker.submit("hires", until_stopped)
    while job.status != "running":
        assert not job.done()
    assert job.cancel()
    error = job.exception(PATIENCE)
    assert isinstance(error, Cancelled)
    assert (error.phase, job.status) == ("work", "cancelled")
    assert error.seconds_to_stop >= 0
    assert re.match(
        r"hires was asked to stop at \d\d:\d\d:\d\d\.\d{6} UTC \(the holder asked for it\), during "
        r"'(work|queued)'; it was noticed [\d.]+ s later, at '(work|queued)'; kept: nothing\. ",
        str(error),
    )


def test_the_log_tells_the_request_to_stop_before_it_was_noticed(bench: Bench) -> None:
    """For every cancelled job there is one cancel.requested and then one cancel.observed."""
    for _ in range(50):
        job = bench.worker.submit("x", until_stopped)
        with ThreadPoolExecutor(4) as pool:
            assert any(pool.map(lambda _, job=job: job.cancel(), range(4)))
        assert isinstance(job.exception(PATIENCE), Cancelled)
    told: dict[str, list[str]] = {}
    for record in bench.events("cancel.requested", "cancel.observed"):
        told.setdefault(record["request_id"], []).append(record["event"])
    assert list(told.values()) == [["cancel.requested", "cancel.observed"]] * 50


def test_a_job_that_has_ended_cannot_be_cancelled(bench: Bench) -> None:
    """Cancel says that it came too late, and changes nothing."""
    job = bench.worker.submit("x", lambda _: 5)
    assert job.result(PATIENCE) == 5
    assert not job.cancel()
    assert (job.status, job.result()) == ("done", 5)
    assert not bench.events("cancel.requested")


def test_a_job_that_never_looks_ends_as_done(bench: Bench) -> None:
    """A request to stop that is never noticed is not reported as a cancel."""
    job = bench.busy()
    assert job.cancel()
    assert job.status == "cancelling"
    bench.gate.set()
    assert job.result(PATIENCE) is None
    assert job.status == "done"
    assert not bench.events("cancel.observed")


def test_a_failure_after_a_request_to_stop_stays_a_failure(bench: Bench) -> None:
    """An error that the request to stop did not cause is told as what it is."""
    asked = threading.Event()

    def fail(_: Job[None]) -> None:
        assert asked.wait(PATIENCE)
        msg = "out of memory"
        raise GenerationError(msg)

    job = bench.worker.submit("x", fail)
    while job.status != "running":
        assert not job.done()
    job.cancel()
    asked.set()
    assert isinstance(job.exception(PATIENCE), GenerationError)
    assert job.status == "failed"


class Native:
    """A native call that only an interrupt ends, and then with this error."""

    def __init__(self, error: Exception) -> None:
        self.inside = threading.Event()
        self.interrupted_by: list[int] = []
        self._error = error
        self._over = threading.Event()

    def interrupt(self) -> None:
        self.interrupted_by.append(threading.get_ident())
        self._over.set()

    def call(self) -> None:
        self.inside.set()
        assert self._over.wait(PATIENCE)
        raise self._error


@pytest.mark.parametrize("means_it", [True, False])
def test_a_native_call_is_broken_off_by_who_cancels(bench: Bench, *, means_it: bool) -> None:
    """Its error becomes the cancel that caused it; one of another cause stays a failure."""
    native = Native(RuntimeError("Infer Request was canceled"))

    def work(job: Job[None]) -> None:
        with job.interruptible("unet", native.interrupt, lambda _: means_it):
            native.call()

    job = bench.worker.submit("x", work)
    assert native.inside.wait(PATIENCE)
    assert job.cancel()
    error = job.exception(PATIENCE)
    assert native.interrupted_by == [threading.get_ident()]
    if means_it:
        assert isinstance(error, Cancelled)
        assert isinstance(error.__cause__, RuntimeError)
        assert (error.phase, job.status) == ("unet", "cancelled")
    else:
        assert isinstance(error, RuntimeError)
        assert job.status == "failed"


def test_a_native_call_that_fails_by_itself_is_no_cancel(bench: Bench) -> None:
    """Without a request to stop, an error inside an interruptible block is a failure."""

    def work(job: Job[None]) -> None:
        with job.interruptible("unet", lambda: None):
            msg = "out of memory"
            raise RuntimeError(msg)

    job = bench.worker.submit("x", work)
    assert isinstance(job.exception(PATIENCE), RuntimeError)
    assert job.status == "failed"


def test_no_cancel_reaches_past_the_block(bench: Bench) -> None:
    """A native call is interrupted while its own job is in it, and never afterwards."""
    left, asked = threading.Event(), threading.Event()
    native = Native(RuntimeError())

    def work(job: Job[None]) -> None:
        with job.interruptible("unet", native.interrupt):
            pass
        left.set()
        assert asked.wait(PATIENCE)

    job = bench.worker.submit("x", work)
    assert left.wait(PATIENCE)
    job.cancel()
    asked.set()
    assert job.exception(PATIENCE) is None
    assert native.interrupted_by == []


def test_a_block_is_not_entered_once_stopping_was_asked_for(bench: Bench) -> None:
    """Interruptible is a checkpoint too."""
    asked, entered = threading.Event(), []

    def work(job: Job[None]) -> None:
        assert asked.wait(PATIENCE)
        with job.interruptible("decode", lambda: None):
            entered.append(1)

    job = bench.worker.submit("x", work)
    while job.status != "running":
        assert not job.done()
    job.cancel()
    asked.set()
    error = job.exception(PATIENCE)
    assert isinstance(error, Cancelled)
    assert (error.phase, entered) == ("decode", [])


def test_an_inference_is_left_while_it_runs(bench: Bench) -> None:
    """Cancelling breaks off an OpenVINO inference; the next one on the same request is right."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as op

    parameter = op.parameter([900, 900], np.float32)
    product = parameter
    for _ in range(200):
        product = op.matmul(product, parameter, transpose_a=False, transpose_b=False)
    model = ov.Model([product], [parameter])
    request = ov.Core().compile_model(model, "CPU").create_infer_request()
    permutation = np.roll(np.eye(900, dtype=np.float32), 1, axis=0)
    begun = threading.Event()

    def infer(job: Job[Any]) -> Any:
        with job.interruptible("unet", request.cancel, lambda error: "canceled" in str(error)):
            request.start_async([permutation])
            begun.set()
            request.wait()
        return request.get_output_tensor().data.copy()

    stopped = bench.worker.submit("x", infer)
    assert begun.wait(PATIENCE)
    stopped.cancel()
    assert isinstance(stopped.exception(PATIENCE), Cancelled)
    found = bench.worker.submit("x", infer).result(PATIENCE)
    assert (found == np.roll(np.eye(900, dtype=np.float32), 201, axis=0)).all()


@pytest.mark.parametrize("keep", ["nothing", "first_pass"])
@pytest.mark.parametrize("composed", [False, True])
def test_the_first_pass_is_kept_where_asked_for(bench: Bench, *, keep: Any, composed: bool) -> None:
    """The error holds the first pass's images if they were there and were to be kept."""
    image, ready = Image.new("RGB", (8, 8), "red"), threading.Event()

    def work(job: Job[None]) -> None:
        if composed:
            job.keep_first_pass([image])
        ready.set()
        until_stopped(job)

    job = bench.worker.submit("x", work)
    assert ready.wait(PATIENCE)
    assert job.kept == ((image,) if composed else ())
    job.cancel(keep=keep)
    error = job.exception(PATIENCE)
    assert isinstance(error, Cancelled)
    kept = composed and keep == "first_pass"
    assert error.first_pass == ((image,) if kept else ())
    assert f"kept: {'first_pass' if kept else 'nothing'}." in str(error)
    assert bench.events("cancel.observed")[0]["kept"] == ("first_pass" if kept else "nothing")


def test_the_first_request_to_stop_decides(bench: Bench) -> None:
    """Cancelling twice asks once; what the first one wanted to keep is kept."""
    image, ready, asked = Image.new("RGB", (8, 8)), threading.Event(), threading.Event()

    def work(job: Job[None]) -> None:
        job.keep_first_pass([image])
        ready.set()
        assert asked.wait(PATIENCE)
        job.checkpoint("step")

    job = bench.worker.submit("x", work)
    assert ready.wait(PATIENCE)
    assert job.cancel(keep="first_pass")
    assert job.cancel()
    asked.set()
    error = job.exception(PATIENCE)
    assert isinstance(error, Cancelled)
    assert error.first_pass == (image,)
    assert len(bench.events("cancel.requested")) == 1


def test_only_the_holder_can_find_a_job(bench: Bench) -> None:
    """A job is found by its id alone, which the log does not tell; no other name finds it."""
    bench.busy()
    mine, other = bench.named("mine"), bench.named("other")
    assert bench.worker.job(mine.id) is mine
    assert len({mine.id, other.id, mine.request_id, other.request_id}) == 4
    assert len(mine.id) >= 20
    for name in (mine.request_id, "", mine.id[:-1]):
        with pytest.raises(InvalidRequest, match="no job has the id"):
            bench.worker.job(name)
    assert mine.id not in str(bench.log)
    bench.worker.job(mine.id).cancel()
    assert (mine.status, other.status) == ("cancelled", "queued")


def test_a_forgotten_job_is_found_until_it_ends(bench: Bench) -> None:
    """An id is enough while the job waits or runs; afterwards somebody must hold the job."""
    bench.busy()
    job_id = bench.named("x").id
    assert bench.worker.job(job_id).status == "queued"
    bench.gate.set()
    bench.worker.call("last", lambda _: None)
    gc.collect()
    with pytest.raises(InvalidRequest):
        bench.worker.job(job_id)


# Deadlines ----------------------------------------------------------------------------------------


def test_a_deadline_stops_a_running_job(bench: Bench) -> None:
    """The error says that it was the deadline."""
    job = bench.worker.submit("x", until_stopped, deadline=0.05)
    with pytest.raises(Cancelled, match=r"its deadline of 0\.05 s passed"):
        job.result(PATIENCE)


def test_a_deadline_counts_the_waiting(bench: Bench) -> None:
    """A job whose deadline passes in the queue ends there, while another one runs."""
    busy = bench.busy()
    job = bench.worker.submit("x", lambda _: 5, deadline=0.05)
    error = job.exception(PATIENCE)
    assert isinstance(error, Cancelled)
    assert error.phase == "queued"
    assert busy.status == "running"


def test_a_deadline_that_is_kept_leaves_nothing(bench: Bench) -> None:
    """A job that ends in time ends as done, and no thread waits for its deadline."""
    job = bench.worker.submit("x", lambda _: 5, deadline=3600)
    assert job.result(PATIENCE) == 5
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    for timer in timers:
        timer.join(PATIENCE)
        assert not timer.is_alive()
