"""
Scenes of one or two figures: their grammar, their prompts and their renderer.

A `Description` is what a prompt says, a `Scene` is one exact layout that fits it. Lengths are
fractions of the shorter side of the picture, y points down.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[np.float64]

COLOURS = MappingProxyType(
    {
        "red": (220, 40, 45),
        "orange": (245, 140, 30),
        "yellow": (250, 220, 60),
        "green": (40, 160, 75),
        "blue": (45, 85, 220),
        "purple": (150, 60, 190),
        "black": (25, 25, 28),
        "white": (248, 248, 248),
    }
)
SIZES = MappingProxyType({"small": (0.18, 0.21), "medium": (0.23, 0.26), "large": (0.29, 0.33)})
POSITIONS = MappingProxyType(
    {
        "left": ("low", None),
        "right": ("high", None),
        "top": (None, "low"),
        "bottom": (None, "high"),
        "centre": ("mid", "mid"),
        "top left": ("low", "low"),
        "top right": ("high", "low"),
        "bottom left": ("low", "high"),
        "bottom right": ("high", "high"),
    }
)
RELATIONS = ("left", "right", "above", "below")

WORDS = MappingProxyType(
    {
        "red": ("red", "red", "scarlet", "crimson"),
        "orange": ("orange",),
        "yellow": ("yellow", "yellow", "golden"),
        "green": ("green", "green", "emerald"),
        "blue": ("blue", "blue", "azure"),
        "purple": ("purple", "purple", "violet"),
        "black": ("black",),
        "white": ("white",),
        "circle": ("circle", "circle", "disc", "disk", "dot", "ball"),
        "square": ("square", "square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "heart": ("heart",),
        "ring": ("ring", "ring", "donut", "hoop"),
        "small": ("small", "small", "little", "tiny"),
        "medium": ("medium", "medium sized"),
        "large": ("large", "large", "big", "huge"),
        "left": ("on the left", "at the left", "on the left side", "left"),
        "right": ("on the right", "at the right", "on the right side", "right"),
        "top": ("at the top", "near the top", "top"),
        "bottom": ("at the bottom", "near the bottom", "bottom"),
        "centre": ("in the center", "in the centre", "in the middle", "centered"),
        "top left": ("at the top left", "in the upper left corner", "top left"),
        "top right": ("at the top right", "in the upper right corner", "top right"),
        "bottom left": ("at the bottom left", "in the lower left corner", "bottom left"),
        "bottom right": ("at the bottom right", "in the lower right corner", "bottom right"),
        "left of": ("left of", "to the left of"),
        "right of": ("right of", "to the right of"),
        "above": ("above", "over"),
        "below": ("below", "under", "beneath"),
    }
)

OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ")
_BACKGROUNDS = ("{} background", "{} background", "on {}", "on a {} background", "against {}")
_HELD_OUT_IN = 10
_MARGIN = 0.02
_DETAIL = 1 / 64
_STROKE = 0.036


@dataclass(frozen=True)
class Item:
    """What a prompt says of one figure; None where it is silent."""

    shape: str
    colour: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Description:
    """What a prompt says: one item, or two and how the first lies to the second."""

    items: tuple[Item, ...]
    background: str | None
    relation: str | None = None
    outlined: bool = False

    @property
    def held_out(self) -> bool:
        """Whether a combination of shape, colour and background in it is kept from training."""
        return any(
            _digest(item.shape, item.colour, self.background) % _HELD_OUT_IN == 0
            for item in self.items
        )


@dataclass(frozen=True)
class Figure:
    """A shape with its centre and half-extent."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Figures on a background; `outlined` draws them bare, `striped` lays stripes behind them."""

    figures: tuple[Figure, ...]
    background: str
    outlined: bool = False
    striped: bool = False


def _digest(*words: object) -> int:
    text = "/".join(map(str, words))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _happens(rng: np.random.Generator, chance: float) -> bool:
    return bool(rng.random() < chance)


def _maybe(rng: np.random.Generator, chance: float, options: tuple[str, ...]) -> str | None:
    return _pick(rng, options) if _happens(rng, chance) else None


def describe(rng: np.random.Generator, *, figures: int = 1, held_out: bool = False) -> Description:
    """
    Choose a description at random.

    Args:
        rng: Source of every choice.
        figures: 1 or 2.
        held_out: Choose among the combinations that training never sees, instead of those it does.
    """
    while True:
        background = _pick(rng, tuple(COLOURS))
        colours = [c for c in COLOURS if c != background]
        items: list[Item] = []
        for _ in range(figures):
            colour = colours.pop(int(rng.integers(len(colours))))
            size = _maybe(rng, 0.6, tuple(SIZES))
            if any(item.size == "large" for item in items) and size == "large":
                size = "small"
            items.append(Item(_pick(rng, tuple(SHAPES)), colour, size))
        if figures == 1:
            items[0] = replace(items[0], position=_maybe(rng, 0.7, tuple(POSITIONS)))
        relation = _maybe(rng, 0.8, RELATIONS) if figures > 1 else None
        description = Description(tuple(items), background, relation)
        if description.held_out == held_out:
            return description


