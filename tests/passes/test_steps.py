"""Steps as hosts are told of them, whatever a scheduler does in one."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Finished, Hires, Lora, Preview, Progressed, Txt2Img
from tests.support.engines import record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine


def test_steps_never_fall_and_end_at_the_last(open_engine: Callable[..., Engine]) -> None:
    """Heun and PNDM evaluate more often than they step: neither progress nor previews show it."""
    engine = open_engine()
    request = Txt2Img(prompt="red", width=64, height=64, steps=4, batch=2, seed=3)
    for scheduler in ("heun", "pndm", "euler"):
        heard: queue.Queue[Any] = queue.Queue()
        stop = engine.subscribe(heard.put, (Progressed, Preview, Finished))
        engine.run(request.but(scheduler=scheduler))
        events: list[Any] = []
        while not events or not isinstance(events[-1], Finished):
            events.append(heard.get(timeout=60))
        stop()
        told = [each.progress for each in events if isinstance(each, Progressed)]
        steps = [each.step for each in told if each.step is not None]
        assert steps == sorted(steps)
        assert steps[-1] == 8
        assert {each.steps for each in told if each.step is not None} == {8}
        previews = [each.step for each in events if isinstance(each, Preview)]
        assert previews == sorted(set(previews))
        assert previews[-1] == 8


@pytest.mark.parametrize(
    "scheduler", ["lcm", "euler sgm uniform", "tcd", "ddim sgm uniform", "euler-a sgm uniform"]
)
def test_few_steps_are_as_many_evaluations(
    open_engine: Callable[..., Engine], ink: Path, scheduler: str
) -> None:
    """With the schedulers of LoRAs for few steps, 4 and 4 steps are 8 evaluations of one prompt."""
    engine = open_engine(lora=(Lora(ink),), shapes="static")
    log = record(engine)
    result = engine.run(Hires(
        prompt="red", width=64, height=64, scale=1.5, steps=4, hires_steps=4, strength=0.5,
        guidance=1.0, scheduler=scheduler, seed=3,
    ))  # fmt: skip
    assert [str(each) for each in result.evaluations] == ["4 whole", "4 whole"]
    shapes = {
        each["shape"]
        for each in log.events("component.compile.completed")
        if each["component"] == "unet"
    }
    assert shapes == {"1x4x8x8", "1x4x12x12"}
