"""A LoRA file as a request or a configuration names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from holdfast.engine.requests.values import Location, Value, exact

if TYPE_CHECKING:
    from pathlib import Path


def _pairs(value: object) -> object:
    return tuple(value.items()) if isinstance(value, Mapping) else value


Weight = Annotated[float, Field(ge=-10, le=10)]
Pattern = Annotated[str, Field(pattern=r"^[a-z_0-9]+\..+$")]
Blocks = Annotated[
    tuple[tuple[Pattern, Weight], ...],
    BeforeValidator(_pairs, json_schema_input_type=dict[str, Weight]),
    PlainSerializer(dict, return_type=dict[str, float]),
]
"""Patterns of layers, each with a factor; given as a mapping, kept in its order."""


class Lora(Value):
    """
    One LoRA file and how strongly it works.

    Attributes:
        path: A ``.safetensors`` file.
        weight: Factor on its change of the weights, -10 to 10; negative ones work against it.
        blocks: Further factors for some of its layers, by shell-style patterns of the component
            and the layer as diffusers calls it: ``{"unet.up_blocks.*": 0.5, "text_encoder.*": 0}``.
            The first pattern that matches a layer decides; others have 1.
    """

    path: Location
    weight: Weight = 1.0
    blocks: Blocks = ()

    @field_validator("path")
    @classmethod
    def _no_pickle(cls, path: Path) -> Path:
        if path.suffix.lower() != ".safetensors":
            msg = (
                "a LoRA is a .safetensors file; others are pickles, which can run code when they "
                "are read: convert it"
            )
            raise ValueError(msg)
        return path

    def __init__(
        self,
        path: str | Path,
        weight: float = 1.0,
        blocks: Mapping[str, float] | tuple[tuple[str, float], ...] = (),
    ) -> None:
        super().__init__(path=path, weight=weight, blocks=blocks)

    @property
    def name(self) -> str:
        """The file's name without its ending, as logs and infotext show it."""
        return self.path.stem

    def __str__(self) -> str:
        """Name and factors, as infotext shows them."""
        blocks = ", ".join(f"{pattern}={exact(factor)}" for pattern, factor in self.blocks)
        return f"{self.name}@{exact(self.weight)}" + (f"[{blocks}]" if blocks else "")
