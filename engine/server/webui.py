"""The API that clients of A1111's web UI speak: ``/sdapi/v1``."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import json
import re
from typing import TYPE_CHECKING, Any

import psutil
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError

from holdfast.engine.errors import Cancelled, IllegalTransition, InvalidRequest
from holdfast.engine.passes.images import as_rgb
from holdfast.engine.prompts.embeddings import EmbeddingLibrary
from holdfast.engine.requests.infotext import read_words
from holdfast.engine.requests.pictures import read_picture
from holdfast.engine.requests.schedulers import SAMPLERS, SCHEDULERS, SCHEDULES
from holdfast.engine.requests.upscalers import UPSCALERS, upscale_image
from holdfast.engine.requests.values import read_as
from holdfast.engine.results.saving import INFOTEXT, read_infotext
from holdfast.engine.server.access import door
from holdfast.engine.server.answers import RefusedError, refusal_of
from holdfast.engine.server.fields import (
    NAMES,
    AskedImg2Img,
    AskedTxt2Img,
    fields_of,
    fit_of,
)
from holdfast.engine.server.studio import BY_VALUE, png
from holdfast.engine.server.visits import note_refusal
from holdfast.states import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.results.result import Result
    from holdfast.engine.server.access import Access
    from holdfast.engine.server.fields import Asked
    from holdfast.engine.server.studio import Order, Studio

_NOTHING = ("sd-vae", "sd-modules", "hypernetworks", "face-restorers", "realesrgan-models",
            "prompt-styles", "script-info", "extensions")  # fmt: skip
"""Lists that are empty here."""
_LARGEST = 8192 * 8192


class _Picture(BaseModel):
    image: str


class _Enlarged(BaseModel):
    image: str
    resize_mode: int | None = 0
    upscaling_resize: float | None = Field(2.0, gt=0, le=64)
    upscaling_resize_w: int | None = None
    upscaling_resize_h: int | None = None
    upscaling_crop: bool | None = True
    upscaler_1: str | None = "None"
    gfpgan_visibility: float | None = None
    codeformer_visibility: float | None = None
    extras_upscaler_2_visibility: float | None = None


def sdapi(studio: Studio, access: Access | None = None) -> APIRouter:
    """
    Return A1111's endpoints over a studio, for a FastAPI application.

    Args:
        studio: Serves them.
        access: Who may come in. None: everybody.
    """
    router = APIRouter(route_class=door(access, _refused), tags=["sdapi"])
    _add_making(router, studio)
    _add_watching(router, studio)
    _add_model(router, studio)
    _add_lists(router, studio)
    _add_words(router, studio)
    _add_empty_lists(router)
    _add_pictures(router)
    return router


def _add_making(router: APIRouter, studio: Studio) -> None:
    async def make(asked: Asked, http: Request) -> dict[str, Any]:
        facts = await studio.facts()
        _check_model(asked, facts)
        fields, told = await asyncio.to_thread(fields_of, asked, facts)
        order = await studio.order(fields, told, fit_of(asked))
        images: list[str] = []
        made: Result | None = None
        try:
            made = await studio.make(order, http)
        except Cancelled as stopped:
            if await http.is_disconnected():
                raise
            shown: Sequence[Image.Image] = stopped.first_pass
            images = [base64.b64encode(png(each)).decode() for each in shown]
        else:
            shown = made.images
            if asked.send_images is not False:
                images = await asyncio.to_thread(_encoded, made)
        echoed = asked.model_dump(exclude={"init_images", "mask"})
        info = _info(order, shown, made, facts)
        return {"images": images, "parameters": echoed, "info": json.dumps(info)}

    @router.post("/sdapi/v1/txt2img")
    async def txt2img(asked: AskedTxt2Img, http: Request) -> dict[str, Any]:
        return await make(asked, http)

    @router.post("/sdapi/v1/img2img")
    async def img2img(asked: AskedImg2Img, http: Request) -> dict[str, Any]:
        return await make(asked, http)


def _add_watching(router: APIRouter, studio: Studio) -> None:
    @router.get("/sdapi/v1/progress")
    async def progress(*, skip_current_image: bool = False) -> dict[str, Any]:
        jobs = studio.jobs()
        if not jobs:
            return _standing(0.0, 0.0, {}, None)
        job, at = jobs[0], jobs[0].progress
        facts = {
            "job": job.request_id,
            "job_count": len(jobs),
            "sampling_step": at.step or 0,
            "sampling_steps": at.steps or 0,
            "interrupted": job.status == "cancelling",
        }
        preview = None if skip_current_image else studio.preview(job)
        picture = None
        if preview is not None:
            drawn = await asyncio.to_thread(lambda: png(preview.image))
            picture = base64.b64encode(drawn).decode()
        # 0 means idle to those who ask, and something runs.
        return _standing(max(at.fraction, 0.001), at.remaining_seconds or 0.0, facts, picture)

    @router.post("/sdapi/v1/interrupt")
    async def interrupt(http: Request) -> dict[str, Any]:
        studio.interrupt(http)
        return {}

    @router.post("/sdapi/v1/skip")
    async def skip(http: Request) -> None:
        studio.interrupt(http)

    @router.get("/internal/ping")
    async def ping() -> dict[str, Any]:
        return {}

    @router.get("/sdapi/v1/memory")
    async def memory() -> dict[str, Any]:
        ram = psutil.virtual_memory()
        told = {"free": ram.available, "used": ram.total - ram.available, "total": ram.total}
        return {"ram": told, "cuda": {"error": "unavailable"}}


def _add_model(router: APIRouter, studio: Studio) -> None:
    @router.get("/sdapi/v1/options")
    async def options() -> dict[str, Any]:
        facts = await studio.facts()
        return {
            "sd_model_checkpoint": _title(facts),
            "sd_checkpoint_hash": facts.fingerprint,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
        }

    @router.post("/sdapi/v1/options")
    async def set_options(asked: dict[str, Any]) -> None:
        wanted = asked.get("sd_model_checkpoint")
        if wanted:
            _check_name(str(wanted), await studio.facts())

    @router.get("/sdapi/v1/sd-models")
    async def models() -> list[dict[str, Any]]:
        facts = await studio.facts()
        return [{
            "title": _title(facts), "model_name": facts.name, "hash": facts.fingerprint[:10],
            "sha256": facts.fingerprint, "filename": facts.name, "config": None,
        }]  # fmt: skip

    @router.post("/sdapi/v1/unload-checkpoint")
    async def unload() -> dict[str, Any]:
        await asyncio.to_thread(studio.engine.unload)
        return {}

    @router.post("/sdapi/v1/reload-checkpoint")
    async def reload() -> dict[str, Any]:
        if studio.engine.state is State.UNLOADED:
            with contextlib.suppress(IllegalTransition):  # loaded by another one meanwhile
                await asyncio.to_thread(studio.engine.load)
        return {}

    async def refresh() -> None:
        return None

    for name in ("checkpoints", "vae", "loras"):
        router.post(f"/sdapi/v1/refresh-{name}")(refresh)


def _add_lists(router: APIRouter, studio: Studio) -> None:
    @router.get("/sdapi/v1/samplers")
    async def samplers() -> list[dict[str, Any]]:
        known = set((await studio.facts()).schedulers)
        return [
            {"name": each.label, "aliases": [name], "options": {}}
            for name, each in SAMPLERS.items()
            if name in known
        ]

    @router.get("/sdapi/v1/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        names = {"automatic": "Automatic", "normal": "Normal"}
        names |= {name.replace("-", "_"): each.label for name, each in SCHEDULES.items()}
        return [
            {"name": name, "label": label, "aliases": None, "default_rho": -1.0,
             "need_inner_model": False}
            for name, label in names.items()
        ]  # fmt: skip

    @router.get("/sdapi/v1/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        labels = [each.label for each in UPSCALERS.values() if each.space == "image"]
        return [
            {"name": label, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
            for label in ("None", *labels)
        ]

    @router.get("/sdapi/v1/latent-upscale-modes")
    async def latent_upscalers() -> list[dict[str, Any]]:
        return [{"name": each.label} for each in UPSCALERS.values() if each.space == "latent"]

    @router.get("/sdapi/v1/loras")
    async def loras() -> list[dict[str, Any]]:
        folder = studio.engine.config.lora_dir
        usable = folder is not None and (await studio.facts()).takes_loras
        files = sorted(folder.glob("**/*.safetensors")) if folder and usable else []
        return [
            {"name": each.stem, "alias": each.stem, "path": each.name, "metadata": {}}
            for each in files
        ]


def _add_words(router: APIRouter, studio: Studio) -> None:
    library = EmbeddingLibrary()

    @router.get("/sdapi/v1/embeddings")
    async def embeddings() -> dict[str, Any]:
        found = await asyncio.to_thread(library.find, studio.engine.config.embeddings)
        shapes = {name: next(iter(each.vectors.values())).shape for name, each in found.items()}
        loaded = {
            name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None,
                   "shape": shape[1], "vectors": shape[0]}
            for name, shape in shapes.items()
        }  # fmt: skip
        return {"loaded": loaded, "skipped": {}}


def _add_empty_lists(router: APIRouter) -> None:
    @router.get("/sdapi/v1/scripts")
    async def scripts() -> dict[str, Any]:
        return {"txt2img": [], "img2img": []}

    @router.get("/sdapi/v1/cmd-flags")
    async def flags() -> dict[str, Any]:
        return {}

    async def nothing() -> list[Any]:
        return []

    for name in _NOTHING:
        router.get(f"/sdapi/v1/{name}")(nothing)


def _add_pictures(router: APIRouter) -> None:
    @router.post("/sdapi/v1/png-info")
    async def png_info(asked: _Picture) -> dict[str, Any]:
        return await asyncio.to_thread(_read_info, asked.image)

    @router.post("/sdapi/v1/extra-single-image")
    async def enlarge(asked: _Enlarged) -> dict[str, Any]:
        made = await asyncio.to_thread(_enlarged, asked)
        return {"html_info": "", "image": made}

    @router.post("/sdapi/v1/extra-batch-images")
    async def enlarge_all(asked: dict[str, Any]) -> dict[str, Any]:
        listed = asked.get("imageList")
        rest = {name: value for name, value in asked.items() if name != "imageList"}
        wanted = [
            _Enlarged.model_validate({**rest, "image": each.get("data", "")})
            for each in (listed if isinstance(listed, list) else [])
            if isinstance(each, dict)
        ]
        made = [await asyncio.to_thread(_enlarged, each) for each in wanted]
        return {"html_info": "", "images": made}


def _standing(
    fraction: float, seconds: float, facts: Mapping[str, Any], picture: str | None
) -> dict[str, Any]:
    state = {
        "skipped": False, "interrupted": False, "stopping_generation": False, "job": "",
        "job_count": 0, "job_timestamp": "0", "job_no": 0, "sampling_step": 0,
        "sampling_steps": 0, **facts,
    }  # fmt: skip
    return {
        "progress": fraction,
        "eta_relative": seconds,
        "state": state,
        "current_image": picture,
        "textinfo": None,
    }


def _title(facts: ModelFacts) -> str:
    return f"{facts.name} [{facts.fingerprint[:10]}]"


def _check_model(asked: Asked, facts: ModelFacts) -> None:
    wanted = (asked.override_settings or {}).get("sd_model_checkpoint")
    if wanted:
        _check_name(str(wanted), facts)


def _check_name(wanted: str, facts: ModelFacts) -> None:
    names = {_title(facts), facts.name, facts.fingerprint, facts.fingerprint[:10]}
    if wanted.strip() not in names and wanted.partition(" [")[0].strip() != facts.name:
        msg = f"model {wanted[:120]!r} not found; this server has {_title(facts)}"
        raise RefusedError(msg, "sd_model_checkpoint", 404)


def _encoded(result: Result) -> list[str]:
    return [base64.b64encode(result.png(n)).decode() for n in range(len(result.images))]


def _info(
    order: Order, shown: Sequence[Image.Image], made: Result | None, facts: ModelFacts
) -> dict[str, Any]:
    """
    Return what clients read of how images were made.

    Args:
        order: Was served.
        shown: What there is of it: the images, or the first pass where it was interrupted.
        made: The result; None where it was interrupted.
        facts: Of the model that made it.
    """
    request, seeds = order.request, order.seeds if made is None else made.seeds
    count = len(seeds)
    given = (request.width or facts.size[0], request.height or facts.size[1])
    width, height = shown[0].size if shown else given
    otherwise = (*order.told, *(() if made is None else made.degradations))
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * count,
        "seed": seeds[0],
        "all_seeds": list(seeds),
        "subseed": getattr(request, "variation_seed", None) or -1,
        "all_subseeds": [getattr(request, "variation_seed", None) or -1] * count,
        "subseed_strength": getattr(request, "variation_strength", 0),
        "width": width,
        "height": height,
        "sampler_name": SCHEDULERS[request.scheduler].label if request.scheduler else "Automatic",
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": count,
        "denoising_strength": getattr(request, "strength", None),
        "sd_model_name": facts.name,
        "sd_model_hash": facts.fingerprint[:10],
        "extra_generation_params": {each.kind: f"{each.asked} -> {each.given}"
                                    for each in otherwise},
        "index_of_first_image": 0,
        "infotexts": [request.prompt] * count if made is None else list(made.infotexts),
        "styles": [],
        "job_timestamp": dt.datetime.now(dt.UTC).strftime("%Y%m%d%H%M%S"),
        "clip_skip": getattr(request, "clip_skip", None) or 1,
        "interrupted": made is None,
    }  # fmt: skip


def _read_info(picture: str) -> dict[str, Any]:
    import io

    from PIL import Image

    try:
        content = base64.b64decode(picture.partition(",")[2] or picture)
        with Image.open(io.BytesIO(content), formats=BY_VALUE.formats) as opened:
            chunks = {name: str(value) for name, value in opened.info.items()
                      if isinstance(value, str)}  # fmt: skip
            infotext = read_infotext(opened) or ""
    except Exception as error:
        msg = "This is no PNG, JPEG or WebP image."
        raise InvalidRequest(msg) from error
    chunks.pop(INFOTEXT, None)
    return {"info": infotext, "items": chunks, "parameters": _parameters(infotext)}


def _parameters(infotext: str) -> dict[str, str]:
    words = read_words(infotext)
    found = {"Prompt": words.prompt, "Negative prompt": words.negative_prompt}
    for name, value in words.facts.items():
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if size is None:
            found[name] = value
        else:
            found |= {f"{name}-1": size[1], f"{name}-2": size[2]}
    return found


def _enlarged(asked: _Enlarged) -> str:
    for name in ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility"):
        if getattr(asked, name):
            msg = f"{name}: there is nothing here that does it; leave it at 0."
            raise RefusedError(msg, name)
    wanted = asked.upscaler_1 or "None"
    known = {each.label.lower(): name for name, each in UPSCALERS.items() if each.space == "image"}
    name = (known | {"none": "lanczos"}).get(wanted.strip().lower(), "")
    if not name:
        labels = ", ".join(each.label for each in UPSCALERS.values() if each.space == "image")
        msg = f"Invalid upscaler, needs to be one of these: None, {labels}"
        raise RefusedError(msg, "upscaler_1", 400)
    try:
        with read_as(BY_VALUE):
            image: Image.Image = as_rgb(read_picture(asked.image))
    except ValueError as error:
        raise InvalidRequest(f"image: {error}.") from error
    factor = asked.upscaling_resize or 2.0
    target = (round(image.width * factor), round(image.height * factor))
    if asked.resize_mode == 1 and asked.upscaling_resize_w and asked.upscaling_resize_h:
        target = (asked.upscaling_resize_w, asked.upscaling_resize_h)
    if min(target) < 1 or target[0] * target[1] > _LARGEST:
        msg = f"{target[0]}x{target[1]} was asked for; an image may have {_LARGEST} pixels."
        raise InvalidRequest(msg)
    enlarged = upscale_image(image, name, target, "crop" if asked.upscaling_crop else "fill")
    return base64.b64encode(png(enlarged)).decode()


def _refused(http: Request, error: Exception) -> JSONResponse:
    """Answer as A1111 does: FastAPI's list for fields of a wrong type, else in words."""
    told = refusal_of(error, NAMES)
    note_refusal(http, told)
    headers = dict(told.headers)
    if isinstance(error, (RequestValidationError, ValidationError)):
        faults = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
        return JSONResponse({"detail": faults}, told.status, headers)
    body = {"error": "HTTPException", "detail": told.words, "body": "", "errors": told.words}
    return JSONResponse(body, told.status, headers)
