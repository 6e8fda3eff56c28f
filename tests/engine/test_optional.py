"""What is optional never costs what is done: measuring, learning, threads that help."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import InvalidRequest, Lora, Txt2Img
from holdfast.states import State
from tests.support.engines import PROMPT, pixels, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

REQUEST = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7)


def refuse(*_: object, **__: object) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_thread(*_: object) -> None:
    msg = "can't start new thread"
    raise RuntimeError(msg)


def test_an_image_that_is_made_is_given_whatever_the_disk_says(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what steps took cannot be kept, the image comes all the same; later it is kept."""
    engine = open_engine(precision="f32")
    image = pixels(engine.run(REQUEST))
    costs, log = engine._service._cache.costs, record(engine)
    with monkeypatch.context() as patch:
        patch.setattr(costs, "record", refuse)
        assert pixels(engine.run(REQUEST)) == image
    assert "Too many open files" in log.events("learning.failed")[0]["error"]
    log = record(engine)
    assert pixels(engine.run(REQUEST)) == image
    assert not log.events("learning.failed")


def test_memory_that_cannot_be_measured_stops_no_change(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, ink: Path
) -> None:
    """Without a file descriptor for it a recompile goes on, and the log does not know the bytes."""
    engine = open_engine(precision="f32")
    engine.run(REQUEST)
    log = record(engine)
    with monkeypatch.context() as patch:
        patch.setattr("psutil.Process", refuse)
        engine.configure(lora=(Lora(ink, 0.5),))
        engine.unload()
    assert engine.state is State.UNLOADED
    moves = log.events("state.changed")
    assert [move["rss_bytes"] for move in moves] == [None] * len(moves) != []


def test_threads_that_only_help_may_be_missing(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, ink: Path
) -> None:
    """A compile without a heartbeat and a load without a helper are done all the same."""
    engine = open_engine(precision="f32")
    with pytest.raises(InvalidRequest):
        engine.run(REQUEST.but(width=100))  # the engine's own thread is there from here on
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        engine.load()
        engine.configure(lora=(Lora(ink, 0.5),))
    assert engine.state is State.COMPILED_TXT2IMG


def test_a_clean_up_that_fails_does_not_fail_the_change(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, ink: Path
) -> None:
    """After a change is made nothing can fail it: settings, components and images are the new."""
    engine = open_engine(precision="f32")
    before = pixels(engine.run(REQUEST))
    pipeline, log = engine._service.pipeline, record(engine)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._resolver, "keep", refuse)
        engine.configure(lora=(Lora(ink, 0.9),))
    assert [lora.weight for lora in engine.config.lora] == [0.9]
    assert engine.snapshot().lora == ("ink@0.9",)
    assert pixels(engine.run(REQUEST)) != before
    assert "Too many open files" in log.events("cleanup.failed")[0]["error"]


def test_the_time_to_rest_can_be_changed(open_engine: Callable[..., Engine]) -> None:
    """configure(idle_unload=...) holds from that moment on, and so does None."""
    engine = open_engine(idle_unload=1e10)
    engine.run(REQUEST)
    engine.configure(idle_unload=0.05)
    for _ in range(3000):
        if engine.state is State.UNLOADED:
            break
        threading.Event().wait(0.01)
    assert engine.state is State.UNLOADED
    engine.configure(idle_unload=None)
    engine.load()
    threading.Event().wait(0.3)
    assert engine.state is State.COMPILED_TXT2IMG


@pytest.mark.parametrize("step", ["unload", "close"])
def test_closing_always_closes(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Where one step of the release fails, the others are done, and close() tells the truth."""
    engine = open_engine(precision="f32")
    engine.run(REQUEST)
    log, pipeline = record(engine), engine._service.pipeline
    function, left = getattr(pipeline, step), [OSError("locked"), SystemExit()]

    def fail(*facts: Any) -> None:
        if left:
            raise left.pop(0)
        function(*facts)

    monkeypatch.setattr(pipeline, step, fail)
    assert not engine.close()
    tries = ["engine", "engine"]  # the thread's own, and that of who closes, once it has ended
    assert [event["what"] for event in log.events("release.failed")] == tries
    assert len(log.events("engine.closed")) == 1
    assert engine.close()
    assert engine.close()
    assert engine.state is State.UNLOADED
    assert engine.snapshot().held == ()


def test_what_is_no_request_and_no_mode_is_refused_in_words(
    open_engine: Callable[..., Engine],
) -> None:
    """A host's slip is an InvalidRequest that says what there is; nothing was queued."""
    engine = open_engine()
    wrong: Any = {"prompt": PROMPT}
    with pytest.raises(InvalidRequest, match="dict was submitted, which is no request"):
        engine.submit(wrong)
    for ask in (engine.load, engine.switch):
        with pytest.raises(InvalidRequest, match="there are txt2img, img2img"):
            ask("txt3img")
    with pytest.raises(InvalidRequest, match="deadline"):
        engine.submit(REQUEST, deadline=0)
    with pytest.raises(InvalidRequest, match="priority"):
        engine.submit(REQUEST, priority=0.5)  # type: ignore[arg-type]
    assert engine.state is State.UNLOADED
