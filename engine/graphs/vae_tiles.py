"""
The VAE in tiles: a large image in the memory that a small one takes, and the same pixels.

Tiles differ from a whole image where a layer sees all of it: in the attention, which runs on the
whole image here, and in the group norms of what runs in tiles, which need its mean and deviation.
These are a fixed point: tiles run with the right ones measure those very ones. A shrunken image,
cheap to solve exactly, comes near it; how far it is off at its own solution corrects the next one
(defect correction: K. Böhmer, P. W. Hemker and H. J. Stetter, Computing Supplementum 5, 1984).
Each round over all tiles leaves a tenth of the error or less, and measures what is left.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Table = NDArray[np.float64]

STRIDES = {"tiles@1/4": 4, "tiles@1/8": 8}
"""
The shapes in the key of a VAE that runs in tiles, and where it is cut: pixels of the image on the
side of one where the halves meet. The more of them, the less memory, and the more work.
"""

WHOLE, TILE, NORMS, RIM = "whole", "tile", "norms", "rim"
WHOLE_OUT, TILE_OUT, MEASURED, REACH = "whole_out", "tile_out", "measured", "reach"
"""
Inputs and outputs of a graph that was cut.

From `WHOLE` to `WHOLE_OUT` goes the half near the latents, from `TILE` to `TILE_OUT` the one near
the pixels: (1, C, H, W) each. `NORMS` (norms, 2, groups) holds what each group norm multiplies by
and then adds, `MEASURED` the mean and the mean square of what that gave, in the same shape. `RIM`
(2, 2) is what of a tile's top and left, bottom and right does not count in it, `REACH` (1,) how far
the half sees; both in pixels of `TILE`.
"""

SIDE = 384
"""Pixels on a tile's side, less what it overlaps its neighbours."""

CLOSE = 0.003
"""What is aimed at to be left of the statistics' error, relative to the deviation."""

EXACT = 0.01
"""What may be left of it: some 0.5/255 of a pixel in a trained VAE."""

ROUNDS = 5
"""Over all tiles, at most."""

_SMALL = 256
"""Pixels on a side of the square that the shrunken image is no larger than."""

_IDLE = 8
"""Pixels on the side of what the half that is not needed gets to chew on."""


@dataclass(frozen=True)
class _Statistics:
    """Mean and variance of each norm's groups, (norms, groups); the variance holds the epsilon."""

    mean: Table
    variance: Table

    @property
    def table(self) -> Array:
        """What the norms multiply by and then add, (norms, 2, groups)."""
        factor = 1 / np.sqrt(self.variance)
        return np.stack([factor, -self.mean * factor], axis=1).astype(np.float32)

    def measured(self, found: Table) -> _Statistics:
        """Return the statistics of values of which, under this table, `found` was measured."""
        mean, square = found[:, 0], found[:, 1]
        variance = np.maximum(square - mean**2, np.finfo(np.float32).eps)
        return _Statistics(self.mean + mean * np.sqrt(self.variance), self.variance * variance)

    def apart(self, other: _Statistics) -> float:
        """Return how far they are apart at most, relative to the deviation."""
        means = np.abs(other.mean - self.mean) / np.sqrt(self.variance)
        return float(max(means.max(), np.abs(other.variance / self.variance - 1).max()))


class _Place(NamedTuple):
    """A tile along one axis: where it starts and stops, and the part of that which is its own."""

    start: int
    stop: int
    own_start: int
    own_stop: int

    @property
    def own(self) -> int:
        return self.own_stop - self.own_start


