from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from holdfast.engine import InvalidRequest, Mode, Txt2Img

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine


def test_a_model_tells_what_may_be_asked_of_it(
    open_engine: Callable[..., Engine], tiny_ir: Path
) -> None:
    """Its facts are those that requests are held against, and no folder is in them."""
    engine = open_engine()
    facts = engine.model_facts()
    assert engine.state.value == "unloaded"
    assert (facts.name, facts.family) == (tiny_ir.name, "sd")
    assert facts.modes == (Mode.TXT2IMG, Mode.IMG2IMG, Mode.INPAINT)
    assert facts.takes_loras
    assert str(tiny_ir.parent) not in str(facts)
    result = engine.run(Txt2Img(prompt="a red circle", steps=1))
    assert result.images[0].size == facts.size
    assert result.provenance["model_fingerprint"] == facts.fingerprint
    odd = Txt2Img(width=facts.multiple * 3 - 3, height=facts.multiple * 4 + 1)
    with pytest.raises(InvalidRequest, match="multiples of"):
        engine.plan(odd)
    width, height = facts.nearest(odd.width or 0, odd.height or 0)
    assert (width, height) == (facts.multiple * 3, facts.multiple * 4)
    engine.plan(odd.but(width=width, height=height))
    for name in facts.schedulers:
        engine.plan(Txt2Img(steps=10, scheduler=name))


def test_the_nearest_size_is_one_that_can_be_made(open_engine: Callable[..., Engine]) -> None:
    """Half a multiple is rounded up; no side is 0, and none is over the longest."""
    facts = dataclasses.replace(open_engine().model_facts(), multiple=16, longest_side=100)
    assert facts.nearest(24, 23) == (32, 16)
    assert facts.nearest(1, 5000) == (16, 96)
    assert dataclasses.replace(facts, longest_side=None).nearest(24, 5000) == (32, 5008)
