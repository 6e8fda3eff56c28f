from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.prompts.chunks import COMMA_REACH, Chunk, Unit, in_chunks

COMMA = 9
UNITS = st.lists(
    st.none()
    | st.builds(Unit, st.sampled_from([1, 2, COMMA]))
    | st.builds(lambda n: Unit(0, 1.0, np.zeros((n, 2), np.float32)), st.integers(1, 10)),
    max_size=60,
)


def shown(chunks: tuple[Chunk, ...]) -> str:
    """Show chunks as letters, a comma as itself, an embedding as its length."""
    return "/".join(
        "".join(
            str(u.length) if u.vectors is not None else "," if u.token == COMMA else "a" for u in c
        )
        for c in chunks
    )


def units(text: str) -> list[Unit | None]:
    """Return what `shown` shows so; a slash is a break."""
    return [
        None if letter == "/"
        else Unit(0, 1.0, np.zeros((int(letter), 2), np.float32)) if letter.isdigit()
        else Unit(COMMA if letter == "," else 1)
        for letter in text
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("aaaaa", "aaaaa"),
        ("aaaaaa", "aaaaa/a"),
        ("aaa,aa", "aaa,/aa"),
        ("aaaa,a", "aaaa,/a"),
        ("aaaaa,", "aaaaa/,"),
        ("aa/a", "aa/a"),
        ("aa/", "aa"),
        ("aa//a", "aa//a"),
        ("aa4", "aa/4"),
        ("a,aaa4", "a,/aaa/4"),
        ("a4a", "a4/a"),
        ("/a", "/a"),
    ],
)
def test_a_chunk_ends_where_it_is_full_or_behind_a_comma(text: str, expected: str) -> None:
    """A full chunk ends behind its last comma, if it has one; an embedding is not divided."""
    assert shown(in_chunks(units(text), 5, COMMA)) == expected


@pytest.mark.parametrize(("after", "expected"), [(COMMA_REACH - 1, 30 - 19), (COMMA_REACH, 30)])
def test_a_comma_far_from_the_end_divides_nothing(after: int, expected: int) -> None:
    """Twenty tokens from the end is as far as a comma is looked for."""
    chunks = in_chunks(units("a" * (29 - after) + "," + "a" * (after + 1)), 30, COMMA)
    assert len(chunks[0]) == expected


@given(given_units=UNITS)
def test_nothing_is_lost_or_moved(given_units: list[Unit | None]) -> None:
    """The chunks hold every unit in order, none is too long, and there is one at least."""
    chunks = in_chunks(given_units, 10, COMMA)
    held = [id(unit) for chunk in chunks for unit in chunk]
    assert held == [id(unit) for unit in given_units if unit is not None]
    assert all(sum(unit.length for unit in chunk) <= 10 for chunk in chunks)
    assert chunks
