from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from holdfast.engine import Hires, InvalidRequest, Txt2Img
from holdfast.engine.imports import heavy
from holdfast.engine.requests.schedulers import (
    SAMPLERS,
    SCHEDULERS,
    SCHEDULES,
    check_scheduler,
    schedule_length,
    short_name,
    with_schedule,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.engine import Engine

PROMPT = "a large red circle on a blue background"


@pytest.mark.parametrize(("scheduler", "most"), [("ddim", 500), ("lcm", 25)])
def test_more_steps_than_a_scheduler_has_are_refused_beforehand(
    open_engine: Callable[..., Engine], scheduler: str, most: int
) -> None:
    """The refusal says how many there may be; no first pass is run for nothing."""
    engine = open_engine()
    asked = Hires(prompt=PROMPT, steps=1, strength=0.5, scheduler=scheduler)
    with pytest.raises(InvalidRequest, match=f"Ask for {most},") as told:
        engine.run(asked.but(hires_steps=most + 1))
    assert told.value.state_after == "unloaded"
    assert engine.plan(asked.but(hires_steps=most)).compiles
    assert schedule_length(most, 0.5) == 2 * most


@pytest.mark.parametrize("name", [*SAMPLERS, "dpm++2m-karras", "euler-beta", "dpm++2m-sde-lu"])
def test_a_name_is_found_again_by_its_class_and_options(name: str) -> None:
    """The settings that a scheduler is made with name it, and no other of its class."""
    spec = SCHEDULERS[name]
    assert short_name(spec.class_name, spec.options) == name


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "dpm++2m karras", "dpm++2m_karras"])
def test_a_schedule_may_stand_behind_the_samplers_name(name: str) -> None:
    """However it is written; and `schedule` beside the sampler says the same."""
    assert check_scheduler(name) == "dpm++2m-karras"
    assert with_schedule("dpm++2m", "karras") == "dpm++2m-karras"
    assert with_schedule("dpm++2m-beta", "karras") == "dpm++2m-karras"


def test_every_label_is_read_again() -> None:
    """What infotext calls a scheduler finds it, or the first one that is called so."""
    for spec in SCHEDULERS.values():
        assert SCHEDULERS[check_scheduler(spec.label)].label == spec.label


def test_a_pair_has_the_settings_of_diffusers() -> None:
    """Each schedule is a setting that diffusers' class has, and one that it lacks is refused."""
    heavy()
    import diffusers

    for name, sampler in SAMPLERS.items():
        takes = inspect.signature(getattr(diffusers, sampler.class_name)).parameters
        for schedule, spec in SCHEDULES.items():
            possible = set(spec.options) <= set(takes) and name not in ("lcm", "tcd")
            assert (schedule in sampler.schedules) == possible, (name, schedule)


def test_what_a_sampler_cannot_run_is_refused_at_once() -> None:
    """The refusal comes when the request is made, and says what the sampler can run."""
    with pytest.raises(InvalidRequest, match="'euler-a' cannot run the schedule 'karras'; it can"):
        Txt2Img(prompt="a", scheduler="euler-a", schedule="Karras")
    with pytest.raises(InvalidRequest, match="unknown schedule; choose one of karras"):
        Txt2Img(prompt="a", schedule="cosine")


def test_a_schedule_is_that_of_the_first_pass_and_told(open_engine: Callable[..., Engine]) -> None:
    """Beside a sampler or the model's own; the picture is another one, and infotext names it."""
    engine = open_engine()
    asked = Txt2Img(prompt=PROMPT, steps=3, seed=1, width=64, height=64, scheduler="dpm++2m")
    plain, karras = engine.run(asked), engine.run(asked.but(schedule="karras"))
    assert karras.images[0].tobytes() != plain.images[0].tobytes()
    assert "Sampler: DPM++ 2M Karras" in karras.infotext
    named = engine.run(asked.but(scheduler="dpm++2m karras"))
    assert named.images[0].tobytes() == karras.images[0].tobytes()
    own = Txt2Img(prompt=PROMPT, steps=3, seed=1, width=64, height=64, schedule="simple")
    assert "Sampler: DDIM Simple" in engine.run(own).infotext
    with pytest.raises(InvalidRequest, match="'ddim' cannot run the schedule 'karras'"):
        engine.plan(own.but(schedule="karras"))
