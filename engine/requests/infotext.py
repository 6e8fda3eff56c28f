"""Infotext read: a request from what Holdfast and other programs write, in A1111's words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.kinds import KINDS, kind_of
from holdfast.engine.requests.pictures import read_mask, read_picture, several
from holdfast.engine.requests.regions import FILL_LABELS
from holdfast.engine.requests.schedulers import check_schedule, check_scheduler, with_schedule
from holdfast.engine.requests.sizes import FIT_LABELS
from holdfast.engine.requests.told import public
from holdfast.engine.requests.upscalers import check_upscaler
from holdfast.engine.requests.values import JSON, read_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from holdfast.engine.requests.kinds import Request

OWN = "Holdfast"
"""The name under which infotext holds what A1111's words would not give back."""

_FACT = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST = 3
"""Facts that the last line has, or else it belongs to a prompt; as in A1111."""

_NEGATIVE = "Negative prompt:"
_LORA = re.compile(r"(?P<name>.+)@(?P<weight>[^@\[]+)(?:\[(?P<blocks>.*)\])?", re.DOTALL)
_TOGETHER = ("eta", "schedule", "variation_seed", "variation_strength", "seed")
"""Fields that are refused beside others, by an error that names them."""

_RULED_OUT = {"Schedule type": "Automatic", "Hires sampler": "Use same sampler"}
_BESIDE = frozenset({
    "App", "Batch pos", "Batch size", "Hashes", "Lora hashes", "Model hash", "TI hashes", "TI",
    "VAE hash", "Version", OWN,
})  # fmt: skip
"""What says nothing of how the picture was drawn that other facts do not say."""


@dataclass(frozen=True, slots=True)
class Lost:
    """
    A part of a picture's recipe that the request does not hold.

    Attributes:
        kind: ``"model"``: it is the engine's to have; ``"noise"``: the seed gives other noise
            here; ``"value"``: known, but not in this form; ``"unknown"``: not understood.
        name: As the program calls it.
        value: As it stands in the picture.
    """

    kind: Literal["model", "noise", "value", "unknown"]
    name: str
    value: str

    def __str__(self) -> str:
        """Name and value, and why they are lost."""
        return f"{self.name}: {self.value} ({_WHY[self.kind]})"


_WHY = {
    "model": "it is the engine's to have",
    "noise": "the same seed gives other noise here",
    "value": "not to be had here in this form",
    "unknown": "not understood",
}


@dataclass(frozen=True, slots=True)
class Words:
    """
    Infotext, taken apart.

    Attributes:
        prompt: Before the negative one.
        negative_prompt: From ``Negative prompt:`` at a line's beginning on.
        facts: The last line, by name.
    """

    prompt: str
    negative_prompt: str
    facts: Mapping[str, str]


def read_words(text: str) -> Words:
    """Take infotext apart as A1111 does; what no rule takes belongs to the prompts."""
    *lines, last = text.rstrip("\n").split("\n")
    facts = dict(_facts(last))
    if len(facts) < _FEWEST:
        lines, facts = [*lines, last], {}
    starts = (number for number, line in enumerate(lines) if line.startswith(_NEGATIVE))
    start = next(starts, len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).removeprefix(" ")
    return Words("\n".join(lines[:start]), negative, facts)


def _facts(line: str) -> Iterator[tuple[str, str]]:
    for name, value in _FACT.findall(line):
        if not value.startswith('"'):
            yield name, value.strip()
            continue
        try:
            yield name, str(json.loads(value))
        except ValueError:
            yield name, value


def told_beside(text: str, request: Request) -> str:
    """Return as JSON what of a request (of one image) reading its infotext would not give back."""
    kind = type(request)
    fields = _defaults(kind) | _of(kind, nearest(read_words(text))[0])
    told = public(request)
    other = {name: value for name, value in told.items() if fields[name] != value}
    return json.dumps({"kind": request.kind, **other}, ensure_ascii=False)


def request_from_infotext(text: str, **given: Any) -> tuple[Request, tuple[Lost, ...]]:
    """
    Read the request that infotext tells of.

    Args:
        text: Of Holdfast: the request comes back equal, with paths as names. Of A1111, Forge,
            SD.Next and others that write as they do: the nearest request.
        given: Fields in place of those in the text, for example ``image``: infotext holds no
            picture.

    Returns:
        The request, and what of the text it does not hold; of Holdfast's own there is nothing.

    Raises:
        InvalidRequest: The text tells of no request, or a picture is needed and is not given, or
            is another one.
    """
    words = read_words(text)
    if not words.facts:
        msg = "The text does not tell how an image was made: its last line names no settings."
        raise InvalidRequest(msg)
    fields, lost = nearest(words)
    if OWN not in words.facts:
        return nearest_request(fields, given, lost)
    try:
        own = json.loads(words.facts[OWN])
    except ValueError as error:
        msg = f"The text was changed: what stands behind {OWN!r} in it is no JSON."
        raise InvalidRequest(msg) from error
    if not isinstance(own, dict):
        msg = f"The text was changed: what stands behind {OWN!r} in it is no JSON object."
        raise InvalidRequest(msg)
    return request_from_fields({**_of(kind_of(own), fields), **own}, given), ()


