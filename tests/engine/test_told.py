"""Every error that a host can get has its event, whichever method it asked."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import (
    CompileError,
    EngineClosed,
    GenerationError,
    Hires,
    IllegalTransition,
    InvalidRequest,
    Lora,
    LoraError,
    ModelSourceError,
    QueueFull,
    Txt2Img,
)
from tests.support.engines import Record, compiler_of, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

SMALL = Txt2Img(prompt="a red circle", width=64, height=64, steps=1, seed=7)
HUGE = SMALL.but(width=8192, height=8192)


def fail_to_compile(engine: Engine) -> None:
    compiler_of(engine).core = None
    engine.recompile()


def fail_to_generate(engine: Engine) -> None:
    view = engine._service.pipeline.view_in_service()
    view.pipeline.unet.request = None
    engine.run(SMALL)


def overfill(engine: Engine) -> None:
    jobs = [engine.submit(SMALL.but(steps=900))]
    while jobs[0].progress.step is None:
        time.sleep(0.01)
    jobs.append(engine.submit(SMALL))
    try:
        engine.run(SMALL)
    finally:
        for job in jobs:
            job.cancel()


FAILURES: dict[str, tuple[Callable[[Engine], object], type[Exception], str]] = {
    "load twice": (lambda e: e.load(), IllegalTransition, "failed"),
    "load what is no mode": (lambda e: e.load("painting"), InvalidRequest, "refused"),
    "switch to the mode in service": (lambda e: e.switch("txt2img"), IllegalTransition, "failed"),
    "switch to what is no mode": (lambda e: e.switch("painting"), InvalidRequest, "refused"),
    "configure what is fixed": (lambda e: e.configure(order="fair"), InvalidRequest, "refused"),
    "configure out of range": (lambda e: e.configure(precision="f7"), InvalidRequest, "refused"),
    "plan what is no setting": (lambda e: e.plan(painting=1), InvalidRequest, "refused"),
    "plan what is no request": (lambda e: e.plan({}), InvalidRequest, "refused"),
    "prepare what is no request": (lambda e: e.prepare("x"), InvalidRequest, "refused"),
    "run what is no request": (lambda e: e.run(None), InvalidRequest, "refused"),
    "submit what is no request": (lambda e: e.submit(b"x"), InvalidRequest, "refused"),
    "configure a LoRA that is missing": (
        lambda e: e.configure(lora=(Lora("nobodys.safetensors"),)), LoraError, "failed",
    ),
    "configure a model that is missing": (
        lambda e: e.configure(model="/nowhere/at/all"), ModelSourceError, "failed",
    ),
    "configure too small a budget": (
        lambda e: e.configure(memory_budget="1MiB"), InvalidRequest, "failed",
    ),
    "plan too large an image": (lambda e: e.plan(HUGE), InvalidRequest, "failed"),
    "prepare too large an image": (lambda e: e.prepare(HUGE), InvalidRequest, "failed"),
    "run too large an image": (lambda e: e.run(HUGE), InvalidRequest, "failed"),
    "run with a LoRA that is missing": (
        lambda e: e.run(Hires(width=64, height=64, steps=1, hires_lora=(Lora("no.safetensors"),))),
        LoraError, "failed",
    ),
    "submit with a deadline in the past": (
        lambda e: e.submit(SMALL, deadline=-1), InvalidRequest, "refused",
    ),
    "a queue that is full": (overfill, QueueFull, "refused"),
    "a pass that fails": (fail_to_generate, GenerationError, "failed"),
    "a compile that fails": (fail_to_compile, CompileError, "failed"),
    "an engine that is closed": (lambda e: (e.close(), e.run(SMALL)), EngineClosed, "refused"),
}  # fmt: skip


def test_every_error_that_a_host_gets_is_told(open_engine: Callable[..., Engine]) -> None:
    """Each failure of each method is one job's event with the error's class and the state after."""
    engine = open_engine(queue_limit=1, memory_budget="200MiB")
    engine.run(SMALL)
    for name, (fail, kind, ending) in FAILURES.items():
        seen = record(engine)
        with pytest.raises(kind) as raised:
            fail(engine)
        assert raised.value.state_after == engine.state.value, name
        told = [event for event in seen.events(f"job.{ending}") if kind.__name__ in event["error"]]
        assert len(told) == 1, (name, seen.events())
        assert told[0]["state"] == engine.state.value, name
        assert told[0]["level"] == ("error" if ending == "failed" else "warning"), name


def test_recompile_names_the_job_that_caused_it(
    open_engine: Callable[..., Engine], ink: Path
) -> None:
    """All that is done for a job carries its name, also where the job is no request."""
    engine = open_engine()
    engine.load()
    seen = record(engine)
    engine.configure(lora=(Lora(ink),))
    moves: list[dict[str, Any]] = seen.events("state.changed", "component.compile.completed")
    (job,) = seen.events("job.started")
    assert {event["request_id"] for event in moves} == {job["request_id"]}
    assert job["asked"] == {"lora": [f"{ink.stem}@1"]}
    (changed,) = seen.events("settings.changed")
    assert changed["changes"] == {"lora": [[], [f"{ink.stem}@1"]]}


@pytest.mark.parametrize("seed", [1, 2])
def test_log_of_a_walk_with_cancels_in_the_queue_is_clean(
    open_engine: Callable[..., Engine], ink: Path, seed: int
) -> None:
    """However jobs that wait, run and change settings are stopped, the log stands the audit."""
    chance = random.Random(seed)  # noqa: S311 - a walk is no secret
    engine = open_engine()
    jobs = []
    for _ in range(25):
        what = chance.choice(["txt2img", "hires", "cancel", "cancel", "configure", "deadline"])
        if what == "configure":
            engine.configure(lora=chance.choice([(), (Lora(ink),)]))
        elif what == "cancel" and jobs:
            chance.choice(jobs).cancel()
        elif what == "hires":
            jobs.append(engine.submit(Hires(width=64, height=64, steps=2, seed=7)))
        else:
            deadline = chance.uniform(0.01, 0.5) if what == "deadline" else None
            jobs.append(engine.submit(SMALL.but(steps=3), deadline=deadline))
    for job in jobs:
        job.exception()
    assert engine.config.log_file is not None
    seen = {event["event"] for event in Record(engine.config.log_file, 0).events()}
    assert {"job.completed", "job.cancelled", "cancel.observed"} <= seen
