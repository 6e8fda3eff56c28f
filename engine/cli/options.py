"""Every field of requests and settings as an option, read from where it is declared."""

from __future__ import annotations

import functools
import inspect
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.config import EngineConfig
from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.lora import Lora
from holdfast.engine.requests.schedulers import SAMPLERS, SCHEDULES
from holdfast.engine.requests.txt2img import Txt2Img
from holdfast.engine.requests.upscalers import UPSCALERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.requests.values import Value

REQUESTS: tuple[type[Value], ...] = (Txt2Img, Hires, Img2Img, Inpaint)
KINDS: tuple[type[Value], ...] = (*REQUESTS, EngineConfig)
NOT_OPTIONS = frozenset({"kind", "prompt"})
FOR_HOSTS = frozenset({"scheduler", "lora", "queue_limit", "order", "idle_unload"})
"""Settings that one command has no use for; scheduler and LoRAs are asked for with the request."""

_PANELS: Mapping[tuple[type[Value], ...], str] = {
    REQUESTS: "Image",
    (Hires,): "Second pass, with --hires",
    (Hires, Img2Img): "From an image",
    (Hires, Img2Img, Inpaint): "From an image",
    (Inpaint,): "A part of an image, with --mask or --outpaint",
}
_ASKED_BY: Mapping[type[Value], str] = {Hires: "--hires", Img2Img: "--image", Inpaint: "--mask"}
_ENGINE = "Engine"
_FIELD = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
_METAVARS = {int: "N", float: "X", Path: "PATH", bool: ""}


@dataclass(frozen=True)
class _Form:
    """How a field is written on the command line where its own name, words or type do not do."""

    flag: str
    metavar: str
    help: str | None = None
    read: Callable[[list[str]], Any] | None = None
    default: str | None = None


def _device(texts: list[str]) -> str | dict[str, str]:
    if any("=" in text for text in texts):
        return _pairs(texts)
    return texts[-1]


def _pairs(texts: list[str]) -> dict[str, str]:
    parted = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, parted, strict=True):
        if not (name and equals):
            msg = f"NAME=VALUE is needed, not {text!r}."
            raise InvalidRequest(msg)
    return {name: value for name, _, value in parted}


def _size(texts: list[str]) -> tuple[int, ...]:
    sides = texts[-1].lower().split("x")
    if not all(side.isdecimal() for side in sides):
        msg = f"WIDTHxHEIGHT in pixels is needed, as in 512x512, not {texts[-1]!r}."
        raise InvalidRequest(msg)
    return tuple(map(int, sides))


def _loras(texts: list[str]) -> tuple[Lora, ...]:
    return () if texts == ["none"] else tuple(map(_lora, texts))


def _lora(text: str) -> Lora:
    path, colon, weight = text.rpartition(":")
    try:
        return Lora(path, float(weight)) if colon else Lora(text)
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        return Lora(text)  # The colon belongs to the path, as in C:\style.safetensors.


def _numbers(text: str, counts: tuple[int, ...]) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts:
        msg = f"LEFT,TOP,RIGHT,BOTTOM in pixels is needed, not {text!r}."
        raise InvalidRequest(msg)
    return numbers


def _outpaint(texts: list[str]) -> int | tuple[int, ...]:
    numbers = _numbers(texts[-1], (1, 4))
    return numbers if len(numbers) > 1 else numbers[0]


def _detail(texts: list[str]) -> Detail:
    parts = [text.partition(":") for text in texts]
    boxes: Any = tuple(_numbers(box, (4,)) for box, _, _ in parts)
    return Detail(boxes=boxes, prompt="[SEP]".join(prompt for _, _, prompt in parts))