def nearest_request(
    fields: Mapping[str, Any], given: Mapping[str, Any], lost: Sequence[Lost]
) -> tuple[Request, tuple[Lost, ...]]:
    """
    Return the request of another program's fields, without those that cannot be had here.

    Args:
        fields: Of the request.
        given: In place of these.
        lost: What is known to be lost.

    Returns:
        The request, and `lost` with what else had to be left out.

    Raises:
        InvalidRequest: A picture is needed and is not given, or what was given is wrong.
    """
    kept, missing = dict(fields), list(lost)
    while True:
        try:
            return request_from_fields(kept, given), tuple(missing)
        except InvalidRequest as error:
            refused = [name for name in _blamed(error) if name in kept and name not in given]
            if not refused:
                raise
            missing += [Lost("value", name, str(kept.pop(name))) for name in refused]


def _blamed(error: InvalidRequest) -> Iterable[str]:
    """Return the fields that are at fault; where several are together, one that may be left out."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return ()
    places = [str(each["loc"][0]) for each in cause.errors() if each["loc"]]
    said = " ".join(each["msg"] for each in cause.errors())
    return places or [name for name in _TOGETHER if re.search(rf"\b{name}\b", said)]


def request_from_fields(fields: Mapping[str, Any], given: Mapping[str, Any]) -> Request:
    """
    Return the request that `public` told, with the pictures of which that has digests given anew.

    Raises:
        InvalidRequest: A picture is needed and is not given, is another one, or a field is wrong.
    """
    kind = kind_of(fields)
    asked = {name: found for name, value in fields.items() if (found := list(_pictures(value)))}
    needed = ["image"] if kind in (KINDS["img2img"], KINDS["inpaint"]) else []
    for name in (*asked, *(each for each in needed if each not in fields)):
        if name not in given:
            first = asked.get(name, [{}])[0]
            size = f" of {first.get('width')}x{first.get('height')}" if first else ""
            msg = (
                f"The image began with a picture{size}, which is not in the file: give it as "
                f"{name}=."
            )
            raise InvalidRequest(msg)
    taken = {name: _taken(name, value) for name, value in given.items()}
    with read_as(JSON):
        request = kind(**{**fields, **taken})
    for name, pictures in asked.items():
        now = _pictures(public(getattr(request, name)))
        if [each["digest"] for each in now] != [each["digest"] for each in pictures]:
            sizes = ", ".join(f"{each.get('width')}x{each.get('height')}" for each in pictures)
            msg = (
                f"The image began with a picture of {sizes}, but the {name} that was given is "
                "another picture."
            )
            raise InvalidRequest(msg)
    return request


def _taken(name: str, value: Any) -> Any:
    """Read the pictures that a host gave, which may be files, unlike those that a text names."""
    readers: dict[str, Callable[[Any], Any]] = {
        "image": read_picture,
        "mask": read_mask,
        "first_pass": lambda given: tuple(read_picture(each) for each in several(given)),
        "masks": lambda given: tuple(read_mask(each) for each in several(given)),
    }
    if name not in readers or value is None:
        return value
    try:
        return readers[name](value)
    except ValueError as error:
        msg = f"The {name} that was given cannot be read: {error}."
        raise InvalidRequest(msg) from error


def _pictures(value: Any) -> Iterator[dict[str, Any]]:
    """Yield what `public` says of each picture in a field."""
    if isinstance(value, dict) and "digest" in value:
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _pictures(each)


def _defaults(kind: type[Request]) -> dict[str, Any]:
    fields = kind.model_fields
    return {n: None if each.is_required() else public(each.default) for n, each in fields.items()}


def _of(kind: type[Request], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in kind.model_fields}


def nearest(words: Words) -> tuple[dict[str, Any], tuple[Lost, ...]]:
    """Return the fields that A1111's words stand for, and what has no place in them."""
    fields: dict[str, Any] = {
        "kind": _kind(words.facts),
        "prompt": words.prompt,
        "negative_prompt": words.negative_prompt,
    }
    lost: list[Lost] = []
    for name, value in words.facts.items():
        if name in _BESIDE or value == _RULED_OUT.get(name):
            continue
        if name in {"Model", "VAE", "Hires checkpoint"}:
            lost.append(Lost("model", name, value))
        elif name not in _READERS:
            lost.append(Lost("unknown", name, value))
        else:
            try:
                fields |= _READERS[name](value)
            except (ValueError, LookupError):
                lost.append(Lost("value", name, value))
    _join_schedule(fields, words, lost)
    if words.facts.get("RNG", "GPU") != "CPU" and OWN not in words.facts and "seed" in fields:
        lost.append(Lost("noise", "RNG", words.facts.get("RNG", "GPU")))
    return fields, tuple(lost)


