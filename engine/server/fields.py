"""What A1111's clients send, and what it is here."""

from __future__ import annotations

import re
import secrets
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from holdfast.engine.requests.pictures import read_picture, write_picture
from holdfast.engine.requests.schedulers import (
    SAMPLERS,
    SCHEDULERS,
    SCHEDULES,
    check_schedule,
    check_scheduler,
    with_schedule,
)
from holdfast.engine.requests.values import read_as
from holdfast.engine.results.result import Degradation
from holdfast.engine.server.answers import RefusedError
from holdfast.engine.server.studio import BY_VALUE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.requests.sizes import Fit

_FITS: tuple[Fit, ...] = ("stretch", "crop", "fill", "stretch")
_OF_LATENTS = 3
"""The resize mode that A1111 does in latents."""

_FILLS = ("fill", "original", "noise", "nothing")
_AUTOMATIC = {
    "dpm++2m": "dpm++2m-karras",
    "dpm++2m-sde": "dpm++2m-sde-exponential",
}
"""What A1111 takes for a sampler where no schedule is asked for."""

_FIRST_SAMPLER = "euler"
"""What A1111 takes where no sampler is asked for."""

_NO_SAMPLER = frozenset({"", "automatic", "use same sampler", "same as primary"})
_NO_SCHEDULE = frozenset(
    {"", "automatic", "normal", "use same scheduler", "same as primary", "default"}
)
_SAME_MODEL = frozenset({"", "use same checkpoint", "none"})
_NO_VAE = frozenset({"", "automatic", "none"})
_SEEDS = 2**32

NAMES: Mapping[str, str] = MappingProxyType({
    "guidance": "cfg_scale", "batch": "batch_size", "strength": "denoising_strength",
    "scheduler": "sampler_name", "schedule": "scheduler", "image": "init_images",
    "variation_seed": "subseed", "variation_strength": "subseed_strength",
    "fill": "inpainting_fill", "padding": "inpaint_full_res_padding",
    "upscaler": "hr_upscaler", "scale": "hr_scale", "hires_steps": "hr_second_pass_steps",
    "hires_width": "hr_resize_x", "hires_height": "hr_resize_y", "hires_prompt": "hr_prompt",
    "hires_negative_prompt": "hr_negative_prompt", "hires_scheduler": "hr_sampler_name",
    "hires_guidance": "hr_cfg", "hires_speed": "hr_speed",
})  # fmt: skip
"""A1111's names of the fields that a request has here."""


class Asked(BaseModel):
    """
    The fields of ``txt2img`` and ``img2img`` that decide something here, by A1111's names.

    Each may be missing or null; others are ignored. `speed` is Holdfast's own, as in `Txt2Img`.
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
    clip_skip: int | None = None
    eta: float | None = None
    speed: str | None = None
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
    hr_speed: str | None = None


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


def fields_of(asked: Asked, facts: ModelFacts) -> tuple[dict[str, Any], list[Degradation]]:
    """
    Return a request's fields as JSON has them, and what of the wish is done otherwise or not.

    Args:
        asked: By a client.
        facts: Of the model that is to make it.

    Raises:
        RefusedError: Something is asked for that would change the image and is not here, or is
            asked for by a name that nothing has.
    """
    _refuse_scripts(asked)
    told: list[Degradation] = []
    fields = _common(asked, facts, told)
    if isinstance(asked, AskedImg2Img):
        fields |= _over_image(asked, told)
    elif isinstance(asked, AskedTxt2Img) and asked.enable_hr:
        fields |= _hires(asked, fields, facts, told)
    else:
        fields["kind"] = "txt2img"
    return {name: value for name, value in fields.items() if value is not None}, told


def fit_of(asked: Asked) -> Fit:
    """
    Return what becomes of a picture of another aspect.

    Raises:
        RefusedError: There is no such mode.
    """
    mode = asked.resize_mode or 0 if isinstance(asked, AskedImg2Img) else 0
    fit: Fit = _one_of("resize_mode", mode, _FITS)
    return fit


def _common(asked: Asked, facts: ModelFacts, told: list[Degradation]) -> dict[str, Any]:
    name = asked.sampler_name or asked.sampler_index
    settings = asked.override_settings or {}
    vae = str(settings.get("sd_vae") or "")
    missing = (
        ("restore_faces", bool(asked.restore_faces)),
        ("tiling", bool(asked.tiling)),
        ("refiner_checkpoint", (asked.refiner_checkpoint or "").lower() not in {"", "none"}),
        ("sd_vae", vae.lower() not in _NO_VAE),
    )
    told += [Degradation(what, "on", "done without it") for what, wanted in missing if wanted]
    scheduler = _scheduler(name, asked.scheduler, None, facts, told)
    takes_eta = scheduler is not None and SCHEDULERS[scheduler].eta is not None
    return {
        "prompt": asked.prompt or "",
        "negative_prompt": asked.negative_prompt or "",
        "seed": None if asked.seed is None or asked.seed < 0 else asked.seed,
        "batch": (asked.batch_size or 1) * (asked.n_iter or 1),
        "steps": asked.steps,
        "guidance": asked.cfg_scale,
        "width": asked.width or None,
        "height": asked.height or None,
        "scheduler": scheduler,
        "eta": asked.eta if takes_eta else None,  # A1111 too keeps it from samplers without one
        "clip_skip": _clip_skip(settings.get("CLIP_stop_at_last_layers"), asked.clip_skip),
        "speed": asked.speed or None,
        **_variation(asked),
    }


def _clip_skip(*given: object) -> int | None:
    """Return the first that is over 1: that of the model's own, which is 2 for some, is 1 here."""
    layers = (int(each) for each in map(str, given) if each.isdecimal() and len(each) < 4)  # noqa: PLR2004 - no model has as many
    return next((each for each in layers if each > 1), None)


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


