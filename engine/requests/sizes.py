"""From one size to another: what follows from the aspect, and what is cut or added."""

from __future__ import annotations

import math
from typing import Literal

Fit = Literal["crop", "fill", "stretch"]
"""What becomes of a picture whose aspect is not the target's."""

FIT_LABELS = {"crop": "Crop and resize", "fill": "Resize and fill", "stretch": "Just resize"}
"""A1111's words for each."""


def following(size: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
    """
    Return the (width, height) asked for; where one is None, it follows the aspect of `size`.

    Rounded half up. Where both are None, that is `size`.
    """
    if width is None and height is None:
        return size
    if width is None:
        return rounded(size[0] * (height or 0) / size[1]), height or 0
    return width, rounded(size[1] * width / size[0]) if height is None else height


def scaled(size: tuple[int, int], target: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """
    Return the size that a picture of `size` is scaled to on its way to `target`.

    ``"crop"``: it covers the target, and what sticks out is cut off. ``"fill"``: it lies within,
    and its edges are drawn out over the rest. ``"stretch"``: it is the target.
    """
    if fit == "stretch":
        return target
    factors = (target[0] / size[0], target[1] / size[1])
    factor = max(factors) if fit == "crop" else min(factors)
    width, height = (max(1, rounded(side * factor)) for side in size)
    return (target[0], height) if factor == factors[0] else (width, target[1])


def rounded(value: float) -> int:
    """Round half up."""
    return math.floor(value + 0.5)
