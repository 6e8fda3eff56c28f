from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.events import Emitter
from holdfast.engine.logbook.reading import log_lines, read
from holdfast.engine.logbook.recorder import FlightRecorder, crash_found
from tests.support.audited import assert_clean, events_of

if TYPE_CHECKING:
    from pathlib import Path

BEGIN = """
import ctypes, os, signal, sys
from holdfast.engine.logbook.events import Emitter
from holdfast.engine.logbook.recorder import FlightRecorder
emit = Emitter("doomed", (FlightRecorder(sys.argv[1], int(sys.argv[2])),))
emit("engine.opened")
request = emit.span("request", request_id="r1")
compile = emit.span("component.compile", component="unet", key="0123")
one = emit.span("pass", request_id="r1", **{"pass": 2}, steps=9000)
def steps(count):
    for step in range(1, count + 1):
        emit("step.completed", step=step, steps=9000, prompt="secret")
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
DEATHS = {
    "killed in a compile": (
        f"with request, compile: {KILLED}",
        "component.compile of unet",
    ),
    "a segmentation fault in a compile": (
        "with request, compile: ctypes.string_at(0)",
        "component.compile of unet",
    ),
    "killed in a pass": (
        f"with request, one: steps(3); {KILLED}",
        "pass 2 of request r1, after step 3 of 9000",
    ),
    "killed in a pass that fills the files many times over": (
        f"with request, one: steps(2000); {KILLED}",
        "pass 2 of request r1, after step 2000 of 9000",
    ),
}


def die(path: Path, how: str, limit: int = 20_000) -> None:
    ended = subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-c", BEGIN + how, str(path), str(limit)], check=False
    )
    assert ended.returncode < 0


@pytest.mark.parametrize(("how", "died_in"), DEATHS.values(), ids=DEATHS)
def test_next_start_is_told_what_the_process_died_in(
    how: str, died_in: str, tmp_path: Path
) -> None:
    """After the death of a process its recording tells what was under way, and for how long."""
    path = tmp_path / "flight"
    die(path, how)
    found = crash_found(path)
    assert found is not None
    assert found["died_in"] == died_in
    assert found["pid"] > 0
    assert 0 <= found["elapsed_seconds"] < 60


def test_crash_is_told_once(tmp_path: Path) -> None:
    """A crash is told to the first engine that starts after it, and to no later one."""
    path = tmp_path / "flight"
    die(path, DEATHS["killed in a compile"][0])
    assert crash_found(path) is not None
    recorder = FlightRecorder(path)
    Emitter("next", (recorder,))("engine.opened")
    recorder.close()
    assert crash_found(path) is None


@pytest.mark.parametrize("ending", [f"with request: pass\n{KILLED}", KILLED], ids=["used", "new"])
def test_death_of_an_idle_process_is_no_crash_in_a_call(ending: str, tmp_path: Path) -> None:
    """A process that is killed while nothing is under way did not die in anything."""
    path = tmp_path / "flight"
    die(path, ending)
    assert crash_found(path) is None


def test_call_of_a_process_that_is_alive_is_no_crash(tmp_path: Path) -> None:
    """What is under way in a living process is not told as a crash."""
    path = tmp_path / "flight"
    recorder = FlightRecorder(path)
    emit = Emitter("alive", (recorder,))
    with emit.span("component.compile", component="unet", key="0"):
        assert crash_found(path) is None
    recorder.close()


def test_without_a_recording_there_was_no_crash(tmp_path: Path) -> None:
    """Where there is no recording, or an empty or foreign one, no crash is found."""
    assert crash_found(tmp_path / "none") is None
    (tmp_path / "foreign").write_bytes(b"\x00\xff not a recording\n{}\n")
    assert crash_found(tmp_path / "foreign") is None


def test_recording_stays_within_its_bound_and_holds_no_prompt(tmp_path: Path) -> None:
    """However long an engine runs, both files stay within the bound, and no prompt is in them."""
    path = tmp_path / "flight"
    recorder = FlightRecorder(path, 20_000)
    emit = Emitter("long", (recorder,))
    largest = 0
    with emit.span("request", request_id="r1"):
        for step in range(1000):
            emit("step.completed", step=step, steps=1000, prompt="secret", error="secret")
            largest = max(largest, sum(each.stat().st_size for each in tmp_path.iterdir()))
    recorder.close()
    assert largest <= 20_000
    assert not any(b"secret" in each.read_bytes() for each in tmp_path.iterdir())


def test_recording_is_a_log_of_its_own(hires_log: Path, tmp_path: Path) -> None:
    """The recording of a whole run stands the audit as the log of the run does."""
    recorder = FlightRecorder(tmp_path / "flight")
    for event in events_of(hires_log):
        recorder(event)
    recorder.close()
    assert_clean(tmp_path / "flight")


def test_recording_that_lost_its_beginning_breaks_no_rule(hires_log: Path, tmp_path: Path) -> None:
    """What both files still hold is told as incomplete, and nothing in it as broken."""
    recorder = FlightRecorder(tmp_path / "flight", 20_000)
    for event in events_of(hires_log):
        recorder(event)
    recorder.close()
    files = [tmp_path / "flight.1", tmp_path / "flight"]
    verdict = audit(read(each for file in files for each in log_lines(file)))
    assert verdict.clean, verdict.engines
    (engine,) = verdict.engines
    assert len(engine.missing) == 1
    assert engine.missing[0].startswith("it begins with seq ")
    assert verdict.problem_counts.keys() <= {"foreign"}
