"""Requests, settings and the machine as the log tells them: no prompt, no image, paths as names."""

from __future__ import annotations

import os
import platform
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from PIL import Image

from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.lora import Lora
from holdfast.engine.requests.pictures import picture_digest
from holdfast.engine.requests.values import Value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.engine.requests.kinds import Request

_LOCATIONS = ("model", "vae", "cache_dir", "log_file", "flight_recorder", "hires_model")
_NOT_TOLD = ("prompt", "negative_prompt", "hires_prompt", "hires_negative_prompt", "kind", "seed")
_LONGEST = 120


def told_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the log tells them; they need not have been checked yet."""
    return {name: _told(name, value) for name, value in settings.items()}


def told_request(request: Request) -> dict[str, Any]:
    """Return all that shapes a request's pictures beside prompts and seeds: what is set of it."""
    fields = getattr(type(request), "model_fields", ())  # what is no request is refused later
    given = {name: getattr(request, name) for name in fields if name not in _NOT_TOLD}
    return {name: _told(name, value) for name, value in given.items() if value is not None}


def public(value: Any) -> Any:
    """Return a request as JSON with digests in place of its pictures, and with paths as names."""
    if isinstance(value, Value):
        fields = {name: public(getattr(value, name)) for name in type(value).model_fields}
        models = {name: told_path(fields[name]) for name in _LOCATIONS if fields.get(name)}
        return {**fields, **models}
    if isinstance(value, Image.Image):
        width, height = value.size
        return {"digest": picture_digest(value), "width": width, "height": height}
    if isinstance(value, tuple):
        return [public(each) for each in value]
    return value.name if isinstance(value, Path) else value


def told_path(path: object) -> str:
    """Return a path by its last name alone; a hub's id, and ``"demo"``, as they are."""
    text = str(path)
    is_id = isinstance(path, str) and text.count("/") == 1 and text[0] not in "/.~"
    if is_id and "\\" not in text and not Path(text).exists():
        return text
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1][:_LONGEST]


def shown(value: object) -> str:
    """Return what a host gave as an error's text shows it: short, whatever its class does."""
    try:
        return reprlib.repr(value)
    except Exception:  # noqa: BLE001 - a number of a million digits, for one, has no text
        return f"a value of the class {type(value).__name__}"


def told_machine() -> dict[str, Any]:
    """Return what of this machine decides how long things take and how much fits."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "free_bytes": psutil.virtual_memory().available,
    }  # fmt: skip


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            named = (line.partition(":")[2].strip() for line in lines if line[:10] == "model name")
            return next(named, "") or platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _told(name: str, value: Any) -> Any:
    told: Any = f"a {type(value).__name__}"
    match value:
        case None | bool() | int() | float():
            told = value
        case os.PathLike():
            told = told_path(value)
        case str():
            told = told_path(value) if name in _LOCATIONS else value[:_LONGEST]
        case list() | tuple():
            told = [_told(name, each) for each in value]
        case {"path": path, "weight": weight}:  # a LoRA, as JSON has it
            told = f"{Path(path).stem}@{weight:g}"
        case dict():
            told = {str(key): _told(str(key), each) for key, each in value.items()}
        case Detail():
            told = told_request(value)
        case Lora():
            told = f"{value.name}@{value.weight:g}"
        case Image.Image():
            told = f"an image of {value.width}x{value.height}"
    return told
