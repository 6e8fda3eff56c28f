"""Requests as strangers send them: no file is opened for them, and what they cost is bounded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.kinds import kind_of
from holdfast.engine.requests.sizes import following
from holdfast.engine.requests.values import Reading, Value, fields_of_json, read_as

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.engine.requests.kinds import Request

_UNTOLD = 1024
"""Side in pixels that is reckoned where a request leaves it to the model."""

_STEPS = 20
"""That a detail runs where nothing says how many."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_Count = Annotated[int, Field(ge=1)]


class Bounds(Value):
    """
    How much one request of a stranger may ask for.

    Attributes:
        text: Characters of its JSON.
        prompt: Characters of each prompt.
        picture: Pixels of a picture that it brings along.
        pixels: Of each image that a pass makes.
        schedule: Steps of a pass, over its strength: how long the whole schedule is.
        work: Pixels times steps times images, over all passes.
    """

    text: _Count = 32 * 1024**2
    prompt: _Count = 10_000
    picture: _Count = 4096 * 4096
    pixels: _Count = 2048 * 2048
    schedule: _Count = 1000
    work: _Count = 256 * 1024**2


def request_from_untrusted_json(text: str | bytes, bounds: Bounds | None = None) -> Request:
    """
    Read a request that a stranger sent.

    Pictures are taken by value alone, as PNG, JPEG or WebP; no path is opened or told of. LoRA
    files and models are the host's to choose: a request that names one is refused.

    Args:
        text: JSON, as `Value.to_json` of a request writes it; fields that are left out are unset.
        bounds: How much it may ask for. None: those of `Bounds`.

    Raises:
        InvalidRequest: The text is not JSON or not a request, or asks for too much.
    """
    bounds = bounds or Bounds()
    if isinstance(text, (str, bytes, bytearray)):
        _bounded("A request's JSON", len(text), bounds.text, "characters")
    fields = fields_of_json(text, "A request")
    _refuse_files(fields)
    with read_as(Reading(files=False, formats=_FORMATS, pixels=bounds.picture)):
        request = kind_of(fields)(**fields)
    for value in (request, *getattr(request, "detail", ())):
        for name, given in value:
            if isinstance(given, str):
                _bounded(name, len(given), bounds.prompt, "characters")
    # Each prompt that AND composes a picture of is a denoiser's work of its own.
    composed = 1 + len(re.findall(r"\bAND\b", _prompts(request)))
    work = 0
    for (width, height), steps, strength in _passes(request):
        _bounded("An image", width * height, bounds.pixels, "pixels")
        _bounded("A schedule (steps / strength)", int(steps / strength), bounds.schedule, "steps")
        work += width * height * steps * request.batch * composed
    _bounded("A request's pixels x steps x images", work, bounds.work, "in all")
    return request


def _passes(request: Request) -> Iterator[tuple[tuple[int, int], int, float]]:
    """Yield the size, steps and strength of each pass; a side that is left open counts as 1024."""
    if isinstance(request, Detail):
        yield from _regions(request, request.steps or _STEPS)
        return
    size = (request.width or _UNTOLD, request.height or _UNTOLD)
    if isinstance(request, Img2Img):
        yield request.size, request.steps, request.strength
    elif isinstance(request, Inpaint):
        if request.area == "whole":
            size = following(request.size, request.width, request.height)
        yield request.size, 0, 1.0  # what it is pasted into
        yield size, request.steps, request.strength
    elif isinstance(request, Hires):
        size = request.first_size(size)
        if request.first_pass is None:
            yield size, request.steps, 1.0 if request.image is None else request.first_strength
        yield request.target(*size), request.hires_steps or request.steps, request.strength
    else:
        yield size, request.steps, 1.0
    for each in request.detail:
        yield from _regions(each, request.steps)


def _regions(detail: Detail, steps: int) -> Iterator[tuple[tuple[int, int], int, float]]:
    size = (detail.width or _UNTOLD, detail.height or _UNTOLD)
    for _ in range(len(detail.boxes) + len(detail.masks)):
        yield size, detail.steps or steps, detail.strength


def _prompts(request: Request) -> str:
    second = (request.hires_prompt or "") if isinstance(request, Hires) else ""
    details = () if isinstance(request, Detail) else request.detail
    return " ".join([request.prompt, second, *(each.prompt for each in details)])


def _bounded(what: str, value: int, most: int, unit: str) -> None:
    if value > most:
        msg = f"{what} may have {most} {unit}, but this has {value}: ask for less."
        raise InvalidRequest(msg)


def _refuse_files(fields: dict[str, Any]) -> None:
    """Refuse what names files of the host: LoRAs and models, of the request and of its parts."""
    details = fields.get("detail") or ()
    parts = details if isinstance(details, list) else [details]
    for part in (fields, *(each for each in parts if isinstance(each, dict))):
        named = sorted(name for name in part if ("lora" in name or "model" in name) and part[name])
        if named:
            msg = (
                "A request from outside may not name LoRA files or models: leave "
                f"{', '.join(named)} out."
            )
            raise InvalidRequest(msg)