def _join_schedule(fields: dict[str, Any], words: Words, lost: list[Lost]) -> None:
    """Leave out a schedule that the sampler cannot run here."""
    try:
        if "scheduler" in fields:
            with_schedule(fields["scheduler"], fields.get("schedule"))
    except ValueError:
        del fields["schedule"]
        lost.append(Lost("value", "Schedule type", words.facts["Schedule type"]))


def _kind(facts: Mapping[str, str]) -> str:
    if any(name.startswith("Hires ") for name in facts):
        return "hires"
    if any(name in facts for name in ("Mask blur", "Masked content", "Inpaint area", "Mask mode")):
        return "inpaint"
    return "img2img" if "Denoising strength" in facts else "txt2img"


def _number(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda value: {field: float(value)}


def _whole(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda value: {field: int(value)}


def _text(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda value: {field: value}


def _sides(*fields: str) -> Callable[[str], dict[str, Any]]:
    def read(value: str) -> dict[str, Any]:
        width, height = map(int, value.split("x"))
        return dict(zip(fields, (width, height), strict=True))

    return read


def _label(field: str, labels: Mapping[Any, str]) -> Callable[[str], dict[str, Any]]:
    keys = {label: key for key, label in labels.items()}
    return lambda value: {field: keys[value]}


def _loras(field: str) -> Callable[[str], dict[str, Any]]:
    def read(value: str) -> dict[str, Any]:
        return {field: [] if value == "none" else [_lora(each) for each in value.split("; ")]}

    return read


def _lora(text: str) -> dict[str, Any]:
    found = _LORA.fullmatch(text)
    if found is None:
        raise ValueError(text)
    pairs = [each.rpartition("=") for each in (found["blocks"] or "").split(", ") if each]
    return {
        "path": str(PurePath(found["name"] + ".safetensors")),
        "weight": float(found["weight"]),
        "blocks": [[pattern, float(factor)] for pattern, _, factor in pairs],
    }


_READERS: Mapping[str, Callable[[str], dict[str, Any]]] = MappingProxyType({
    "Steps": _whole("steps"),
    "Sampler": lambda value: {"scheduler": check_scheduler(value)},
    "Schedule type": lambda value: {"schedule": check_schedule(value)},
    "CFG scale": _number("guidance"),
    "Seed": _whole("seed"),
    "Size": _sides("width", "height"),
    "Clip skip": _whole("clip_skip"),
    "CFG Rescale phi": _number("guidance_rescale"),
    "Eta": _number("eta"),
    "Eta DDIM": _number("eta"),
    "Speed": _text("speed"),
    "Variation seed": _whole("variation_seed"),
    "Variation seed strength": _number("variation_strength"),
    "Seed resize from": lambda value: {"seed_resize": [*map(int, value.split("x"))]},
    "Denoising strength": _number("strength"),
    "Resize mode": _label("fit", FIT_LABELS),
    "Mask blur": _number("mask_blur"),
    "Mask mode": lambda value: {"mask_invert": {"Inpaint not masked": True}[value]},
    "Inpaint area": _label("area", {"masked": "Only masked", "whole": "Whole picture"}),
    "Masked area padding": _whole("padding"),
    "Masked content": _label("fill", FILL_LABELS),
    "Outpaint": lambda value: {"outpaint": [*map(int, value.split(" "))]},
    "Hires upscale": _number("scale"),
    "Hires resize": _sides("hires_width", "hires_height"),
    "Hires resize mode": _label("fit", FIT_LABELS),
    "Hires steps": lambda value: {"hires_steps": int(value) or None},
    "Hires upscaler": lambda value: {"upscaler": check_upscaler(value)},
    "Hires prompt": _text("hires_prompt"),
    "Hires negative prompt": _text("hires_negative_prompt"),
    "Hires sampler": lambda value: {"hires_scheduler": check_scheduler(value)},
    "Hires CFG Scale": _number("hires_guidance"),
    "Hires seed": _whole("hires_seed"),
    "Hires speed": _text("hires_speed"),
    "Lora": _loras("lora"),
    "Hires lora": _loras("hires_lora"),
    "RNG": lambda _: {},
})  # fmt: skip
"""What each of A1111's facts is here; a reader raises where the value has no place."""
