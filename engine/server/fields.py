"""What A1111's clients send, and what it is here."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from holdfast.engine.errors import HoldfastError, InvalidRequest
from holdfast.engine.requests.schedulers import (
    SAMPLERS,
    SCHEDULERS,
    check_schedule,
    check_scheduler,
    with_schedule,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_FITS = ("stretch", "crop", "fill", "stretch")
_FILLS = ("fill", "original", "noise", "nothing")
_AUTOMATIC = {
    "dpm++2m": "dpm++2m-karras",
    "dpm++2m-sde": "dpm++2m-sde-exponential",
}
"""What A1111 takes for a sampler where no schedule is asked for."""
_NO_SAMPLER = frozenset({"", "automatic", "use same sampler", "same as primary"})
_NO_SCHEDULE = frozenset(
    {"", "automatic", "normal", "use same scheduler", "same as primary", "default"}
)
_SAME_MODEL = frozenset({"", "use same checkpoint", "none"})
_SEEDS = 2**32


class RefusedError(HoldfastError):
    """
    A wish is refused in words that hold nothing but the client's own.

    Attributes:
        status: Of HTTP.
    """

    status = 422


class NotFoundError(RefusedError):
    """Something is asked for by name, and there is none of that name."""

    status = 404


class Asked(BaseModel):
    """
    The fields of ``txt2img`` and ``img2img`` that decide something here, by A1111's names.

    Each may be missing or null; others are ignored.
    """

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    seed_resize_from_w: int | None = None
    seed_resize_from_h: int | None = None
    batch_size: int | None = None
    n_iter: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    denoising_strength: float | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    refiner_checkpoint: str | None = None
    override_settings: dict[str, Any] | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool | None = None


class AskedTxt2Img(Asked):
    """The fields of ``txt2img``, those of its hires fix among them."""

    enable_hr: bool | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None
    hr_cfg: float | None = None


class AskedImg2Img(Asked):
    """The fields of ``img2img``, those of its inpainting among them."""

    init_images: list[str] | None = None
    resize_mode: int | None = None
    mask: str | None = None
    mask_blur: float | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = None
    inpainting_mask_invert: int | None = None


def fields_of(asked: Asked) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Return a request's fields as JSON has them, and what of the wish is done otherwise or not.

    Raises:
        InvalidRequest: Something is asked for that would change the image and is not here.
        NotFoundError: There is no sampler of that name, or no image to begin with.
    """
    _refuse_scripts(asked)
    told: dict[str, str] = {}
    fields = _common(asked, told)
    if isinstance(asked, AskedImg2Img):
        fields |= _over_image(asked)
    elif isinstance(asked, AskedTxt2Img) and asked.enable_hr:
        fields |= _hires(asked, fields, told)
    else:
        fields["kind"] = "txt2img"
    return _given(fields), told


def _common(asked: Asked, told: dict[str, str]) -> dict[str, Any]:
    name = asked.sampler_name or asked.sampler_index
    fields: dict[str, Any] = {
        "prompt": asked.prompt or "",
        "negative_prompt": asked.negative_prompt or "",
        "seed": None if asked.seed is None or asked.seed < 0 else asked.seed,
        "batch": (asked.batch_size or 1) * (asked.n_iter or 1),
        "steps": asked.steps,
        "guidance": asked.cfg_scale,
        "width": asked.width or None,
        "height": asked.height or None,
        "scheduler": _scheduler(name, asked.scheduler, told),
        **_variation(asked),
    }
    skip = (asked.override_settings or {}).get("CLIP_stop_at_last_layers")
    if isinstance(skip, int) and skip > 1:
        fields["clip_skip"] = skip
    for field, wanted in (
        ("restore_faces", asked.restore_faces),
        ("tiling", asked.tiling),
        ("refiner_checkpoint", (asked.refiner_checkpoint or "").lower() not in {"", "none"}),
    ):
        if wanted:
            told[field] = "not there: done without it"
    return fields


def _variation(asked: Asked) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.subseed_strength:
        named = asked.subseed is not None and asked.subseed >= 0
        fields["variation_seed"] = asked.subseed if named else secrets.randbelow(_SEEDS)
        fields["variation_strength"] = asked.subseed_strength
    width, height = asked.seed_resize_from_w or 0, asked.seed_resize_from_h or 0
    if width > 0 and height > 0:
        fields["seed_resize"] = [width, height]
    return fields


