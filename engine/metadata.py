"""What a PNG tells of how it was made: A1111's infotext, and a private chunk with everything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

from holdfast.engine.requests import Hires, Img2Img
from holdfast.engine.schedulers import SCHEDULERS
from holdfast.engine.upscale import UPSCALERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from holdfast.engine.passes import PassSpec
    from holdfast.engine.requests import Request

INFOTEXT = "parameters"
"""The text chunk that A1111 and those that follow it read."""

PRIVATE = "holdfast"
"""The text chunk with the whole request, as JSON."""

_QUOTED = (",", "\n", ":", '"')


@dataclass(frozen=True)
class Provenance:
    """
    What infotext says of the engine.

    Attributes:
        model: The model's name.
        model_hash: Start of its fingerprint.
        loras: Name and weight of each LoRA in force.
        version: Holdfast's.
    """

    model: str
    model_hash: str
    loras: tuple[str, ...]
    version: str


def infotext(
    request: Request, passes: Sequence[PassSpec], index: int, provenance: Provenance
) -> str:
    """
    Return the generation parameters of image `index`, as A1111 writes and reads them.

    Args:
        request: What was asked for.
        passes: As they were run.
        index: Of the image in its batch.
        provenance: What made it.
    """
    first, last = passes[0], passes[-1]
    facts: dict[str, object] = {
        "Steps": first.steps,
        "Sampler": _sampler(first.scheduler),
        "CFG scale": f"{first.guidance:g}",
        "Seed": first.seeds[index],
        "Size": f"{first.width}x{first.height}",
        "Model hash": provenance.model_hash,
        "Model": provenance.model,
    }
    if isinstance(request, (Img2Img, Hires)):
        facts["Denoising strength"] = f"{last.strength:g}"
    if isinstance(request, Hires):
        facts |= _hires_facts(request, first, last, index)
    if provenance.loras:
        facts["Lora"] = "; ".join(provenance.loras)
    facts["Version"] = f"holdfast {provenance.version}"
    listed = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())
    negative = f"\nNegative prompt: {first.negative_prompt}" if first.negative_prompt else ""
    return f"{first.prompt}{negative}\n{listed}"


def _hires_facts(request: Hires, first: PassSpec, last: PassSpec, index: int) -> dict[str, object]:
    facts: dict[str, object] = {}
    if request.hires_width is None and request.hires_height is None:
        facts["Hires upscale"] = f"{last.width / first.width:g}"
    else:
        facts["Hires resize"] = f"{last.width}x{last.height}"
    facts["Hires steps"] = last.steps
    facts["Hires upscaler"] = UPSCALERS[request.upscaler].label
    changed = (
        ("Hires prompt", first.prompt, last.prompt),
        ("Hires negative prompt", first.negative_prompt, last.negative_prompt),
        ("Hires sampler", _sampler(first.scheduler), _sampler(last.scheduler)),
        ("Hires CFG Scale", f"{first.guidance:g}", f"{last.guidance:g}"),
        ("Hires seed", first.seeds[index], last.seeds[index]),
    )
    return facts | {name: after for name, before, after in changed if before != after}


def png_chunks(text: str, private: dict[str, object]) -> PngInfo:
    """Return both text chunks of a PNG."""
    chunks = PngInfo()
    chunks.add_itxt(INFOTEXT, text)
    chunks.add_itxt(PRIVATE, json.dumps(private, ensure_ascii=False))
    return chunks


def read_private(image: Image.Image) -> dict[str, object] | None:
    """Return what `png_chunks` hid in a PNG; None where it has no such chunk."""
    text = getattr(image, "text", {}).get(PRIVATE)
    return None if text is None else json.loads(text)


def _sampler(name: str | None) -> str:
    return "Model default" if name is None else SCHEDULERS[name].label


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in _QUOTED) else value