class TiledVae:
    """
    A VAE encoder or decoder that `cut` has cut.

    Args:
        compiled: The cut graph, compiled: called with its inputs by name, it gives its outputs.
            What it holds between calls can be released: a half needs nothing of the other's.
        stride: Where it was cut; see `STRIDES`.
        side: Pixels on a tile's side, less what it overlaps its neighbours; a multiple of 8.

    Attributes:
        rounds: How often the latest image went through all tiles.
        apart: What was left of the statistics' error.
    """

    def __init__(self, compiled: Any, stride: int, side: int = SIDE) -> None:
        self.rounds = 0
        self.apart = 0.0
        self._compiled = compiled
        self._stride = stride
        self._side = side
        channels = {
            name: compiled.input(name).get_partial_shape()[1].get_length() for name in (WHOLE, TILE)
        }
        self._idle = {
            name: np.zeros((1, each, _IDLE, _IDLE), np.float32) for name, each in channels.items()
        }
        norms, _, groups = compiled.input(NORMS).get_shape()
        self._unknown = _Statistics(np.zeros((norms, groups)), np.ones((norms, groups)))
        self._reach = 0

    @property
    def exact(self) -> bool:
        """Whether the latest image is that of the whole, but for rounding."""
        return self.apart < EXACT

    def decode(self, latents: Array) -> Array:
        """Turn latents (1, C, h, w) into pixels (1, 3, H, W)."""
        maps = self._run(self._unknown, whole=latents)[WHOLE_OUT]
        self._compiled.release_memory()
        return self._in_tiles(maps, grain=1, pixels=self._stride)

    def encode(self, pixels: Array) -> Array:
        """Turn pixels (1, 3, H, W), sides multiples of the stride, into moments (1, 2 C, h, w)."""
        maps = self._in_tiles(pixels, grain=self._stride, pixels=1)
        self._compiled.release_memory()
        moments: Array = self._run(self._unknown, whole=maps)[WHOLE_OUT]
        return moments

    def _in_tiles(self, maps: Array, *, grain: int, pixels: int) -> Array:
        """
        Run the local half.

        Args:
            maps: Its input (1, C, H, W).
            grain: Tiles lie on multiples of it.
            pixels: Of the image on the side of one of `maps`.
        """
        self._reach = int(self._run(self._unknown)[REACH][0])
        small = _shrunk(maps, _SMALL // pixels, grain)
        shift, factor = self._unknown.mean, self._unknown.variance
        statistics = self._unknown
        before = math.inf
        for self.rounds in range(1, ROUNDS + 1):
            statistics = self._settled(small, shift, factor, statistics)
            image, found = self._round(maps, statistics, grain, self._side // pixels)
            seen = statistics.measured(found)
            self.apart = statistics.apart(seen)
            if self.apart < CLOSE or self.apart > before / 2:  # 16 bits round what is left
                break
            before = self.apart
            alike = self._measure(small, statistics)
            shift, factor = seen.mean - alike.mean, seen.variance / alike.variance
        return image

    def _settled(
        self, small: Array, shift: Table, factor: Table, statistics: _Statistics
    ) -> _Statistics:
        """Return the fixed point of the shrunken image, corrected."""
        for _ in range(len(shift) + 1):  # the first norm is right at once, and then one more each
            seen, earlier = self._measure(small, statistics), statistics
            statistics = _Statistics(seen.mean + shift, seen.variance * factor)
            if earlier.apart(statistics) < CLOSE / 4:
                break
        return statistics

    def _measure(self, maps: Array, statistics: _Statistics) -> _Statistics:
        return statistics.measured(self._run(statistics, tile=maps)[MEASURED])

    def _round(
        self, maps: Array, statistics: _Statistics, grain: int, side: int
    ) -> tuple[Array, Table]:
        """Run all tiles; return what they show, and what the norms measured over all of them."""
        height, width = maps.shape[-2:]
        lines, found = [], np.zeros(statistics.table.shape)
        for row in places(height, side, self._reach, grain):
            line = []
            for column in places(width, side, self._reach, grain):
                part = maps[..., row.start : row.stop, column.start : column.stop]
                rim = [
                    [row.own_start - row.start, column.own_start - column.start],
                    [row.stop - row.own_stop, column.stop - column.own_stop],
                ]
                answer = self._run(statistics, tile=part, rim=np.array(rim))
                found += answer[MEASURED] * (row.own * column.own / (height * width))
                line.append(_own(answer[TILE_OUT], row, column))
            lines.append(np.concatenate(line, -1))
        return np.concatenate(lines, -2), found

    def _run(
        self,
        statistics: _Statistics,
        *,
        whole: Array | None = None,
        tile: Array | None = None,
        rim: NDArray[np.int64] | None = None,
    ) -> Mapping[str, Any]:
        given = {WHOLE: whole, TILE: tile}
        images = {
            name: np.ascontiguousarray(self._idle[name] if each is None else each)
            for name, each in given.items()
        }
        rim = np.zeros((2, 2), np.int64) if rim is None else rim
        answer: Mapping[str, Any] = self._compiled({**images, NORMS: statistics.table, RIM: rim})
        return answer


def _shrunk(maps: Array, side: int, grain: int) -> Array:
    """Leave out pixels, so that no more than `side` squared are left, in whole grains."""
    step = math.ceil(math.sqrt(math.prod(maps.shape[-2:])) / side)
    rows, columns = (max(grain, each // step // grain * grain) for each in maps.shape[-2:])
    return maps[..., ::step, ::step][..., :rows, :columns]


def places(length: int, side: int, reach: int, grain: int) -> Iterator[_Place]:
    """Spread as few tiles of one size as it takes over `length`."""
    count = -(-length // side)
    edges = [round(index * length / count / grain) * grain for index in range(count + 1)]
    widest = max(after - before for before, after in itertools.pairwise(edges))
    size = min(length, widest + 2 * reach)
    for before, after in itertools.pairwise(edges):
        start = min(max(before - reach, 0), length - size)
        yield _Place(start, start + size, before, after)


def _own(shown: Array, row: _Place, column: _Place) -> Array:
    """Cut off what a tile shows of its neighbours' parts."""
    slices = (
        slice(
            (place.own_start - place.start) * length // (place.stop - place.start),
            (place.own_stop - place.start) * length // (place.stop - place.start),
        )
        for place, length in zip((row, column), shown.shape[-2:], strict=True)
    )
    rows, columns = slices
    return shown[..., rows, columns].copy()
