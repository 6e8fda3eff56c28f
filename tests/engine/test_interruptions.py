from __future__ import annotations

import bisect
import datetime as dt
import json
import random
import threading
import time
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from filelock import FileLock

from holdfast.engine.engine import Engine
from holdfast.engine.errors import Cancelled
from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.reading import log_lines, read
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.txt2img import Txt2Img
from holdfast.states import State
from tests.support.guests import PATIENCE, Guest, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from holdfast.engine.requests.kinds import Request

PROMPT = "a large red circle on a blue background"
STEPS = 4
HIRES = Hires(prompt=PROMPT, width=64, height=64, steps=STEPS, scale=3.0, seed=7)
TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=8)


def assert_sound(log: Path, *, complete: bool = True) -> None:
    """Make sure that a log breaks no rule, and that it is all there."""
    verdict = audit(read(log_lines(log)))
    assert verdict.clean, verdict.engines[0].breaches
    assert verdict.complete or not complete, verdict.engines[0].missing


class At:
    """A sink that acts, in the engine's thread, at the n-th event of a kind."""

    def __init__(self, event: str, number: int, act: Callable[[], object]) -> None:
        self._event = event
        self._left = number
        self._act = act

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["event"] == self._event:
            self._left -= 1
            if self._left == 0:
                self._act()


def stopped_at(
    engine: Engine, request: Request, event: str, number: int = 1, keep: Any = "nothing"
) -> Cancelled:
    """Run a request, stop it at the n-th event of a kind, and return what its holder is told."""

    def stop() -> None:
        job = engine._worker.running
        assert job is not None
        job.cancel(keep)

    engine._emit.add_sink(At(event, number, stop))
    with pytest.raises(Cancelled) as told:
        engine.run(request)
    return told.value


@pytest.fixture(scope="module")
def right(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Request, list[str]]:
    """What an undisturbed engine makes of each request."""
    with Engine(tiny_ir, cache_dir=tmp_path_factory.mktemp("right")) as engine:
        return {request: pixels(engine.run(request)) for request in (HIRES, TXT2IMG)}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "log.jsonl"
    yield path
    assert_sound(path)