def _hires(
    asked: AskedTxt2Img, common: Mapping[str, Any], facts: ModelFacts, told: list[Degradation]
) -> dict[str, Any]:
    if (asked.hr_checkpoint_name or "").lower() not in _SAME_MODEL:
        msg = "hr_checkpoint_name: the second pass is made with the same model; leave it out."
        raise RefusedError(msg, "hr_checkpoint_name")
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
    first = common["scheduler"]
    return fields | {
        "scale": None if sized else asked.hr_scale or 2.0,
        "hires_width": width,
        "hires_height": height,
        "upscaler": "lanczos" if upscaler.lower() == "none" else upscaler,  # as A1111 takes it
        "hires_steps": asked.hr_second_pass_steps or None,
        "strength": 0.75 if asked.denoising_strength is None else asked.denoising_strength,
        "hires_prompt": asked.hr_prompt or None,
        "hires_negative_prompt": asked.hr_negative_prompt or None,
        "hires_scheduler": _scheduler(
            asked.hr_sampler_name, asked.hr_scheduler, first, facts, told
        ),
        "hires_guidance": asked.hr_cfg,
        "hires_speed": asked.hr_speed or None,
    }


def _over_image(asked: AskedImg2Img, told: list[Degradation]) -> dict[str, Any]:
    images = asked.init_images or []
    if not images:
        msg = "Init image not found"
        raise RefusedError(msg, "init_images", 404)
    if len(images) > 1:
        msg = f"init_images: {len(images)} were sent; send one, and ask once for each."
        raise RefusedError(msg, "init_images")
    if asked.resize_mode == _OF_LATENTS:
        told.append(Degradation("resize_mode", "latents stretched", "the picture stretched"))
    fields: dict[str, Any] = {
        "image": images[0],
        "strength": 0.75 if asked.denoising_strength is None else asked.denoising_strength,
    }
    if not asked.mask:
        return fields | {"kind": "img2img", "fit": fit_of(asked)}
    whole = asked.inpaint_full_res is False
    return fields | {
        "kind": "inpaint",
        "mask": _mask(asked.mask),
        "mask_blur": asked.mask_blur,
        "mask_invert": bool(asked.inpainting_mask_invert),
        "fill": _one_of("inpainting_fill", asked.inpainting_fill or 0, _FILLS),
        "area": "whole" if whole else "masked",
        "padding": asked.inpaint_full_res_padding or 0,
    }


def _mask(sent: str) -> str:
    """Return a mask that is white where to redraw; where it is transparent, that decides alone."""
    try:
        with read_as(BY_VALUE):
            mask = read_picture(sent)
    except ValueError:
        return sent  # the request itself says what is wrong with it
    return write_picture(mask.getchannel("A")) if mask.mode == "RGBA" else sent


def _one_of(name: str, index: int, words: Sequence[Any]) -> Any:
    if not 0 <= index < len(words):
        msg = f"{name}: {index} was sent; there are 0 to {len(words) - 1}."
        raise RefusedError(msg, name)
    return words[index]


def _scheduler(
    sampler: str | None,
    schedule: str | None,
    otherwise: str | None,
    facts: ModelFacts,
    told: list[Degradation],
) -> str | None:
    """
    Return the scheduler that A1111 would run under these names; None: none is asked for.

    Args:
        sampler: A1111's name; behind it may stand that of a schedule.
        schedule: A1111's name.
        otherwise: Is run where a schedule is asked for, but no sampler.
        facts: Of the model, which may not run it.
        told: Gets what is done otherwise.
    """
    wanted, behind = _parted(sampler or "")
    plain = re.sub(r"\s+", " ", (schedule or "").strip().lower())
    if plain in _NO_SCHEDULE and behind:
        plain = behind
    if wanted.lower() in _NO_SAMPLER:
        if plain in _NO_SCHEDULE:
            return None
        name = otherwise or _FIRST_SAMPLER
    else:
        name = _sampler(wanted)
    if name not in facts.schedulers:
        told.append(Degradation("sampler_name", SCHEDULERS[name].label, "the model's own"))
        return None
    if plain in _NO_SCHEDULE:
        return _AUTOMATIC.get(name, name) if plain in {"", "automatic"} else name
    try:
        return with_schedule(name, check_schedule(plain))
    except ValueError:
        label = SCHEDULERS[name].label
        told.append(Degradation("scheduler", f"{plain[:40]} for {label}", label))
        return name


def _sampler(name: str) -> str:
    try:
        return check_scheduler(name)
    except ValueError as error:
        msg = f"Sampler not found: {name[:80]!r}. There are: "
        msg += ", ".join(each.label for each in SAMPLERS.values())
        raise RefusedError(msg, "sampler_name", 404) from error


def _parted(sampler: str) -> tuple[str, str]:
    """Return a sampler's name and that of the schedule behind it, if there is one."""
    sampler = sampler.strip()
    for each in SCHEDULES.values():
        if sampler.lower().endswith(f" {each.label.lower()}"):
            return sampler[: -len(each.label)].strip(), each.label.lower()
    return sampler, ""


def _refuse_scripts(asked: Asked) -> None:
    """Refuse scripts, which would change the image, but for those that are switched off."""
    if asked.script_name and asked.script_name.lower() != "none":
        msg = f"Script '{asked.script_name[:80]}' not found"
        raise RefusedError(msg, "script_name")
    for name, script in (asked.alwayson_scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if not _is_off(arguments):
            msg = f"always on script {name[:80]} not found"
            raise RefusedError(msg, "alwayson_scripts")


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