def phrase(description: Description, rng: np.random.Generator) -> str:
    """Say a description in words: synonyms and word order are chosen at random."""

    def word(name: str) -> str:
        return _pick(rng, WORDS[name])

    def noun(item: Item) -> str:
        size = word(item.size) + " " if item.size else ""
        size = f"outlined {size}" if description.outlined else size
        if _happens(rng, 0.08):
            return f"{size}{word(item.shape)} in {word(item.colour)}"
        return f"{size}{word(item.colour)} {word(item.shape)}"

    def with_article(text: str) -> str:
        return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"

    bare = _happens(rng, 0.35)
    nouns = [noun(item) if bare else with_article(noun(item)) for item in description.items]
    if len(nouns) > 1:
        relation = description.relation
        joint = "and"
        if relation:
            joint = word(relation if relation in ("above", "below") else f"{relation} of")
        body = f"{nouns[0]} {joint} {nouns[1]}"
    else:
        position = description.items[0].position
        body = nouns[0]
        if position:
            said = word(position)
            body = f"{said}, {body}" if _happens(rng, 0.12) else f"{body} {said}"
    if description.background is None:
        return _pick(rng, OPENINGS) + body
    ground = _pick(rng, _BACKGROUNDS).format(word(description.background))
    if _happens(rng, 0.2):
        return f"{ground}, {body}"
    comma = "," if ground.endswith("background") and not ground.startswith("on") else ""
    return f"{_pick(rng, OPENINGS)}{body}{comma} {ground}"


def place(description: Description, rng: np.random.Generator) -> Scene:
    """Choose a layout that fits a description; what it leaves open is chosen at random."""
    background = description.background or _pick(
        rng, tuple(c for c in COLOURS if all(c != item.colour for item in description.items))
    )
    figures: tuple[Figure, ...]
    if len(description.items) == 1:
        figures = (_place_one(description.items[0], rng),)
    else:
        figures = _place_two(description, rng)
    return Scene(figures, background, description.outlined)


def _radius(size: str | None, rng: np.random.Generator) -> float:
    low, high = SIZES[size or _pick(rng, tuple(SIZES))]
    return float(rng.uniform(low, high))


def _place_one(item: Item, rng: np.random.Generator) -> Figure:
    radius = _radius(item.size, rng)
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    bands = {
        None: (low, high),
        "low": (low, 0.38),
        "mid": (0.46, 0.54),
        "high": (0.62, high),
    }
    across, down = POSITIONS[item.position] if item.position else (None, None)
    x, y = rng.uniform(*bands[across]), rng.uniform(*bands[down])
    return Figure(item.shape, item.colour, float(x), float(y), radius)


def _place_two(description: Description, rng: np.random.Generator) -> tuple[Figure, ...]:
    relation = description.relation or _pick(rng, RELATIONS)
    radii = [_radius(item.size, rng) for item in description.items]
    while sum(radii) > 0.5 - 1.5 * _MARGIN - 0.02:
        radii = [
            radius if item.size == "small" else radius * 0.97
            for radius, item in zip(radii, description.items, strict=True)
        ]
    if relation in ("right", "below"):
        radii.reverse()
    slack = 1 - 2 * sum(radii) - 2 * _MARGIN
    before, between = sorted(rng.uniform(0, slack - 0.03, size=2))
    first = _MARGIN + before + radii[0]
    second = first + sum(radii) + 0.03 + (between - before)
    along = [first, second]
    across = [float(rng.uniform(r + _MARGIN, 1 - r - _MARGIN)) for r in radii]
    if relation in ("right", "below"):
        along, across, radii = along[::-1], across[::-1], radii[::-1]
    upright = relation in ("above", "below")
    xs, ys = (across, along) if upright else (along, across)
    placed = zip(description.items, xs, ys, radii, strict=True)
    return tuple(Figure(item.shape, item.colour, x, y, radius) for item, x, y, radius in placed)