_LORA = "A LoRA file and its weight, -10 to 10 (1 if left out). May be given several times."
_FORMS: Mapping[str, _Form] = {
    "scheduler": _Form(
        "--scheduler",
        "NAME",
        f"One of {', '.join(SAMPLERS)}, or its diffusers class. By default the model's own.",
    ),
    "schedule": _Form(
        "--schedule",
        "NAME",
        f"How the scheduler spreads the steps: one of {', '.join(SCHEDULES)}. By default as the "
        "model was made.",
    ),
    "upscaler": _Form("--upscaler", "NAME", f"One of {', '.join(UPSCALERS)}."),
    "image": _Form("--image", "FILE", "The image to start from, in place of noise alone."),
    "mask": _Form("--mask", "FILE"),
    "outpaint": _Form(
        "--outpaint",
        "LEFT,TOP,RIGHT,BOTTOM",
        "Pixels that --image grows by on each side, which are drawn too; one number for all sides.",
        _outpaint,
        "",
    ),
    "first_pass": _Form(
        "--redo", "FILE", "An image of a first pass that is taken as it is: only the second is run."
    ),
    "hires_model": _Form("--hires-model", "MODEL"),
    "detail": _Form(
        "--detail",
        "LEFT,TOP,RIGHT,BOTTOM[:PROMPT]",
        "A region that is redrawn after all else, at the model's own size. May be given several "
        "times.",
        _detail,
        "",
    ),
    "device": _Form(
        "--device",
        "[NAME=]DEVICE",
        "An OpenVINO device such as CPU, GPU or AUTO:GPU,CPU; or, several times, one for each "
        "component, as in unet=GPU (others: CPU).",
        _device,
    ),
    "properties": _Form(
        "--property",
        "NAME=VALUE",
        "An OpenVINO property for every compile, as in INFERENCE_NUM_THREADS=4. May be given "
        "several times.",
        _pairs,
    ),
    "lora": _Form("--lora", "FILE[:WEIGHT]", _LORA, _loras),
    "hires_lora": _Form(
        "--hires-lora",
        "FILE[:WEIGHT]",
        f"{_LORA} By default those of the first pass; 'none' for none.",
        _loras,
    ),
    "seed_resize": _Form("--seed-resize", "WIDTHxHEIGHT", read=_size),
    "embeddings": _Form("--embeddings", "PATH", read=tuple),
    "memory_budget": _Form("--memory-budget", "SIZE"),
    "cache_limit": _Form("--cache-limit", "SIZE", default="Default: 64GiB."),
    "log_file": _Form("--log", "FILE"),
    "strict": _Form(
        "--strict",
        "",
        "Do what comes nearest, and say so, where it cannot be done as asked; for example "
        "read an embedding's name as words where there is no file of it.",
    ),
}


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``**given`` an option for each field; unset ones are left out."""
    return _with(command, (*_request_parameters(), *_setting_parameters()))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``**given`` an option for each of the engine's settings."""
    return _with(command, tuple(_setting_parameters()))


