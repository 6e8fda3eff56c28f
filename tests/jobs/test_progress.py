from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.compiling.heartbeat import heartbeat
from holdfast.engine.jobs.progress import Course, Progress
from tests.support.workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from holdfast.engine.jobs.job import Job


# Progress -----------------------------------------------------------------------------------------

PHASES = ("prepare", "pass 1", "upscale", "pass 2", "decode")


@given(
    weights=st.lists(st.floats(0, 100), min_size=5, max_size=5),
    moves=st.lists(st.tuples(st.sampled_from((*PHASES, "unforeseen")), st.integers(0, 4))),
)
def test_progress_never_falls_and_never_exceeds(
    weights: list[float], moves: list[tuple[str, int]]
) -> None:
    """Whatever is expected and whatever comes, the fraction grows from 0 to 1, the end."""
    course = Course()
    course.expect(dict(zip(PHASES, weights, strict=True)))
    course.begin()
    fractions = [course.progress.fraction]
    for phase, step in moves:
        course.advance(phase, None, step or None, 4 if step else None)
        progress = course.progress
        fractions.append(progress.fraction)
        assert progress.phase == phase
        assert progress.remaining_seconds is None or progress.remaining_seconds >= 0
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] < 1
    course.finish()
    assert (course.progress.fraction, course.progress.remaining_seconds) == (1, 0)


@pytest.mark.parametrize(("seconds", "left"), [(20.0, 20.0), (68.0, 60.0)])
def test_progress_is_measured_in_expected_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, left: float
) -> None:
    """Half the expected seconds are half the way; a slower pace shows in what remains."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    course = Course()
    course.expect({"pass 1": 10.0, "pass 2": 30.0})
    course.begin()
    course.advance("pass 1", 1, 0, 5)
    now[0] = seconds
    course.advance("pass 2", 2, 1, 3)
    assert course.progress.fraction == pytest.approx(0.5)
    # The pace is (seconds + 4) / (20 + 4): a tenth of the whole is taken on trust.
    assert course.progress.remaining_seconds == pytest.approx(left)


def test_a_jobs_progress_can_be_watched(bench: Bench) -> None:
    """A waiting job stands at 0; a running one tells phase, pass, step and seconds to go."""
    at, go = threading.Event(), threading.Event()

    def work(job: Job[None]) -> None:
        job.expect({"prepare": 1.0, "pass 1": 3.0})
        job.advance("pass 1", pass_number=1, step=2, steps=4)
        at.set()
        assert go.wait(PATIENCE)

    bench.busy()
    job = bench.worker.submit("x", work)
    assert job.progress == Progress(0.0, "queued")
    assert job.position == 1
    bench.gate.set()
    assert at.wait(PATIENCE)
    progress = job.progress
    assert (progress.phase, progress.pass_number, progress.step, progress.steps) == (
        "pass 1", 1, 2, 4,
    )  # fmt: skip
    assert 0.6 < progress.fraction < 1
    assert progress.remaining_seconds is not None
    assert job.position is None
    go.set()
    job.result(PATIENCE)
    assert job.progress.fraction == 1


# Signs of life ------------------------------------------------------------------------------------


def test_a_long_compile_gives_signs_of_life(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it lasts, a heartbeat tells component, seconds and memory, in its request's scope."""
    monkeypatch.setattr("holdfast.engine.compiling.heartbeat.INTERVAL", 0.01)
    with (
        bench.emit.scope(request_id="r1"),
        heartbeat(bench.emit, component="unet", key="k", expected_seconds=100.0),
    ):
        while len(bench.events("compile.heartbeat")) < 3:
            pass
    beats = bench.events("compile.heartbeat")
    assert all(beat["request_id"] == "r1" and beat["component"] == "unet" for beat in beats)
    assert all(beat["rss_bytes"] > 1 << 20 and beat["expected_seconds"] == 100 for beat in beats)
    seconds = [beat["elapsed_seconds"] for beat in beats]
    assert all(earlier < later for earlier, later in itertools.pairwise(seconds))
    assert not bench.events("compile.slow")
    assert not [each for each in threading.enumerate() if "heartbeat" in each.name]


def test_a_compile_far_over_its_time_is_called_slow_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog warns once, with the seconds expected; without any expectation it never does."""
    monkeypatch.setattr("holdfast.engine.compiling.heartbeat.INTERVAL", 0.01)
    monkeypatch.setattr("holdfast.engine.compiling.heartbeat.SLOW_MARGIN", 0.0)
    for expected in (0.001, None):
        bench.log.clear()
        with heartbeat(bench.emit, component="unet", key="k", expected_seconds=expected):
            while len(bench.events("compile.heartbeat")) < 5:
                pass
        slow = bench.events("compile.slow")
        assert [each["expected_seconds"] for each in slow] == (
            [] if expected is None else [expected]
        )
        assert all(each["level"] == "warning" for each in slow)


def test_a_quick_compile_gives_none(bench: Bench) -> None:
    """What takes less than a second says nothing, and its thread is gone."""
    with heartbeat(bench.emit, component="unet", key="k", expected_seconds=None):
        pass
    assert not bench.log
    assert not [each for each in threading.enumerate() if "heartbeat" in each.name]
