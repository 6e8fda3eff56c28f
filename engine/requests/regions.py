"""How the parts of a picture are named that are redrawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

if TYPE_CHECKING:
    from PIL import Image

Fill = Literal["original", "fill", "noise", "nothing"]
"""What stands where something is redrawn before it is; `FILL_LABELS` has A1111's words."""

FILL_LABELS: Mapping[Fill, str] = MappingProxyType({
    "original": "original", "fill": "fill", "noise": "latent noise", "nothing": "latent nothing",
})  # fmt: skip

HALF = 128
"""The least value of a mask at which it selects."""

Blur = Annotated[float, Field(ge=0, le=256)]
Padding = Annotated[int, Field(ge=0, le=4096)]
Box = tuple[int, int, int, int]


def _sides(value: object) -> object:
    """Take one number for all four sides, and a mapping for some of them."""
    if isinstance(value, int):
        return (value,) * 4
    if isinstance(value, Mapping):
        unknown = ", ".join(map(str, value.keys() - set(_SIDES)))
        if unknown:
            msg = f"there is no side {unknown}; the sides are {', '.join(_SIDES)}"
            raise ValueError(msg)
        return tuple(value.get(side, 0) for side in _SIDES)
    return value


_SIDES = ("left", "top", "right", "bottom")
Sides = Annotated[
    tuple[Padding, Padding, Padding, Padding],
    BeforeValidator(_sides, json_schema_input_type=int | Mapping[str, int] | Sequence[int]),
]


def is_empty(mask: Image.Image) -> bool:
    """Return whether a mask (L) selects no pixel."""
    return not any(mask.histogram()[HALF:])
