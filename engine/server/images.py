"""The images API of OpenAI: ``/v1/images`` and, as OpenVINO Model Server has it, ``/v3/images``."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from holdfast.engine.errors import HoldfastError
from holdfast.engine.requests.pictures import read_picture
from holdfast.engine.requests.values import read_as
from holdfast.engine.server.access import LARGEST_BODY, door
from holdfast.engine.server.answers import OURS, RefusedError, refusal_of
from holdfast.engine.server.studio import BY_VALUE, png
from holdfast.engine.server.visits import note_refusal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from starlette.types import Receive, Scope, Send

    from holdfast.engine.jobs.job import Job
    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.results.result import Degradation, Result
    from holdfast.engine.server.access import Access
    from holdfast.engine.server.answers import Refusal
    from holdfast.engine.server.studio import Studio

_STEPS = {"low": 10, "medium": 20, "high": 30}
_DEFAULTS = ("gpt-image-", "dall-e-", "chatgpt-image-")
"""Beginnings of the names of models that clients send where none was chosen."""
_NAMES: Mapping[str, str] = MappingProxyType({
    "batch": "n", "steps": "num_inference_steps", "guidance": "guidance_scale",
    "seed": "rng_seed", "width": "size", "height": "size",
})  # fmt: skip
"""OpenAI's and OVMS's names of the fields that a request has here."""

_TYPES = {429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found"}
_LOOK_SECONDS = 0.05


class _Asked(BaseModel):
    """What decides something here; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    model: str | None = None
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = None
    quality: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    background: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    rng_seed: int | None = None
    strength: float | None = None
    speed: str | None = None


def openai(studio: Studio, access: Access | None = None, prefix: str = "/v1") -> APIRouter:
    """
    Return OpenAI's image endpoints over a studio, for a FastAPI application.

    Args:
        studio: Serves them.
        access: Who may come in. None: everybody.
        prefix: Of the paths; OpenVINO Model Server's clients use ``/v3``.
    """
    router = APIRouter(prefix=prefix, route_class=door(access, _refused), tags=["images"])

    @router.get("/models")
    async def models() -> dict[str, Any]:
        names = (await studio.facts()).name, *studio.aliases
        return {"object": "list", "data": [_model(name) for name in names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _words_of(name, await studio.facts(), studio.aliases)
        return _model(name)

    @router.post("/images/generations", response_model=None)
    async def generations(asked: _Asked, http: Request) -> Response:
        return await _made(studio, asked, http, {"kind": "txt2img"}, "image_generation")

    @router.post("/images/edits", response_model=None)
    async def edits(http: Request) -> Response:
        async with http.form(max_part_size=LARGEST_BODY) as form:
            pictures = [
                await each.read()
                for name in ("image", "image[]")
                for each in form.getlist(name)
                if isinstance(each, UploadFile)
            ]
            mask = form.get("mask")
            masked = await mask.read() if isinstance(mask, UploadFile) else None
            asked = _Asked.model_validate(
                {name: each for name, each in form.items() if isinstance(each, str)}
            )
        if len(pictures) != 1:
            msg = f"One image is edited at a time; {len(pictures)} were sent."
            raise RefusedError(msg, "image")
        fields = await asyncio.to_thread(_edit, pictures[0], masked)
        if asked.strength is not None:
            fields["strength"] = asked.strength
        return await _made(studio, asked, http, fields, "image_edit")

    return router


async def _made(
    studio: Studio, asked: _Asked, http: Request, fields: dict[str, Any], kind: str
) -> Response:
    facts = await studio.facts()
    words = _words_of(asked.model or "", facts, studio.aliases)
    order = await studio.order(fields | _common(asked, words))
    if asked.stream:
        job = studio.submit(order, http)  # before the answer has begun
        return _Stream(job, _events(studio, job, asked, kind), _told(order.told))
    result = await studio.make(order, http)
    images = await asyncio.to_thread(_encoded, result, asked)
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": [{"b64_json": each} for each in images],
            **_about(result, asked),
            "usage": _usage(),
        },
        headers=_told((*order.told, *result.degradations)),
    )


class _Stream(StreamingResponse):
    """
    The events of one job, which ends with the client's interest in it.

    Args:
        job: Its events.
        events: Of it.
        headers: Of the answer.
    """

    def __init__(
        self, job: Job[Result], events: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them, if the client is still there when the first one comes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "holdfast"}


def _words_of(name: str, facts: ModelFacts, aliases: Mapping[str, str]) -> str:
    """Return the words that the model of this name adds to prompts."""
    if name in aliases:
        return aliases[name]
    if name and name != facts.name and not name.startswith(_DEFAULTS):
        there = ", ".join((facts.name, *aliases))
        msg = f"The model {name[:120]!r} does not exist here; there is {there}."
        raise RefusedError(msg, "model", 404)
    return ""


def _common(asked: _Asked, words: str) -> dict[str, Any]:
    """Return the fields that all requests have, checked; words are added to the prompt."""
    if (asked.response_format or "b64_json") != "b64_json":
        msg = "Images are sent as b64_json alone."
        raise RefusedError(msg, "response_format")
    if (asked.output_format or "png") not in {"png", "jpeg", "webp"}:
        msg = "output_format is png, jpeg or webp."
        raise RefusedError(msg, "output_format")
    if asked.background == "transparent":
        msg = "Images have no transparent background here."
        raise RefusedError(msg, "background")
    width, height = _size(asked.size)
    seed = asked.rng_seed
    given = {
        "prompt": f"{asked.prompt} {words}".rstrip() if words else asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "batch": asked.n or 1,
        "steps": asked.num_inference_steps or _STEPS.get(asked.quality or ""),
        "guidance": asked.guidance_scale,
        "seed": None if seed is None or seed < 0 else seed,
        "speed": asked.speed or None,
        "width": width,
        "height": height,
    }
    return {name: value for name, value in given.items() if value is not None}


