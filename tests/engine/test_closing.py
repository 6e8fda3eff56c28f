"""How an engine ends: rested, closed, forgotten, or left open at the interpreter's exit."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest

from holdfast.engine import Engine, Hires, Img2Img, Txt2Img
from holdfast.states import State
from tests.support.engines import live_components
from tests.support.workbench import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Open = Callable[..., Engine]

PROMPT = "a large red circle on a blue background"
TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=1)


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def forget(held: list[Engine]) -> None:
    held.clear()
    gc.collect()


def test_an_idle_engine_gives_its_memory_back(open_engine: Open) -> None:
    """After idle_unload seconds it is unloaded; the next request loads the mode that it needs."""
    before = live_components()
    engine = open_engine(idle_unload=0.05)
    image = engine.run(TXT2IMG).images[0]
    wait_for(lambda: engine.state is State.UNLOADED)
    assert live_components() == before
    second = engine.run(Img2Img(prompt=PROMPT, image=image, steps=1, seed=2))
    assert second.images[0].size == image.size
    wait_for(lambda: engine.state is State.UNLOADED)
    assert engine.run(TXT2IMG).images[0].tobytes() == image.tobytes()


def test_a_forgotten_engine_warns_and_cleans_up(tiny_ir: Path, tiny_cache: Path) -> None:
    """Collected unclosed, it gives a ResourceWarning, and its components and thread go."""
    before, threads = live_components(), set(threading.enumerate())
    held = [Engine(tiny_ir, cache_dir=tiny_cache)]
    held[0].run(TXT2IMG)
    gone = weakref.ref(held[0])
    with pytest.warns(ResourceWarning, match="was never closed"):
        forget(held)
    assert gone() is None
    wait_for(lambda: set(threading.enumerate()) <= threads)
    assert live_components() == before


def test_closing_stops_a_run_where_asked(open_engine: Open) -> None:
    """close(cancel=True) stops the run and waits for that; close() lets a run end."""
    whole, stopped = open_engine(), open_engine()
    long = Hires(prompt=PROMPT, width=64, height=64, steps=500, scale=2, seed=3)
    job = stopped.submit(long)
    wait_for(lambda: job.status == "running")
    assert stopped.close(cancel=True)
    assert job.status == "cancelled"
    assert stopped.state is State.UNLOADED
    job = whole.submit(TXT2IMG)
    wait_for(lambda: job.status != "queued")
    assert whole.close()
    assert job.status == "done"


def test_the_interpreter_ends_amid_a_run(tiny_ir: Path, tiny_cache: Path) -> None:
    """A program that forgets its engine ends in the middle of a run, and says nothing."""
    program = textwrap.dedent(f"""
        import time
        from holdfast.engine import Engine, Txt2Img
        engine = Engine({str(tiny_ir)!r}, cache_dir={str(tiny_cache)!r})
        job = engine.submit(Txt2Img(prompt="red", width=64, height=64, steps=900, seed=1))
        while job.progress.pass_number is None and not job.done():
            time.sleep(0.01)
        print(engine.activity)
    """)
    ran = subprocess.run(  # noqa: S603 - our own interpreter, on the program above
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("running\n", "", 0)
