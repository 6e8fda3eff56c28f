"""What a host asks of a model before it makes a form, a menu or an answer of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.requests.schedulers import SCHEDULERS
from holdfast.engine.requests.sizes import rounded
from holdfast.engine.requests.told import told_path

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.engine.models.model import Model
    from holdfast.states import Mode

_FLOW = "flow-euler"


@dataclass(frozen=True)
class ModelFacts:
    """
    What there is to know of the model in force.

    Attributes:
        name: The last name of its path, or its hub id; never a folder.
        fingerprint: Of all its files, hexadecimal.
        family: Short name; a LoRA file must be of the same.
        size: Width and height that it was trained on, in pixels: a request's that names none.
        multiple: Widths and heights must be multiples of it, in pixels.
        longest_side: The most that a side may have, in pixels; None: nothing bounds it.
        prompt_tokens: That its text encoders read at once, marks of beginning and end included.
        modes: Those that it has a pipeline for.
        schedulers: Names that a request's `scheduler` may have.
        takes_loras: Whether LoRA files fit it at all.
    """

    name: str
    fingerprint: str
    family: str
    size: tuple[int, int]
    multiple: int
    longest_side: int | None
    prompt_tokens: int
    modes: tuple[Mode, ...]
    schedulers: tuple[str, ...]
    takes_loras: bool

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return the size nearest to this one that the model can make, in pixels."""
        step = self.multiple
        wide, high = (max(1, rounded(side / step)) * step for side in (width, height))
        if self.longest_side is not None:
            most = self.longest_side // step * step
            wide, high = min(wide, most), min(high, most)
        return wide, high


def facts_of(model: Model, name: str | Path) -> ModelFacts:
    """
    Return what there is to know of a model.

    Args:
        model: Read from its folder.
        name: That it was asked for by.
    """
    family = model.family
    return ModelFacts(
        name=told_path(name),
        fingerprint=model.folder.fingerprint,
        family=family.name,
        size=model.scale.default,
        multiple=model.scale.multiple,
        longest_side=family.longest_side(model.denoiser, model.scale),
        prompt_tokens=model.scale.tokens,
        modes=tuple(family.pipelines),
        schedulers=family.schedulers
        or tuple(name for name in SCHEDULERS if not name.startswith(_FLOW)),
        takes_loras=family.takes_loras,
    )
