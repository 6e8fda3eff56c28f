"""Which files hold the weights of a part of a diffusers model: one rule, here and on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NAMES = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)"
    r"(?:\.(?P<early>[\w-]+?))?(?:-\d+-of-(?P<shards>\d+))?(?:\.(?P<late>[\w-]+?))?"
    r"\.(?P<kind>safetensors|bin)"
)
_ORDER = (("safetensors", ""), ("safetensors", "fp16"), ("bin", ""), ("bin", "fp16"))


@dataclass(frozen=True)
class Choice:
    """
    The files chosen for one part.

    Attributes:
        files: Names in the part's folder, all shards of one set; empty where there are none.
        variant: ``"fp16"`` where that stands in for a part without a suffix; None else.
        instead: What is there otherwise, in words; empty where nothing is.
    """

    files: tuple[str, ...]
    variant: str | None
    instead: str


def choose(names: Iterable[str], *, pickles: bool) -> Choice:
    """
    Choose a part's weights: safetensors before pickles, no suffix before float16.

    Args:
        names: Of the files in the part's folder.
        pickles: Whether ``.bin`` files may be taken.
    """
    sets: dict[tuple[str, str, int], list[str]] = {}
    for name in sorted(names):
        match = _NAMES.fullmatch(name)
        if match:
            variant = match["early"] or match["late"] or ""
            shards = int(match["shards"] or 1)
            sets.setdefault((match["kind"], variant, shards), []).append(name)
    for kind, variant in _ORDER:
        for shards, files in sorted((s[2], f) for s, f in sets.items() if s[:2] == (kind, variant)):
            if len(files) == shards and (pickles or kind == "safetensors"):
                return Choice(tuple(files), variant or None, "")
    return Choice((), None, ", ".join(_told(*key, len(files)) for key, files in sets.items()))


def _told(kind: str, variant: str, shards: int, files: int) -> str:
    what = f".{variant}.{kind}" if variant else f".{kind}"
    return what if files == shards else f"{files} of the {shards} shards of {what}"


def missing_weights(where: str, instead: str) -> str:
    """Return the text of the error for a part of which `choose` found nothing."""
    if not instead:
        return f"{where} holds no weights (.safetensors or .bin): it is incomplete."
    return (
        f"{where} holds no weights that Holdfast takes, but {instead}. It takes .safetensors or "
        ".fp16.safetensors with all their shards, and pickles (.bin) from a local folder only. "
        "Complete, convert or rename them."
    )
