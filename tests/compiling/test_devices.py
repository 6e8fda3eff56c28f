from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Txt2Img
from holdfast.engine.compiling.devices import KEPT_PRIMITIVES, PRIMITIVES
from holdfast.engine.compiling.memory import resident_bytes
from tests.support.engines import PROMPT, pipeline_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.engine import Engine

    Open = Callable[..., Engine]

SIZES = tuple(itertools.product(range(64, 192, 16), range(64, 144, 16)))


@pytest.mark.parametrize(
    ("properties", "kept"), [({}, str(KEPT_PRIMITIVES)), ({PRIMITIVES: 7}, "7")]
)
def test_what_a_cpu_keeps_for_each_size_is_part_of_every_key(
    open_engine: Open, properties: dict[str, Any], kept: str
) -> None:
    """Each component is compiled with a bound: Holdfast's, or the one that the host has set."""
    engine = open_engine(properties=properties)
    engine.load()
    service = pipeline_of(engine).store.service
    assert {dict(part.key.properties)[PRIMITIVES] for part in service.values()} == {kept}


@pytest.mark.slow
def test_what_a_cpu_keeps_for_each_size_is_bounded(open_engine: Open) -> None:
    """Many sizes leave less than half of what they leave where OpenVINO's own bound is set."""

    def growth(properties: dict[str, Any]) -> int:
        engine = open_engine(precision="f32", properties=properties)
        request = Txt2Img(prompt=PROMPT, width=192, height=144, steps=1, seed=7)
        engine.run(request)
        before = resident_bytes()
        for width, height in SIZES:
            engine.run(request.but(width=width, height=height))
        after = resident_bytes()
        engine.unload()
        assert before is not None
        assert after is not None
        return after - before

    assert growth({}) < growth({PRIMITIVES: 5000}) / 2
