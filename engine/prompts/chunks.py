"""Prompts longer than a text encoder reads at once: chunks, each between a start and an end."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

COMMA_REACH = 20
"""How many tokens before a chunk's end a comma may stand for the chunk to end there instead."""


class Unit(NamedTuple):
    """
    What stands at one place, or what stands together: a token, or all vectors of an embedding.

    Attributes:
        token: Its id; where there are vectors, of no meaning.
        weight: Of the text that it is of.
        vectors: (count, width), or None.
    """

    token: int
    weight: float = 1.0
    vectors: NDArray[np.float32] | None = None

    @property
    def length(self) -> int:
        """Places that it takes."""
        return 1 if self.vectors is None else len(self.vectors)


Chunk = tuple[Unit, ...]


def in_chunks(units: Iterable[Unit | None], size: int, comma: int | None) -> tuple[Chunk, ...]:
    """
    Divide a prompt into chunks of at most `size` places; at least one, which may be empty.

    As A1111 does: where a chunk is full and a comma is near its end, what comes after the comma
    goes to the next one.

    Args:
        units: In order; None begins a chunk (``BREAK``).
        size: Of a chunk.
        comma: The comma's id, or None.
    """
    chunks: list[list[Unit]] = [[]]
    for unit in units:
        if unit is None:
            chunks.append([])
            continue
        full = _length(chunks[-1]) == size
        if full and (unit.vectors is not None or unit.token != comma):
            _move_after_comma(chunks, comma)
        if _length(chunks[-1]) + unit.length > size:
            chunks.append([])
        chunks[-1].append(unit)
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()
    return tuple(tuple(chunk) for chunk in chunks)


def _length(chunk: Sequence[Unit]) -> int:
    return sum(unit.length for unit in chunk)


def _move_after_comma(chunks: list[list[Unit]], comma: int | None) -> None:
    chunk = chunks[-1]
    for place in range(len(chunk) - 1, -1, -1):
        if _length(chunk[place:]) > COMMA_REACH:
            return
        if chunk[place].vectors is None and chunk[place].token == comma:
            chunks[-1], moved = chunk[: place + 1], chunk[place + 1 :]
            chunks.append(moved)
            return
