"""What a picture tells of how it was made: Holdfast's all of it, others' as near as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.infotext import (
    Lost,
    nearest_request,
    read_words,
    request_from_fields,
    request_from_infotext,
)
from holdfast.engine.requests.schedulers import check_schedule, check_scheduler
from holdfast.engine.requests.values import locate
from holdfast.engine.results.saving import opened, read_infotext, read_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from holdfast.engine.requests.kinds import Request


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    How a picture was made.

    Attributes:
        request: Makes it again, or the nearest to it that can be asked for here.
        lost: What of the picture's recipe the request does not hold; of Holdfast's the engine's
            own LoRAs alone.
        program: That wrote it: ``"Holdfast"``, ``"A1111"`` (and what writes as that does),
            ``"ComfyUI"``, ``"InvokeAI"``, ``"Fooocus"``, ``"NovelAI"``.
        fingerprint: Of the model, as `Engine.model_facts` has it; empty where it is not told.
    """

    request: Request
    lost: tuple[Lost, ...]
    program: str
    fingerprint: str = ""


def recipe_from_image(file: str | Path, **given: Any) -> Recipe:
    """
    Read how a picture was made, whichever program made it.

    Args:
        file: A PNG, JPEG, WEBP or AVIF. ComfyUI's, InvokeAI's, Fooocus's and NovelAI's need
            ``pip install 'holdfast[recipes]'``.
        given: Fields in place of those in the file: ``image``, where the request began with a
            picture, and any other.

    Raises:
        InvalidRequest: The file tells of no request, or a picture is needed and is not given, or
            is another one.
    """
    with opened(file) as image:
        image.load()  # what a PNG tells may stand behind its pixels
        private, text, size = read_private(image), read_infotext(image), image.size
    if private is not None and isinstance(private["request"], dict):
        return _own(private, given)
    facts = read_words(text).facts if text and not text.startswith("{") else {}
    if text and facts:
        request, lost = request_from_infotext(text, **given)
        version = facts.get("Version", "")
        return Recipe(request, lost, "Holdfast" if version.startswith("holdfast ") else "A1111")
    return _foreign(file, size, given)


def _own(told: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
    """Read what Holdfast wrote for itself."""
    request = request_from_fields(told["request"], given)
    loras = told.get("loras")
    engines = loras if isinstance(loras, list) and request.lora is None else []
    lost = (Lost("model", "lora", str(each)) for each in engines)
    return Recipe(request, tuple(lost), "Holdfast", str(told.get("model_fingerprint", "")))


def _foreign(file: str | Path, size: tuple[int, int], given: Mapping[str, Any]) -> Recipe:
    """Read what programs write in forms of their own."""
    try:
        import sd_parsers
    except ImportError as error:
        msg = (
            f"{file} does not tell in Holdfast's or A1111's words how it was made. For those of "
            "ComfyUI, InvokeAI, Fooocus and NovelAI: pip install 'holdfast[recipes]'."
        )
        raise InvalidRequest(msg) from error
    try:
        found = sd_parsers.ParserManager().parse(locate(file))
    except Exception as error:  # a library's, on a stranger's text
        msg = f"{file} tells of its making in a form that cannot be read ({type(error).__name__})."
        raise InvalidRequest(msg) from error
    if found is None or not found.samplers:
        msg = f"{file} does not tell how it was made: it has no metadata of a program known here."
        raise InvalidRequest(msg)
    first, *others = found.samplers
    fields: dict[str, Any] = {
        "kind": "txt2img",
        "prompt": ", ".join(map(str, first.prompts)),
        "negative_prompt": ", ".join(map(str, first.negative_prompts)),
        "width": size[0],
        "height": size[1],
    }
    lost = [Lost("noise", "seed", str(first.parameters.get("seed")))]
    beside = {name: value for name, value in found.metadata.items() if name in _READERS}
    for name, value in {**beside, "sampler": first.name, **first.parameters}.items():
        lost += _read(name, value, fields)
    if float(fields.pop("denoise", 1)) < 1:
        fields |= {"kind": "img2img", "strength": first.parameters["denoise"]}
    if first.model is not None:
        lost.append(Lost("model", "model", str(first.model)))
    lost += [
        Lost("unknown", f"sampler {number}", f"{each.name} {_short(each.parameters)}")
        for number, each in enumerate(others, start=2)
    ]
    lost += [
        Lost("unknown", str(name), _short(value))
        for name, value in found.metadata.items()
        if name not in _BESIDE and name not in beside
    ]
    request, missing = nearest_request(fields, given, lost)
    return Recipe(request, missing, found.generator.value)


_BESIDE = frozenset({
    "EmptyLatentImage", "SaveImage", "app_version", "generation_mode", "height", "width",
})  # fmt: skip
"""What says nothing that the picture itself or other facts do not say."""


def _read(name: str, value: Any, fields: dict[str, Any]) -> Iterator[Lost]:
    """Put one parameter into the field that it stands for; yield it where it has none."""
    if name not in _READERS:
        yield Lost("unknown", name, _short(value))
        return
    field, read = _READERS[name]
    try:
        fields[field] = read(value)
    except (ValueError, TypeError, OverflowError):
        yield Lost("value", name, _short(value))


_READERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "sampler": ("scheduler", lambda value: check_scheduler(str(value))),
    "scheduler": ("schedule", lambda value: _schedule(str(value))),
    "steps": ("steps", int),
    "seed": ("seed", int),
    "cfg_scale": ("guidance", float),
    "denoise": ("denoise", float),
}


def _schedule(name: str) -> str | None:
    """Return a schedule; None for what other programs call a sampler's own."""
    return None if name.lower() in ("normal", "automatic") else check_schedule(name)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


_LONGEST = 200
