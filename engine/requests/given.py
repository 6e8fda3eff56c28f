"""
What may be given for each field of settings and requests: for type checkers alone.

Made from the fields by ``make docs``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from holdfast.engine.requests.detail import Detail
    from holdfast.engine.requests.lora import Lora


class EngineShared(TypedDict, total=False):
    """Settings that may change, but the model."""

    device: str | dict[str, str]
    precision: Literal["auto", "f32", "bf16", "f16", "int8", "int8-weights"]
    shapes: Literal["auto", "dynamic", "static"]
    memory_budget: int | str | None
    compiled_cache: bool | None
    lora: Sequence[Lora]
    lora_dir: str | Path | None
    prompt_syntax: Literal["a1111", "plain"]
    embeddings: Sequence[str | Path] | str | Path
    scheduler: str | None
    strict: bool
    properties: dict[str, Any]
    vae: str | Path | None
    policy: Literal["auto", "stage_first", "evict_first"]
    images_per_inference: int | None
    log_prompts: bool
    idle_unload: float | None


class EngineChanges(EngineShared, total=False):
    """Settings that may change."""

    model: str | Path


class EngineSettings(EngineShared, total=False):
    """Settings beside the model."""

    cache_dir: str | Path | None
    cache_limit: int | str
    log_file: str | Path | None
    flight_recorder: str | Path | None
    queue_limit: int
    order: Literal["fair", "fewest_recompiles"]


class EngineFields(EngineChanges, EngineSettings, total=False):
    """All settings."""


class Txt2ImgFields(TypedDict, total=False):
    """Of `Txt2Img`."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    scheduler: str | None
    seed: int | None
    batch: int
    schedule: str | None
    lora: Sequence[Lora] | None
    clip_skip: int | None
    guidance_rescale: float
    eta: float | None
    variation_seed: int | None
    variation_strength: float
    seed_resize: Sequence[int] | None
    speed: Literal["exact", "balanced", "fast"]
    detail: Sequence[Detail] | Detail
    width: int | None
    height: int | None


class Img2ImgOptional(TypedDict, total=False):
    """Of `Img2Img`, what need not be given."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    scheduler: str | None
    seed: int | None
    batch: int
    schedule: str | None
    lora: Sequence[Lora] | None
    clip_skip: int | None
    guidance_rescale: float
    eta: float | None
    variation_seed: int | None
    variation_strength: float
    seed_resize: Sequence[int] | None
    speed: Literal["exact", "balanced", "fast"]
    detail: Sequence[Detail] | Detail
    strength: float
    width: int | None
    height: int | None
    fit: Literal["crop", "fill", "stretch"]


class Img2ImgFields(Img2ImgOptional):
    """Of a new `Img2Img`."""

    image: Image | str | Path


class Img2ImgChanges(Img2ImgOptional, total=False):
    """Of another `Img2Img`."""

    image: Image | str | Path


class InpaintOptional(TypedDict, total=False):
    """Of `Inpaint`, what need not be given."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    scheduler: str | None
    seed: int | None
    batch: int
    schedule: str | None
    lora: Sequence[Lora] | None
    clip_skip: int | None
    guidance_rescale: float
    eta: float | None
    variation_seed: int | None
    variation_strength: float
    seed_resize: Sequence[int] | None
    speed: Literal["exact", "balanced", "fast"]
    detail: Sequence[Detail] | Detail
    mask: Image | str | Path | None
    mask_invert: bool
    mask_blur: float
    fill: Literal["original", "fill", "noise", "nothing"]
    area: Literal["whole", "masked"]
    padding: int
    outpaint: Sequence[int] | int | Mapping[str, int]
    strength: float
    width: int | None
    height: int | None


class InpaintFields(InpaintOptional):
    """Of a new `Inpaint`."""

    image: Image | str | Path


class InpaintChanges(InpaintOptional, total=False):
    """Of another `Inpaint`."""

    image: Image | str | Path


class HiresFields(TypedDict, total=False):
    """Of `Hires`."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    scheduler: str | None
    seed: int | None
    batch: int
    schedule: str | None
    lora: Sequence[Lora] | None
    clip_skip: int | None
    guidance_rescale: float
    eta: float | None
    variation_seed: int | None
    variation_strength: float
    seed_resize: Sequence[int] | None
    speed: Literal["exact", "balanced", "fast"]
    detail: Sequence[Detail] | Detail
    image: Image | str | Path | None
    first_strength: float
    first_pass: Sequence[Image | str | Path] | Image | str | Path | None
    width: int | None
    height: int | None
    scale: float | None
    hires_width: int | None
    hires_height: int | None
    fit: Literal["crop", "fill", "stretch"]
    upscaler: str
    hires_steps: int | None
    strength: float
    hires_prompt: str | None
    hires_negative_prompt: str | None
    hires_scheduler: str | None
    hires_guidance: float | None
    hires_seed: int | None
    hires_lora: Sequence[Lora] | None
    hires_model: str | Path | None
    hires_speed: Literal["exact", "balanced", "fast"] | None


class DetailFields(TypedDict, total=False):
    """Of `Detail`."""

    image: Image | str | Path | None
    boxes: Sequence[Sequence[int]]
    masks: Sequence[Image | str | Path]
    largest: int | None
    dilation: int
    mask_blur: float
    padding: int
    fill: Literal["original", "fill", "noise", "nothing"]
    prompt: str
    negative_prompt: str
    strength: float
    steps: int | None
    guidance: float | None
    scheduler: str | None
    seed: int | None
    batch: int
    lora: Sequence[Lora] | None
    speed: Literal["exact", "balanced", "fast"] | None
    width: int | None
    height: int | None
