from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.requests.cadence import COMPOSED, FEWEST, Evaluations, cadence, counted

if TYPE_CHECKING:
    from holdfast.engine.requests.values import Speed

SPEEDS = st.sampled_from(["balanced", "fast"])
PERIODS = {"balanced": 2, "fast": 3}
COUNTS = st.integers(FEWEST, 300)
STRENGTHS = st.floats(0.01, 1)


@pytest.mark.parametrize(
    ("speed", "evaluations", "strength", "drawn"),
    [
        ("balanced", 20, 1.0, "WWWWWWWWWcWcWcWcWcWc"),
        ("fast", 20, 1.0, "WWWWWWWWWccWccWccWcc"),
        ("balanced", 10, 0.5, "WcWcWcWcWc"),
        ("fast", 10, 0.5, "WccWccWccW"),
        ("balanced", 10, 0.8, "WWWWcWcWcW"),
        ("fast", 5, 1.0, "WWWWW"),
        ("exact", 10, 0.5, "WWWWWWWWWW"),
    ],
)
def test_a_pass_is_whole_until_it_is_composed_and_then_now_and_again(
    speed: Speed, evaluations: int, strength: float, drawn: str
) -> None:
    """The cadence of usual passes, written out."""
    assert [each == "W" for each in drawn] == list(cadence(speed, evaluations, strength))


@given(SPEEDS, COUNTS, STRENGTHS, st.data())
def test_each_cheap_evaluation_has_a_whole_one_not_long_before(
    speed: Speed, evaluations: int, strength: float, data: st.DataObject
) -> None:
    """The first is whole, what is told another prompt is, and no run of cheap ones is longer."""
    changes = data.draw(st.sets(st.integers(0, evaluations - 1)))
    whole = cadence(speed, evaluations, strength, changes)
    assert len(whole) == evaluations
    assert whole[0]
    assert all(whole[each] for each in changes)
    runs = [len(list(run)) for is_whole, run in itertools.groupby(whole) if not is_whole]
    assert max(runs, default=0) <= PERIODS[speed] - 1
    without = cadence(speed, evaluations, strength)
    assert sum(whole) >= sum(without)


@given(SPEEDS, COUNTS, STRENGTHS)
def test_none_is_cheap_before_the_picture_is_composed(
    speed: Speed, evaluations: int, strength: float
) -> None:
    """What stands before that share of the schedule is whole, however late a pass begins."""
    whole = cadence(speed, evaluations, strength)
    places = [1 - strength + strength * index / evaluations for index in range(evaluations)]
    assert all(
        is_whole for is_whole, place in zip(whole, places, strict=True) if place < COMPOSED - 1e-6
    )


@given(st.sampled_from(["exact", *PERIODS]), st.integers(1, 300), STRENGTHS)
def test_faster_is_never_more(speed: Speed, evaluations: int, strength: float) -> None:
    """Exact passes and short ones are whole; fast has no more whole evaluations than balanced."""
    whole = cadence(speed, evaluations, strength)
    if speed == "exact" or evaluations < FEWEST:
        assert all(whole)
    assert sum(cadence("fast", evaluations, strength)) <= sum(whole)
    told = counted(whole)
    assert (told.whole, told.cheap) == (sum(whole), evaluations - sum(whole))


def test_evaluations_are_told_in_words() -> None:
    """Cheap ones are told of where there are some."""
    assert str(Evaluations(20)) == "20 whole"
    assert str(Evaluations(14, 6)) == "14 whole, 6 cheap"