def _polygon(x: Array, y: Array, corners: Array) -> Array:
    """Signed distance to a closed polygon: nearest edge, negative where a ray crosses oddly."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - ex * along) ** 2 + (py - ey * along) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.asarray(np.where(inside, -1.0, 1.0) * np.sqrt(nearest))


def _corners(angles: Array, radii: Array | float, *, drop: float = 0.0) -> Array:
    return np.stack([np.sin(angles) * radii, drop - np.cos(angles) * radii], axis=-1)


_TURN = 2 * np.pi
_TRIANGLE = _corners(np.arange(3) / 3 * _TURN, 1.12, drop=0.24)
_STAR = _corners(np.arange(10) / 10 * _TURN, np.where(np.arange(10) % 2, 0.45, 1.08), drop=0.06)


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.84


def _triangle(x: Array, y: Array) -> Array:
    return _polygon(x, y, _TRIANGLE)


def _star(x: Array, y: Array) -> Array:
    return _polygon(x, y, _STAR)


def _heart(x: Array, y: Array) -> Array:
    """A square on its tip with a half-disc on each upper edge."""
    half = 0.58
    y = y - 0.13
    u, v = (x + y) * np.sqrt(0.5), (x - y) * np.sqrt(0.5)
    square = np.maximum(abs(u), abs(v)) - half
    discs = np.minimum(np.hypot(u + half, v), np.hypot(u, v - half)) - half
    return np.asarray(np.minimum(square, discs))


def _ring(x: Array, y: Array) -> Array:
    return np.asarray(abs(np.hypot(x, y) - 0.72) - 0.26)


SHAPES: MappingProxyType[str, Callable[[Array, Array], Array]] = MappingProxyType(
    {
        "circle": _circle,
        "square": _square,
        "triangle": _triangle,
        "star": _star,
        "heart": _heart,
        "ring": _ring,
    }
)


def _resolved(width: float, scale: int) -> float:
    """How far a detail of that width shows: not at all at one pixel, wholly from two on."""
    return float(np.clip(width * scale - 1, 0, 1))


def in_stripes(height: int) -> NDArray[np.bool_]:
    """Tell which rows of a striped background are stripes: every other eighth of them."""
    return np.asarray((np.arange(height) * 8 // height) % 2 == 1)


def _stripes(scene: Scene) -> str:
    """Choose the first colour for stripes that nothing else in the scene has."""
    taken = {scene.background, *(figure.colour for figure in scene.figures)}
    return next(name for name in ("black", "white", "yellow", "blue") if name not in taken)


def _shade(colour: Array) -> Array:
    """The darker tone of a colour; of black, a lighter one."""
    dark = colour.max() < 0.2  # noqa: PLR2004 black alone
    return colour + (1 - colour) * 0.4 if dark else colour * 0.5


def draw(scene: Scene, width: int, height: int | None = None) -> Image.Image:
    """
    Draw a scene, antialiased.

    From two pixels a detail on (128 pixels) a figure has a thin dark outline and a fine weave;
    at 64 pixels neither can be resolved and the figure is flat.

    Args:
        scene: What to draw.
        width: Pixels across.
        height: Pixels down; the width where it is not given.
    """
    height = height or width
    scale = min(width, height)
    picture = np.empty((height, width, 3))
    picture[:] = np.array(COLOURS[scene.background]) / 255
    if scene.striped:
        picture[in_stripes(height)] = np.array(COLOURS[_stripes(scene)]) / 255
    detail = _resolved(_DETAIL, scale)
    left, top = (width - scale) / 2, (height - scale) / 2
    for figure in scene.figures:
        reach = 1.2 * figure.radius * scale + 2
        column, row = left + figure.x * scale, top + figure.y * scale
        columns = slice(max(0, int(column - reach)), int(column + reach) + 1)
        rows = slice(max(0, int(row - reach)), int(row + reach) + 1)
        patch = picture[rows, columns]
        y = (np.arange(height)[rows, None] + 0.5 - top) / scale
        x = (np.arange(width)[None, columns] + 0.5 - left) / scale
        x, y = np.broadcast_arrays(x, y)
        unit = SHAPES[figure.shape]((x - figure.x) / figure.radius, (y - figure.y) / figure.radius)
        distance = unit * figure.radius
        colour = np.array(COLOURS[figure.colour]) / 255
        if scene.outlined:
            distance = abs(distance + _STROKE / 2) - _STROKE / 2
            tone = np.broadcast_to(colour, patch.shape)
        else:
            weave = (np.floor(x / _DETAIL) + np.floor(y / _DETAIL)) % 2 * 0.3
            rim = np.clip((distance + _DETAIL) * scale + 0.5, 0, 1)
            shaded = np.maximum(weave, rim)[..., None] * detail
            tone = colour + (_shade(colour) - colour) * shaded
        cover = np.clip(0.5 - distance * scale, 0, 1)[..., None]
        patch[:] = patch * (1 - cover) + tone * cover
    return Image.fromarray(np.round(picture * 255).astype(np.uint8), "RGB")