def _with(
    command: Callable[..., None], options: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        command(**{name: each for name, each in values.items() if each not in (None, [])})

    parameters = [*own, *options]
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
    called.__annotations__ = {each.name: each.annotation for each in parameters}
    return called


def read_request(prompt: str, given: Mapping[str, Any], *, hires: bool) -> Request:
    """
    Make the request that the options ask for.

    Raises:
        InvalidRequest: An option is out of its range or belongs to another kind of request.
    """
    inpaints = any(_kinds_with(name) == (Inpaint,) for name in given)
    if hires and inpaints:
        msg = "--hires enlarges a whole image: leave out either it or what is about a mask."
        raise InvalidRequest(msg)
    over = Inpaint if inpaints else Img2Img if "image" in given else Txt2Img
    kind: type[Request] = Hires if hires else over
    fields = {name: value for name, value in given.items() if _kinds_with(name)}
    for name in fields:
        if name not in kind.model_fields:
            wanted = " or ".join(_ASKED_BY[each] for each in _kinds_with(name))
            msg = f"{_flag(name)} belongs to {wanted}: add that, or leave {_flag(name)} out."
            raise InvalidRequest(msg)
    return kind(prompt=prompt, **dict(_values(fields)))


def read_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of requests that the options name, for a request that is there already."""
    return dict(_values({name: value for name, value in given.items() if _kinds_with(name)}))


def read_config(given: Mapping[str, Any]) -> EngineConfig:
    """
    Make the settings that the options ask for.

    Raises:
        InvalidRequest: One is out of its range.
    """
    names = EngineConfig.model_fields.keys() - FOR_HOSTS
    return EngineConfig(**dict(_values({name: given[name] for name in names & given.keys()})))


def _values(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        read = _FORMS[name].read if name in _FORMS else None
        yield name, value if read is None else read(value)


def _kinds_with(name: str) -> tuple[type[Value], ...]:
    return tuple(kind for kind in REQUESTS if name in kind.model_fields)


def _flag(name: str) -> str:
    return _FORMS[name].flag if name in _FORMS else f"--{name.replace('_', '-')}"


FLAGS: Mapping[str, str] = {
    name: _flag(name) for kind in KINDS for name in kind.model_fields if name not in NOT_OPTIONS
}
"""The option of each field."""


def _request_parameters() -> Iterator[inspect.Parameter]:
    for name in dict.fromkeys(name for kind in REQUESTS for name in kind.model_fields):
        if name not in NOT_OPTIONS:
            kinds = _kinds_with(name)
            yield _parameter(name, kinds, _PANELS[kinds])


def _setting_parameters() -> Iterator[inspect.Parameter]:
    for name in EngineConfig.model_fields:
        if name not in FOR_HOSTS:
            yield _parameter(name, (EngineConfig,), _ENGINE)


def _parameter(name: str, kinds: tuple[type[Value], ...], panel: str) -> inspect.Parameter:
    base = _base(kinds[0].model_fields[name].annotation)
    form = _FORMS.get(name, _Form(_flag(name), _metavar(base)))
    option = typer.Option(
        _switch(form.flag, kinds[0].model_fields[name].default) if base is bool else form.flag,
        metavar=form.metavar or None,
        help=f"{form.help or _help(name, kinds)} {form.default or _default(name, kinds)}".strip(),
        rich_help_panel=panel,
        show_default=False,
    )
    kind: Any = bool if base is bool else str if form.read is None else list[str]
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _switch(flag: str, default: Any) -> str:
    """Return what typer reads a flag from; only what is not so anyway can be asked for."""
    off = f"--no-{flag[2:]}"
    return {True: f" /{off}", False: flag}.get(default, f"{flag}/{off}")


def _base(annotation: Any) -> Any:
    """Return the first type of an annotation, without what narrows it."""
    while get_origin(annotation) in (Union, types.UnionType, Annotated):
        annotation = get_args(annotation)[0]
    return annotation


def _metavar(base: Any) -> str:
    if get_origin(base) is Literal:
        return "NAME"
    return _METAVARS.get(base, "TEXT")


def _help(name: str, kinds: Sequence[type[Value]]) -> str:
    said = (_documented(kind).get(name, "") for kind in kinds)
    words = next(filter(None, said), "")  # Python keeps no docstrings with PYTHONOPTIMIZE=2.
    words = words.replace("None: ", "By default ").replace("``", "")
    base = _base(kinds[0].model_fields[name].annotation)
    choices = f"One of {', '.join(get_args(base))}. " if get_origin(base) is Literal else ""
    return choices + re.sub(r"`(\w+)`", lambda field: _shown(field[1]), words)


def _shown(field: str) -> str:
    known = any(field in kind.model_fields for kind in KINDS)
    return "PROMPT" if field == "prompt" else _flag(field) if known else field


@functools.cache
def _documented(kind: type[Value]) -> dict[str, str]:
    """Return the words on each field in a class's docstring."""
    fields = _FIELD.findall(inspect.getdoc(kind) or "")
    return {name: " ".join(words.split()) for name, words in fields}


def _default(name: str, kinds: tuple[type[Value], ...]) -> str:
    values = {kind: kind.model_fields[name].default for kind in reversed(kinds)}
    first = values[kinds[0]]
    if isinstance(first, bool) or not isinstance(first, (str, int, float)) or first == "":
        return ""
    others = [
        f", with {_ASKED_BY[kind]} {values[kind]}" for kind in kinds[1:] if values[kind] != first
    ]
    return f"Default: {first}{''.join(others)}."
