"""A forked child of a host leaves alone what its parent holds, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.audited import assert_clean, events_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a POSIX matter")

HOST = """
import os, sys, time, warnings
warnings.simplefilter("error")
from pathlib import Path
from holdfast.engine import Engine, HoldfastError, Txt2Img

engine = Engine(sys.argv[1], cache_dir=sys.argv[2],
                log_file=sys.argv[3], precision="f32")
held = Path(sys.argv[2], "held")
engine.subscribe(lambda _: None)
engine.run(Txt2Img(prompt="circle", width=64, height=64, steps=1))
job = engine.submit(Txt2Img(prompt="circle", width=64, height=64, steps=900))
while not job.progress.step and not job.done():
    time.sleep(0.01)
before = sorted(held.iterdir())
assert before

def use():
    told = [job.cancel(), engine.close()]
    for refused in (job.result, engine.unload, engine.recompile):
        try:
            refused()
        except HoldfastError as error:
            told.append("fork" in str(error))
    return told == [False, False, True, True, True]

def fork(leave):
    child = os.fork()
    if child == 0:
        leave()
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    return "hangs"

def drop_all():
    global engine, job
    del engine, job
    sys.exit(3)

print(fork(lambda: sys.exit(2 if use() else 1)), fork(drop_all))
job.cancel()
job.exception()
print(fork(drop_all))
assert sorted(held.iterdir()) == before
assert engine.close()
assert not list(held.iterdir())
"""


def test_a_forked_child_changes_nothing_and_ends(
    tiny_sd: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """
    Forked amid a job or after it, a child cannot cancel, close or use the engine; it ends by
    `sys.exit` without a word. The parent keeps its holds and its log, and closes whole.
    """
    log = tmp_path / "log.jsonl"
    done = subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-c", HOST, str(tiny_sd), str(tiny_cache), str(log)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 3\n3\n", "")
    assert_clean(log)
    events = events_of(log)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["event"] == "engine.closed"
