from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from holdfast.engine import Hires, InvalidRequest
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.schedulers import SCHEDULERS, make_scheduler, schedule_length

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

PROMPT = "a large red circle on a blue background"


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"flow-euler"}))
def test_a_schedule_may_be_as_long_as_is_said(tiny_ir: Path, name: str) -> None:
    """A schedule is made of the longest length, and refused where it is longer by one."""
    heavy()
    longest = SCHEDULERS[name].longest
    with quiet():
        scheduler = make_scheduler(tiny_ir, name)
        if longest is None:
            scheduler.set_timesteps(1500)
            return
        length = scheduler.config[longest[0]]
        scheduler.set_timesteps(length)
        with pytest.raises(ValueError, match=r"larger|smaller"):
            scheduler.set_timesteps(length + 1)


@pytest.mark.parametrize(("scheduler", "most"), [("ddim", 500), ("lcm", 25)])
def test_more_steps_than_a_scheduler_has_are_refused_beforehand(
    open_engine: Callable[..., Engine], scheduler: str, most: int
) -> None:
    """The refusal says how many there may be; no first pass is run for nothing."""
    engine = open_engine()
    asked = Hires(prompt=PROMPT, steps=1, strength=0.5, scheduler=scheduler)
    with pytest.raises(InvalidRequest, match=f"Ask for {most} at most") as told:
        engine.run(asked.but(hires_steps=most + 1))
    assert told.value.state_after == "unloaded"
    assert engine.plan(asked.but(hires_steps=most)).compiles
    assert schedule_length(most, 0.5) == 2 * most
