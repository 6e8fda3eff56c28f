"""The fields that every request with a prompt of its own has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.lora import Lora
from holdfast.engine.requests.pictures import several
from holdfast.engine.requests.schedulers import (
    check_eta,
    check_schedule,
    check_scheduler,
    with_schedule,
)
from holdfast.engine.requests.values import SEEDS, Guidance, Seed, Side, Speed, Steps, Value


class Prompted(Value):
    """What a prompt is drawn with; `Txt2Img` tells each field."""

    prompt: str = ""
    negative_prompt: str = ""
    steps: Steps = 20
    guidance: Guidance = 7.0
    scheduler: str | None = None
    seed: Seed | None = None
    batch: Annotated[int, Field(ge=1, le=64)] = 1
    schedule: str | None = None
    lora: tuple[Lora, ...] | None = None
    clip_skip: Annotated[int, Field(ge=1, le=32)] | None = None
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    variation_seed: Seed | None = None
    variation_strength: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed_resize: tuple[Side, Side] | None = None
    speed: Speed = "exact"

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        return None if name is None else check_scheduler(name)

    @model_validator(mode="after")
    def _seed_of_each(self) -> Self:
        if self.seed is not None and self.seed + self.batch > SEEDS:
            msg = (
                f"seed: the last of a batch of {self.batch} is made with seed + {self.batch - 1}, "
                f"which is over {SEEDS - 1}; take a smaller seed"
            )
            raise ValueError(msg)
        return self

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, name: str | None) -> str | None:
        return None if name is None else check_schedule(name)

    @model_validator(mode="after")
    def _possible_schedule(self) -> Self:
        if self.scheduler is not None:
            with_schedule(self.scheduler, self.schedule)
            if self.eta is not None:
                check_eta(self.scheduler)
        return self

    @model_validator(mode="after")
    def _varied_towards_a_seed(self) -> Self:
        if (self.variation_seed is None) != (self.variation_strength == 0):
            msg = "give variation_seed and a variation_strength over 0 together, or neither"
            raise ValueError(msg)
        return self


class Drawn(Prompted):
    """A request whose images may have regions redrawn at the end."""

    detail: Annotated[
        tuple[Detail, ...],
        BeforeValidator(several, json_schema_input_type=Detail | Sequence[Detail]),
    ] = ()

    @model_validator(mode="after")
    def _parts(self) -> Self:
        for each in self.detail:
            if each.image is not None or each.batch != 1:
                msg = "detail: as a part of a request it takes the images of that: give no image"
                raise ValueError(msg)
        return self
