from __future__ import annotations

import bisect
import contextlib
import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.engine import Engine
from holdfast.engine.errors import Cancelled
from holdfast.engine.logbook.audit import audit
from holdfast.engine.logbook.read import log_lines, read
from holdfast.engine.requests import Hires, Txt2Img
from holdfast.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from holdfast.engine.requests import Request
    from holdfast.engine.result import Result

PROMPT = "a large red circle on a blue background"
STEPS = 4
HIRES = Hires(prompt=PROMPT, width=64, height=64, steps=STEPS, scale=3.0, seed=7)
TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=8)
PATIENCE = 600.0


def pixels(result: Result) -> list[str]:
    images = (*result.images, *result.first_pass)
    return [sha256(image.tobytes()).hexdigest() for image in images]


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
        job = engine._owner.running
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
    Cancelled at 40 random moments, a hires run stops within a step's time and 100 ms.

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
    taken = [json.loads(line) for line in log.read_text().splitlines()]
    longest = max(each["seconds"] for each in taken if each["event"] == "step.completed")
    assert max(stop.seconds_to_stop for stop in stops) <= longest + 0.1
    assert not [each for each in taken if each["event"].endswith(".failed")]


# Killed -------------------------------------------------------------------------------------------


class Guest:
    """The process of ``guest.py``, and what it says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, on our own script
            [sys.executable, str(Path(__file__).with_name("guest.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hear("ready")
        self.logs = 0

    def hear(self, word: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert word in line, line
        return json.loads(line)[word]

    def begin(self, model: Path, cache: Path) -> tuple[int, Path]:
        """Have a child begin its work; return its process and its log."""
        self.logs += 1
        log = self._folder / f"{self.logs}.jsonl"
        order = {
            "model": str(model),
            "cache": str(cache),
            "log": str(log),
            "request": HIRES.to_json(),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self.hear("begun"), log

    def finish(self) -> list[str]:
        """Let the child end its work; return the pixels that it made."""
        made: list[str] = self.hear("pixels")
        assert self.hear("ended") == 0
        return made

    def kill(self, child: int) -> bool:
        """End the child where it stands; return whether it had not ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert self._process.stdout is not None
        while "ended" not in (line := self._process.stdout.readline()):
            assert "pixels" in line
        code = json.loads(line)["ended"]
        assert code in (0, -signal.SIGKILL)
        return bool(code)

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "times"), [("tiny_ir", 26), ("tiny_sd", 4)])
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
    Killed at 30 random moments of export, load, compile and run, nothing is left that does harm.

    The next process on the same cache makes the right image, with a log that is sound; the log of
    the killed one breaks no rule up to its end.
    """
    model = request.getfixturevalue(source)
    lot = random.Random(times)  # noqa: S311 - the moments are to be the same each time
    _, log = guest.begin(model, tmp_path / "whole")
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
        child, log = guest.begin(model, cache)
        while not log.exists() or log.read_bytes().count(b"\n") < passed:
            time.sleep(0.001)
        time.sleep((moment - moments[passed - 1]).total_seconds())
        killed += guest.kill(child)
        assert_sound(log, complete=False)
        _, log = guest.begin(model, cache)
        assert guest.finish() == right[HIRES]
        assert_sound(log)
    assert killed > times // 2
