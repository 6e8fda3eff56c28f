"""What an image tells of how it was made, in A1111's words: infotext."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.regions import FILL_LABELS
from holdfast.engine.requests.schedulers import SCHEDULERS
from holdfast.engine.requests.sizes import FIT_LABELS, scaled
from holdfast.engine.requests.told import told_path
from holdfast.engine.requests.upscalers import UPSCALERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.requests.txt2img import Txt2Img

_ENDINGS = {2: "nd", 3: "rd"}
_QUOTED = (",", "\n", ":", '"')


@dataclass(frozen=True)
class Provenance:
    """
    What infotext says of the engine.

    Attributes:
        model: The model's name.
        model_hash: Start of its fingerprint.
        loras: Name and weight of each of the engine's LoRAs.
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
    whole = [each for each in passes if each.region is None] or passes[:1]
    first, last = whole[0], whole[-1]
    size = (first.width, first.height)
    if isinstance(request, Hires):
        size = request.first_size(size)
    facts: dict[str, object] = {
        "Steps": first.steps,
        "Sampler": _sampler(first.sampler),
        "CFG scale": f"{first.guidance:g}",
        "Seed": first.seeds[index],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": provenance.model_hash,
        "Model": provenance.model,
    }
    if not isinstance(request, Detail):
        facts |= _recipe_facts(request)
    if last.strength is not None:
        facts["Denoising strength"] = f"{last.strength:g}"
    if isinstance(request, Img2Img) and _reshaped(request.image.size, first):
        facts["Resize mode"] = FIT_LABELS[request.fit]
    if isinstance(request, Inpaint):
        facts |= _inpaint_facts(request)
    if isinstance(request, Hires):
        facts |= _hires_facts(request, first, last, index, size)
    details = (request,) if isinstance(request, Detail) else request.detail
    for number, detail in enumerate(details):
        facts |= _detail_facts(detail, number)
    loras = [_loras(each, provenance) for each in whole]
    if loras[0]:
        facts["Lora"] = "; ".join(loras[0])
    if loras[-1] != loras[0]:
        facts["Hires lora"] = "; ".join(loras[-1]) or "none"
    facts["Version"] = f"holdfast {provenance.version}"
    listed = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())
    negative = f"\nNegative prompt: {first.negative_prompt}" if first.negative_prompt else ""
    return f"{first.prompt}{negative}\n{listed}"


def _recipe_facts(request: Txt2Img | Img2Img | Inpaint | Hires) -> dict[str, object]:
    """Return what departs from the usual recipe, by A1111's names."""
    facts: dict[str, object] = {}
    if request.clip_skip is not None:
        facts["Clip skip"] = request.clip_skip
    if request.guidance_rescale:
        facts["CFG Rescale phi"] = f"{request.guidance_rescale:g}"
    if request.eta is not None:
        facts["Eta"] = f"{request.eta:g}"
    if request.variation_strength:
        facts["Variation seed"] = request.variation_seed
        facts["Variation seed strength"] = f"{request.variation_strength:g}"
    if request.seed_resize is not None:
        facts["Seed resize from"] = "x".join(map(str, request.seed_resize))
    if request.speed != "exact":
        facts["Speed"] = request.speed
    return facts


def _inpaint_facts(request: Inpaint) -> dict[str, object]:
    facts: dict[str, object] = {"Mask blur": f"{request.mask_blur:g}"}
    if request.mask_invert:
        facts["Mask mode"] = "Inpaint not masked"
    if request.area == "masked":
        facts |= {"Inpaint area": "Only masked", "Masked area padding": request.padding}
    if request.fill != "original":
        facts["Masked content"] = FILL_LABELS[request.fill]
    if any(request.outpaint):
        facts["Outpaint"] = " ".join(map(str, request.outpaint))
    return facts


def _detail_facts(detail: Detail, number: int) -> dict[str, object]:
    """Return what ADetailer tells of one of its passes; those after the first are numbered."""
    told = {
        "prompt": detail.prompt,
        "negative prompt": detail.negative_prompt,
        "mask only top k largest": detail.largest,
        "dilate erode": detail.dilation,
        "mask blur": f"{detail.mask_blur:g}",
        "denoising strength": f"{detail.strength:g}",
        "inpaint only masked": True,
        "inpaint padding": detail.padding,
        "steps": detail.steps,
        "CFG scale": None if detail.guidance is None else f"{detail.guidance:g}",
        "speed": detail.speed,
        "sampler": None if detail.scheduler is None else _sampler(detail.scheduler),
    }
    suffix = "" if number == 0 else f" {number + 1}{_ENDINGS.get(number + 1, 'th')}"
    return {
        f"ADetailer {name}{suffix}": value
        for name, value in told.items()
        if value not in (None, "")
    }


def _hires_facts(
    request: Hires, first: PassSpec, last: PassSpec, index: int, size: tuple[int, int]
) -> dict[str, object]:
    facts: dict[str, object] = {}
    if request.hires_width is None and request.hires_height is None:
        facts["Hires upscale"] = f"{last.width / size[0]:g}"
    else:
        facts["Hires resize"] = f"{last.width}x{last.height}"
        # To its readers, `Hires resize` means that another aspect was cropped.
        if request.fit != "crop" and _reshaped(size, last):
            facts["Hires resize mode"] = FIT_LABELS[request.fit]
    facts["Hires steps"] = last.steps
    facts["Hires upscaler"] = UPSCALERS[request.upscaler].label
    if request.hires_model is not None:
        facts["Hires checkpoint"] = told_path(request.hires_model)
    changed = (
        ("Hires prompt", first.prompt, last.prompt),
        ("Hires negative prompt", first.negative_prompt, last.negative_prompt),
        ("Hires sampler", _sampler(first.sampler), _sampler(last.sampler)),
        ("Hires CFG Scale", f"{first.guidance:g}", f"{last.guidance:g}"),
        ("Hires seed", first.seeds[index], last.seeds[index]),
        ("Hires speed", request.speed, last.speed),
    )
    return facts | {name: after for name, before, after in changed if before != after}


def _reshaped(size: tuple[int, int], to: PassSpec) -> bool:
    """Whether a picture of `size` has another aspect than a pass, by a pixel or more."""
    return scaled(size, (to.width, to.height), "crop") != (to.width, to.height)


def _loras(spec: PassSpec, provenance: Provenance) -> tuple[str, ...]:
    if spec.loras is None:
        return provenance.loras
    return tuple(dict.fromkeys(map(str, spec.loras)))


def _sampler(name: str) -> str:
    return SCHEDULERS[name].label if name in SCHEDULERS else name


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in _QUOTED) else value
