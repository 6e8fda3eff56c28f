"""Time along a drawing: one engine's, with its idle stretches folded."""

from __future__ import annotations

import bisect
import datetime as dt
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from holdfast.engine.logbook.timeline import Bar

_LONG_IDLE, _FOLDED = 0.05, 0.012
"""Share of all that is busy from which on an idle stretch is folded, and what is left of it."""
_SHORTEST = 1e-3


class Piece(NamedTuple):
    """
    A stretch of time on the axis.

    Attributes:
        begin: Seconds since the engine's first event.
        end: The same.
        left: Where it begins on the drawing, from 0 to 1.
        right: Where it ends.
        is_fold: Whether it is an idle stretch that is drawn shorter than it was.
    """

    begin: float
    end: float
    left: float
    right: float
    is_fold: bool


class Axis:
    """
    Where each moment of an engine is drawn.

    Args:
        bars: All that is drawn of it; at least one.
    """

    def __init__(self, bars: Sequence[Bar]) -> None:
        self.begin = min(bar.begin for bar in bars)
        last = max(self._seconds(bar.end) for bar in bars)
        busy = merged([(0.0, 0.0), (last, last), *self._busy(bars)], 0.0)
        total = max(sum(end - begin for begin, end in busy), _SHORTEST)
        self.pieces = tuple(_pieces(merged(busy, _LONG_IDLE * total), _FOLDED * total))
        self._begins = [piece.begin for piece in self.pieces]

    def share(self, at: dt.datetime) -> float:
        """Return where a moment is, from 0 to 1."""
        seconds = self._seconds(at)
        piece = self.pieces[max(bisect.bisect_right(self._begins, seconds) - 1, 0)]
        length = max(piece.end - piece.begin, _SHORTEST)
        within = min(max((seconds - piece.begin) / length, 0.0), 1.0)
        return piece.left + within * (piece.right - piece.left)

    def ticks(self, about: int, fine: int) -> Iterator[tuple[float, float, bool]]:
        """
        Give round moments on what is not folded.

        Args:
            about: Number of large ones.
            fine: How many small ones there are from one large one to the next.

        Yields:
            Seconds since the first event, where that is, and whether it is a large one.
        """
        drawn = sum(piece.end - piece.begin for piece in self.pieces if not piece.is_fold)
        step = _nice(max(drawn, _SHORTEST) / about) / fine
        for piece in self.pieces:
            if not piece.is_fold:
                for number in range(math.ceil(piece.begin / step), int(piece.end / step) + 1):
                    at = self.begin + dt.timedelta(seconds=number * step)
                    yield number * step, self.share(at), number % fine == 0

    def _seconds(self, at: dt.datetime) -> float:
        return (at - self.begin).total_seconds()

    def _busy(self, bars: Iterable[Bar]) -> Iterator[tuple[float, float]]:
        for bar in bars:
            if not bar.lasts:
                yield self._seconds(bar.begin), self._seconds(bar.end)


def merged(stretches: Iterable[tuple[float, float]], apart: float) -> list[tuple[float, float]]:
    """Join stretches that overlap or are no further apart than that."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(stretches):
        if joined and begin <= joined[-1][1] + apart:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _pieces(busy: Sequence[tuple[float, float]], fold: float) -> Iterator[Piece]:
    lengths = [max(end - begin, fold) for begin, end in busy]
    whole = sum(lengths) + fold * (len(busy) - 1)
    left = 0.0
    for number, ((begin, end), length) in enumerate(zip(busy, lengths, strict=True)):
        right = left + length / whole
        yield Piece(begin, end, left, right, is_fold=False)
        left = right
        if number + 1 < len(busy):
            right = left + fold / whole
            yield Piece(end, busy[number + 1][0], left, right, is_fold=True)
            left = right


def _nice(value: float) -> float:
    """Return the 1, 2 or 5 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * lead for lead in (1, 2, 5, 10) if power * lead >= value)