PHASES = {
    "read": ("component.read.started", 1, State.UNLOADED),
    "compile": ("component.compile.started", 1, State.UNLOADED),
    "encode the prompt": ("view.created", 1, State.COMPILED_TXT2IMG),
    "first pass": ("step.completed", 1, State.COMPILED_TXT2IMG),
    "first decode": ("step.completed", STEPS, State.COMPILED_TXT2IMG),
    "upscale": ("decode.completed", 1, State.COMPILED_TXT2IMG),
    "compile for the second pass": ("upscale.completed", 1, State.COMPILED_TXT2IMG),
    "encode the image": ("view.created", 2, State.COMPILED_IMG2IMG),
    "second pass": ("step.completed", STEPS + 1, State.COMPILED_IMG2IMG),
    "last decode": ("step.completed", 2 * STEPS, State.COMPILED_IMG2IMG),
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_can_be_stopped(
    tiny_ir: Path, tmp_path: Path, log: Path, right: dict[Request, list[str]], phase: str
) -> None:
    """
    Stopped in any phase, a hires request leaves a true state, and the next one gives its image.

    The log tells of one cancel and of no failure.
    """
    event, number, state = PHASES[phase]
    with Engine(tiny_ir, cache_dir=tmp_path, log_file=log) as engine:
        told = stopped_at(engine, HIRES, event, number)
        assert engine.state is state
        assert told.state_after == state.value
        assert pixels(engine.run(HIRES)) == right[HIRES]
    names = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert names.count("cancel.requested") == names.count("cancel.observed") == 1
    assert names.count("request.cancelled") == names.count("request.completed") == 1
    assert not [name for name in names if name.endswith(".failed")]


def test_an_export_is_broken_off(
    tiny_sd: Path, tmp_path: Path, log: Path, right: dict[Request, list[str]]
) -> None:
    """
    Stopped while its model is exported, a job ends there and then, and the exporter with it.

    Nothing of the export is left; the next job exports again, and its image is right.
    """
    cache = tmp_path / "cache"
    others = set(psutil.Process().children())  # such as multiprocessing's tracker of resources
    with Engine(tiny_sd, cache_dir=cache, log_file=log) as engine:
        told = stopped_at(engine, HIRES, "export.progress")
        assert (told.phase, told.state_after) == ("export", "unloaded")
        assert not set(psutil.Process().children()) - others
        assert [each.suffix for each in (cache / "exports").iterdir()] == [".lock"]
        assert pixels(engine.run(HIRES)) == right[HIRES]
    names = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    exports = [name for name in names if name.startswith("export.") and "progress" not in name]
    assert exports == ["export.started", "export.cancelled", "export.started", "export.completed"]
    assert names.count("request.cancelled") == names.count("request.completed") == 1
    assert not [name for name in names if name.endswith(".failed")]


def test_nobody_waits_for_the_export_of_others_against_his_will(
    tiny_sd: Path, tiny_ir: Path, tmp_path: Path
) -> None:
    """A job that waits until another process has exported its model is stopped while it waits."""
    lock = tmp_path / "exports" / f"{tiny_ir.name}.lock"
    lock.parent.mkdir()
    with FileLock(lock), Engine(tiny_sd, cache_dir=tmp_path) as engine:
        job = engine.submit(HIRES)
        while job._phase != "wait for another process":
            assert not job.done()
            time.sleep(0.01)
        job.cancel()
        error = job.exception(PATIENCE)
        assert isinstance(error, Cancelled)
        assert error.phase == "wait for another process"


@pytest.mark.parametrize(("step", "kept"), [(STEPS - 1, False), (STEPS + 2, True)])
def test_the_first_pass_survives_the_second(
    tiny_ir: Path, log: Path, right: dict[Request, list[str]], *, step: int, kept: bool
) -> None:
    """Stopped in the second pass, a job that keeps the first gives its image, to the bit."""
    with Engine(tiny_ir, cache_dir=log.parent, log_file=log) as engine:
        told = stopped_at(engine, HIRES, "step.completed", step, "first_pass")
    images = [sha256(image.tobytes()).hexdigest() for image in told.first_pass]
    assert images == (right[HIRES][1:] if kept else [])


@pytest.mark.slow
def test_a_hires_run_stops_within_a_step_at_any_moment(
    tiny_ir: Path, tmp_path: Path, log: Path, right: dict[Request, list[str]]
) -> None:
    """
    Cancelled at 40 random moments, a hires run ends at most one more step before it stops.

    Each time the next image is right to the bit, the state is one that the log derives, and a job
    that was not stopped in time has its whole image.
    """
    lot = random.Random(6)  # noqa: S311 - the moments are to be the same each time
    stops: list[Cancelled] = []
    with Engine(tiny_ir, cache_dir=tmp_path, log_file=log) as engine:
        assert pixels(engine.run(HIRES)) == right[HIRES]
        steps = engine.run(HIRES).timings
        longest = max(steps["pass 1"], steps["pass 2"]) / STEPS
        for _ in range(40):
            reached = threading.Event()
            engine._emit.add_sink(At("step.completed", lot.randrange(1, 2 * STEPS), reached.set))
            job = engine.submit(HIRES)
            assert reached.wait(PATIENCE)
            time.sleep(lot.uniform(0, longest))
            job.cancel(keep=lot.choice(("nothing", "first_pass")))
            error = job.exception(PATIENCE)
            if error is None:
                assert pixels(job.result()) == right[HIRES]
            else:
                assert isinstance(error, Cancelled)
                assert error.state_after == engine.state.value
                stops.append(error)
            assert pixels(engine.run(TXT2IMG)) == right[TXT2IMG]
    assert len(stops) >= 30
    events = [json.loads(line) for line in log.read_text().splitlines()]
    names = [each["event"] for each in events]
    for number, event in enumerate(events):
        if event["event"] == "cancel.observed":
            asked = max(at for at in range(number) if names[at] == "cancel.requested")
            assert names[asked:number].count("step.completed") <= 1
    assert not [name for name in names if name.endswith(".failed")]


# Killed -------------------------------------------------------------------------------------------


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "times"),
    [
        ("tiny_ir", 7),
        ("tiny_sd", 1),
        pytest.param("tiny_ir", 60, marks=pytest.mark.sweep),
        pytest.param("tiny_sd", 10, marks=[pytest.mark.sweep, pytest.mark.timeout(1800)]),
    ],
)
def test_after_a_kill_the_next_process_starts_clean(
    guest: Guest,
    *,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    right: dict[Request, list[str]],
    source: str,
    times: int,
) -> None:
    """
    Killed at random moments of export, load, compile and run, nothing is left that does harm.

    The next process on the same cache makes the right image, with a log that is sound; the log of
    the killed one breaks no rule up to its end.
    """
    model = request.getfixturevalue(source)
    lot = random.Random(times)  # noqa: S311 - the moments are to be the same each time
    _, log = guest.begin(model, tmp_path / "whole", HIRES)
    assert guest.finish() == right[HIRES]
    moments = [
        dt.datetime.fromisoformat(json.loads(line)["timestamp"])
        for line in log.read_text().splitlines()
    ]
    killed = 0
    for number in range(times):
        cache = tmp_path / (f"cache-{number}" if source == "tiny_sd" else "cache")
        moment = moments[0] + lot.random() * (moments[-1] - moments[0])
        passed = bisect.bisect(moments, moment)
        child, log = guest.begin(model, cache, HIRES)
        while not log.exists() or log.read_bytes().count(b"\n") < passed:
            time.sleep(0.001)
        time.sleep((moment - moments[passed - 1]).total_seconds())
        killed += guest.kill(child)
        assert_sound(log, complete=False)
        _, log = guest.begin(model, cache, HIRES)
        assert guest.finish() == right[HIRES]
        assert_sound(log)
    assert killed > times // 2
