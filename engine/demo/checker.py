"""
Reads a picture's pixels back into words: background, figures, their colour, shape and place.

Knows the palette and the shapes, and nothing of any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from holdfast.engine.demo.scenes import COLOURS, SHAPES, Description, in_stripes

if TYPE_CHECKING:
    from PIL import Image

Mask = NDArray[np.bool_]

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=float)
_APART = 30.0  # nearest two colours of the palette: 85
_MIDDLE, _SIDE = 0.12, 0.06
_SPECK = 0.003  # of the picture's area; a small star has 0.03
_HOLLOW = 0.1  # share that two pixels' erosion at 64 leaves of a figure; of a filled ring 0.3
_REGULAR = 0.7  # of rows; of a plain background half are right by chance
_ALIKE = 0.7  # an area-matched square overlaps a circle by 0.83, drawn shapes fit by 0.88 and more


@dataclass(frozen=True)
class Found:
    """One figure: `x` and `y` of its centroid as fractions of the picture, its own mask."""

    shape: str | None
    colour: str
    x: float
    y: float
    outlined: bool
    mask: Mask


@dataclass(frozen=True)
class Reading:
    """What a picture shows; figures from the largest to the smallest; stripes behind them."""

    background: str
    figures: tuple[Found, ...]
    striped: bool

    @property
    def mask(self) -> Mask:
        """Where any figure is."""
        return np.asarray(np.any([figure.mask for figure in self.figures], axis=0))


def read(image: Image.Image) -> Reading:
    """Read a picture of any size."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    colour, stripes = _ground(pixels)
    ground = _nearest(pixels, colour, stripes)
    away = np.linalg.norm(pixels - ground, axis=-1)
    areas = _areas(away > _APART)
    figures = [
        figure
        for area in areas
        if area.mean() > _SPECK and (figure := _figure(pixels, ground, area)) is not None
    ]
    return Reading(
        _name(colour),
        tuple(sorted(figures, key=lambda f: -int(f.mask.sum()))),
        bool((colour != stripes).any()),
    )


def judge(description: Description, reading: Reading) -> dict[str, bool]:
    """
    Compare a reading with what a prompt said.

    Returns:
        For each of background, colour, shape and position whether all that the prompt said of it is
        so. A wrong number of figures is wrong in colour, shape and position.
    """
    verdict = {"background": reading.background == description.background}
    if len(reading.figures) != len(description.items):
        return verdict | {"colour": False, "shape": False, "position": False}
    found = reading.figures
    if len(found) > 1 and found[0].colour != description.items[0].colour:
        found = found[::-1]
    pairs = list(zip(description.items, found, strict=True))
    return verdict | {
        "colour": all(item.colour == figure.colour for item, figure in pairs),
        "shape": all(item.shape == figure.shape for item, figure in pairs),
        "position": all(_lies(figure, item.position) for item, figure in pairs)
        and _relates(description.relation, found),
    }


def overlap(one: Mask, other: Mask) -> float:
    """Intersection over union of two masks of one size."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def _lies(figure: Found, position: str | None) -> bool:
    if position is None:
        return True
    if position == "centre":
        return abs(figure.x - 0.5) < _MIDDLE and abs(figure.y - 0.5) < _MIDDLE
    sides = {
        "left": figure.x < 0.5 - _SIDE,
        "right": figure.x > 0.5 + _SIDE,
        "top": figure.y < 0.5 - _SIDE,
        "bottom": figure.y > 0.5 + _SIDE,
    }
    return all(sides[side] for side in position.split())


def _relates(relation: str | None, found: tuple[Found, ...]) -> bool:
    if relation is None:
        return True
    first, second = found
    along = {
        "left": second.x - first.x,
        "right": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }
    return along[relation] > _MIDDLE


def _ground(pixels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Read the background's colour, and that of its stripes: the same where it has none.

    It has stripes where seven of ten rows have, at the picture's sides, that of the two colours
    which is theirs: the model draws without a ruler.
    """
    edge = pixels.shape[1] // 16
    sides = np.concatenate([pixels[:, :edge], pixels[:, -edge:]], axis=1)
    rows, inside = np.median(sides, axis=1), in_stripes(len(pixels))
    step = rows[inside].mean(axis=0) - rows[~inside].mean(axis=0)
    dyed = (rows - rows.mean(axis=0)) @ step > 0
    if np.linalg.norm(step) > _APART and (dyed == inside).mean() > _REGULAR:
        return np.median(rows[~dyed], axis=0), np.median(rows[dyed], axis=0)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    plain = np.median(border, axis=0)
    return plain, plain


def _nearest(
    pixels: NDArray[np.float64], colour: NDArray[np.float64], stripes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what each pixel were without figures: between both colours lie the stripes' edges."""
    step = stripes - colour
    along = np.clip((pixels - colour) @ step / max(1.0, float(step @ step)), 0, 1)
    return np.asarray(colour + along[..., None] * step)


def _name(colour: NDArray[np.float64]) -> str:
    return _NAMES[int(np.linalg.norm(_PALETTE - colour, axis=-1).argmin())]


def _areas(mask: Mask) -> list[Mask]:
    """Split a mask into its connected parts: the greatest label spreads until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.max([padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1],
                         padded[1:-1, :-2], padded[1:-1, 2:]], axis=0)  # fmt: skip
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _core(mask: Mask, depth: int) -> Mask:
    """Take off the outermost pixels, so many deep."""
    for _ in range(depth):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _figure(pixels: NDArray[np.float64], ground: NDArray[np.float64], area: Mask) -> Found | None:
    core = _core(area, 1 + min(area.shape) // 64)
    colour = np.median(pixels[core if core.any() else area], axis=0)
    contrast = np.linalg.norm(colour - ground, axis=-1)
    area = area & (np.linalg.norm(pixels - ground, axis=-1) > 0.4 * contrast)
    if not area.any():  # frayed stripes
        return None
    height, width = area.shape
    ys, xs = np.nonzero(area)
    return Found(
        shape=_shape(area),
        colour=_name(colour),
        x=float(xs.mean() + 0.5) / width,
        y=float(ys.mean() + 0.5) / height,
        outlined=bool(_core(area, min(area.shape) // 32).sum() < _HOLLOW * area.sum()),
        mask=area,
    )


def _shape(area: Mask) -> str | None:
    """Name the shape that, moved and scaled to the area's first two moments, overlaps it most."""
    fits = {name: overlap(area, _fitted(name, area)) for name in SHAPES}
    best = max(fits, key=lambda name: fits[name])
    return best if fits[best] > _ALIKE else None


def _fitted(name: str, area: Mask) -> Mask:
    side = np.linspace(-1.25, 1.25, 201)
    y, x = np.meshgrid(side, side, indexing="ij")
    inside = SHAPES[name](x, y) < 0
    radius = np.sqrt(area.sum() / (inside.mean() * 2.5**2))
    ys, xs = np.nonzero(area)
    rows, columns = np.mgrid[: area.shape[0], : area.shape[1]]
    u = (columns - xs.mean()) / radius + x[inside].mean()
    v = (rows - ys.mean()) / radius + y[inside].mean()
    return np.asarray(SHAPES[name](u, v) < 0)