def _size(asked: str | None) -> tuple[int | None, int | None]:
    if asked is None or asked == "auto":
        return None, None
    width, times, height = asked.partition("x")
    if not (times and width.isdecimal() and height.isdecimal() and len(asked) < 16):  # noqa: PLR2004 - no such picture
        msg = "size is 'auto', or width and height such as '1024x1024'."
        raise RefusedError(msg, "size")
    return int(width), int(height)


def _edit(picture: bytes, mask: bytes | None) -> dict[str, Any]:
    """Return the fields of an edit; what is transparent in the mask is redrawn."""
    image = _data_url(picture)
    if mask is None:
        return {"kind": "img2img", "image": image}
    try:
        with read_as(BY_VALUE):
            read = read_picture(_data_url(mask))
    except ValueError as error:
        msg = "The mask cannot be read: send a PNG that is transparent where to edit."
        raise RefusedError(msg, "mask") from error
    if read.mode != "RGBA":
        msg = "The mask has no transparent part: that is what is edited."
        raise RefusedError(msg, "mask")
    selected = read.getchannel("A").point(lambda alpha: 255 - alpha)
    return {"kind": "inpaint", "image": image, "mask": _data_url(png(selected))}


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


async def _events(
    studio: Studio, job: Job[Result], asked: _Asked, kind: str
) -> AsyncIterator[bytes]:
    """Yield the events of one job."""
    wanted = asked.partial_images or 0
    sent = 0
    while not job.done():
        preview = studio.preview(job)
        if sent < wanted and preview and job.progress.fraction > sent / (wanted + 1):
            drawn = await asyncio.to_thread(lambda shown: png(shown.image), preview)
            yield _event(f"{kind}.partial_image", partial_image_index=sent,
                         b64_json=base64.b64encode(drawn).decode(), **_form(asked))  # fmt: skip
            sent += 1
        await asyncio.sleep(_LOOK_SECONDS)
    try:
        result = await job
    except HoldfastError as error:
        told = refusal_of(error, _NAMES)
        yield _event("error", error=_error(told))
        return
    for image in await asyncio.to_thread(_encoded, result, asked):
        yield _event(f"{kind}.completed", b64_json=image, **_about(result, asked), usage=_usage())


def _event(kind: str, **facts: Any) -> bytes:
    told = json.dumps({"type": kind, "created_at": int(time.time()), **facts})
    return f"event: {kind}\ndata: {told}\n\n".encode()


def _encoded(result: Result, asked: _Asked) -> list[str]:
    quality = max(1, 95 if asked.output_compression is None else asked.output_compression)
    made = []
    for index in range(len(result.images)):
        if asked.output_format == "jpeg":
            content = result.jpeg(index, quality=quality)
        elif asked.output_format == "webp":
            content = result.webp(index, quality=quality)
        else:
            content = result.png(index)
        made.append(base64.b64encode(content).decode())
    return made


def _form(asked: _Asked) -> dict[str, str]:
    form = asked.output_format or "png"
    return {
        "size": asked.size or "auto",
        "quality": asked.quality or "auto",
        "output_format": form,
        "background": "opaque",
    }


def _about(result: Result, asked: _Asked) -> dict[str, str]:
    width, height = result.images[0].size
    return _form(asked) | {"size": f"{width}x{height}"}


def _usage() -> dict[str, Any]:
    """Return what is paid for, which is nothing."""
    nothing = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": nothing, "output_tokens": 0,
            "total_tokens": 0}  # fmt: skip


def _told(otherwise: Sequence[Degradation]) -> dict[str, str]:
    """Return what is done otherwise than asked as headers: the answer has no place for it."""
    words = "; ".join(f"{each.kind}: {each.asked} -> {each.given}" for each in otherwise)
    plain = " ".join(words.split()).encode("ascii", "backslashreplace").decode()
    return {"X-Holdfast-Otherwise": plain} if plain else {}


def _refused(http: Request, error: Exception) -> JSONResponse:
    """Answer as OpenAI does, whose client comes again by itself unless it is told not to."""
    told = refusal_of(error, _NAMES)
    note_refusal(http, told)
    headers = {name: each for name, each in told.headers.items() if name != "WWW-Authenticate"}
    if told.status >= OURS:
        headers["x-should-retry"] = "false"
    if told.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    is_invalid = told.status == HTTPStatus.UNPROCESSABLE_ENTITY
    status = HTTPStatus.BAD_REQUEST if is_invalid else told.status
    return JSONResponse({"error": _error(told)}, status, headers)


def _error(told: Refusal) -> dict[str, str | None]:
    kind = (
        "server_error" if told.status >= OURS else _TYPES.get(told.status, "invalid_request_error")
    )
    is_field = told.param is not None and told.status != HTTPStatus.NOT_FOUND
    code = "invalid_value" if is_field else _CODES.get(told.status)
    return {"message": told.words, "type": kind, "param": told.param, "code": code}
