"""
Every kind of request as its passes; hires fix is two of them with an upscale in between.

The whole of it stands here: which passes there are, what goes from one into the next, and that the
lifecycle is in the right mode before each of them starts.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from holdfast.engine.images import as_rgb
from holdfast.engine.passes import PassSpec, Source
from holdfast.engine.requests import Hires, Img2Img, Txt2Img
from holdfast.engine.upscale import UPSCALERS, upscale_image
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from holdfast.engine.config import EngineConfig
    from holdfast.engine.model import Model
    from holdfast.engine.requests import Request
    from holdfast.engine.runner import Runner

T = TypeVar("T")
_RANDOM_SEEDS = 2**32


def run_request(
    request: Request, passes: Sequence[PassSpec], runner: Runner
) -> tuple[list[Image.Image], list[Image.Image]]:
    """
    Run a request's passes.

    Args:
        request: What was asked for.
        passes: Of it, from `passes_of`.
        runner: Does what each line below says.

    Returns:
        The images, and those of the first pass (empty for a request of one pass).
    """
    if isinstance(request, Txt2Img):
        return runner.images(passes[0], None), []
    if isinstance(request, Img2Img):
        only = passes[0]
        image = upscale_image(as_rgb(request.image), "lanczos", only.width, only.height)
        return runner.images(only, Source("image", [image] * len(only.seeds))), []

    first, second = passes
    if UPSCALERS[request.upscaler].space == "latent":
        latents = runner.latents(first, None)
        composed = runner.decode(latents)
        source = Source("latent", latents)
    else:
        composed = runner.images(first, None)
        source = Source("image", composed)
    runner.keep_first_pass(composed)
    enlarged = runner.upscale(source, request.upscaler, second)
    return runner.images(second, enlarged), composed


def settle_seeds(request: Request) -> tuple[int, ...]:
    """Return the seed of each image: ``seed + i``, from a random one where none was given."""
    seed = secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed
    return tuple(range(seed, seed + request.batch))


def modes_of(request: Request) -> tuple[Mode, ...]:
    """Return the mode of each pass of a request."""
    if isinstance(request, Hires):
        return (Mode.TXT2IMG, Mode.IMG2IMG)
    return (Mode.IMG2IMG if isinstance(request, Img2Img) else Mode.TXT2IMG,)


def passes_of(
    request: Request, seeds: tuple[int, ...], config: EngineConfig, model: Model
) -> tuple[PassSpec, ...]:
    """
    Settle everything that a request leaves open, and return its passes.

    Raises:
        InvalidRequest: The model cannot make an image of this size.
    """
    natural = (model.scale.default, model.scale.default)
    if isinstance(request, Img2Img):
        natural = as_rgb(request.image).size
    width, height = request.width or natural[0], request.height or natural[1]
    model.check_size(width, height)
    on_cpu = "GPU" not in config.device_of(model.family.denoiser)
    first = PassSpec(
        number=1,
        mode=modes_of(request)[0],
        width=width,
        height=height,
        steps=request.steps,
        strength=request.strength if isinstance(request, Img2Img) else None,
        guidance=request.guidance,
        scheduler=request.scheduler or config.scheduler or model.scheduler_name,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seeds=seeds,
        images_per_inference=config.images_per_inference or (1 if on_cpu else len(seeds)),
    )
    if not isinstance(request, Hires):
        return (first,)
    width, height = request.target(width, height)
    model.check_size(width, height)
    seed = seeds[0] if request.hires_seed is None else request.hires_seed
    second = replace(
        first,
        number=2,
        mode=modes_of(request)[1],
        width=width,
        height=height,
        steps=request.hires_steps or request.steps,
        strength=request.strength,
        guidance=_given(request.hires_guidance, request.guidance),
        scheduler=request.hires_scheduler or first.scheduler,
        prompt=_given(request.hires_prompt, request.prompt),
        negative_prompt=_given(request.hires_negative_prompt, request.negative_prompt),
        seeds=tuple(range(seed, seed + request.batch)),
        loras=request.hires_lora,
    )
    return (first, second)


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