def _hires(asked: AskedTxt2Img, common: Mapping[str, Any], told: dict[str, str]) -> dict[str, Any]:
    if (asked.hr_checkpoint_name or "").lower() not in _SAME_MODEL:
        msg = "hr_checkpoint_name: the second pass is made with the same model; leave it out."
        raise InvalidRequest(msg)
    upscaler = asked.hr_upscaler or "Latent"
    width, height = asked.hr_resize_x or None, asked.hr_resize_y or None
    fields: dict[str, Any] = {"kind": "hires"}
    if asked.firstphase_width or asked.firstphase_height:
        width, height = common["width"], common["height"]
        fields |= {
            "width": asked.firstphase_width or None,
            "height": asked.firstphase_height or None,
        }
    sized = width is not None or height is not None
    return fields | {
        "scale": None if sized else asked.hr_scale or 2.0,
        "hires_width": width,
        "hires_height": height,
        "upscaler": "lanczos" if upscaler.lower() == "none" else upscaler,  # as A1111 takes it
        "hires_steps": asked.hr_second_pass_steps or None,
        "strength": 0.75 if asked.denoising_strength is None else asked.denoising_strength,
        "hires_prompt": asked.hr_prompt or None,
        "hires_negative_prompt": asked.hr_negative_prompt or None,
        "hires_scheduler": _scheduler(asked.hr_sampler_name, asked.hr_scheduler, told),
        "hires_guidance": asked.hr_cfg,
    }


def _over_image(asked: AskedImg2Img) -> dict[str, Any]:
    images = asked.init_images or []
    if not images:
        msg = "Init image not found"
        raise NotFoundError(msg)
    if len(images) > 1:
        msg = f"init_images: {len(images)} were sent; send one, and ask once for each."
        raise InvalidRequest(msg)
    fields: dict[str, Any] = {
        "image": images[0],
        "strength": 0.75 if asked.denoising_strength is None else asked.denoising_strength,
    }
    if not asked.mask:
        fit = _one_of("resize_mode", asked.resize_mode or 0, _FITS)
        return fields | {"kind": "img2img", "fit": fit}
    whole = asked.inpaint_full_res is False
    return fields | {
        "kind": "inpaint",
        "mask": asked.mask,
        "mask_blur": asked.mask_blur,
        "mask_invert": bool(asked.inpainting_mask_invert),
        "fill": _one_of("inpainting_fill", asked.inpainting_fill or 0, _FILLS),
        "area": "whole" if whole else "masked",
        "padding": asked.inpaint_full_res_padding or 0,
    }


def _one_of(name: str, index: int, words: tuple[str, ...]) -> str:
    if not 0 <= index < len(words):
        msg = f"{name}: {index} was sent; there are 0 to {len(words) - 1}."
        raise InvalidRequest(msg)
    return words[index]


def _scheduler(sampler: str | None, schedule: str | None, told: dict[str, str]) -> str | None:
    """Return the scheduler that A1111 would run under these names; None: none is asked for."""
    plain = re.sub(r"\s+", " ", (schedule or "").strip().lower())
    if (sampler or "").strip().lower() in _NO_SAMPLER:
        return None
    try:
        name = check_scheduler(sampler or "")
    except ValueError as error:
        msg = f"Sampler not found: {sampler!r}. There are: "
        raise NotFoundError(msg + ", ".join(each.label for each in SAMPLERS.values())) from error
    if plain in _NO_SCHEDULE:
        return _AUTOMATIC.get(name, name) if plain in {"", "automatic"} else name
    try:
        return with_schedule(name, check_schedule(plain))
    except ValueError:
        told["scheduler"] = f"{schedule} is not there for {SCHEDULERS[name].label}: its own is run"
        return name


def _refuse_scripts(asked: Asked) -> None:
    """Refuse scripts, which would change the image, but for those that are switched off."""
    if asked.script_name and asked.script_name.lower() != "none":
        msg = f"Script '{asked.script_name}' not found"
        raise RefusedError(msg)
    for name, script in (asked.alwayson_scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if not _is_off(arguments):
            msg = f"always on script {name} not found"
            raise RefusedError(msg)


def _is_off(arguments: object) -> bool:
    if isinstance(arguments, dict):
        return not arguments or arguments.get("enabled") is False
    if isinstance(arguments, list):
        return (
            not arguments
            or arguments[0] is False
            or all(isinstance(each, dict) and each.get("enabled") is False for each in arguments)
        )
    return arguments is None or arguments is False


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
