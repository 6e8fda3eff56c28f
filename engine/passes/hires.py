"""
Every kind of request as its passes; hires fix is two of them with an upscale in between.

The whole of it stands here: which passes there are, what goes from one into the next, and that the
lifecycle is in the right mode before each of them starts.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.passes.images import as_rgb
from holdfast.engine.passes.masks import canvas, region_of, region_of_detail
from holdfast.engine.passes.noise import THE_SEEDS_OWN, Variation
from holdfast.engine.passes.one_pass import PassSpec, Source
from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.schedulers import SCHEDULERS, check_eta, with_schedule
from holdfast.engine.requests.txt2img import Txt2Img
from holdfast.engine.requests.upscalers import UPSCALERS, upscale_image
from holdfast.engine.requests.values import SEEDS
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.masks import Region
    from holdfast.engine.passes.runner import Runner
    from holdfast.engine.requests.config import EngineConfig
    from holdfast.engine.requests.kinds import Request

    Models = Callable[[str | Path | None], Model]
    Drawn = Txt2Img | Img2Img | Inpaint | Hires

T = TypeVar("T")
_RANDOM_SEEDS = 2**32
_STEPS, _GUIDANCE = 20, 7.0


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
        The images, and those of the first pass (empty where nothing was enlarged).
    """
    ahead = list(passes)
    first_pass: list[Image.Image] = []
    if isinstance(request, Txt2Img):
        images = runner.images(ahead.pop(0), None)
    elif isinstance(request, Img2Img):
        only = ahead.pop(0)
        images = runner.images(only, _begun(request.image, only, request))
    elif isinstance(request, Inpaint):
        only = ahead.pop(0)
        images = runner.redraw(only, [canvas(request)] * len(only.seeds))
    elif isinstance(request, Detail):
        images = [_picture(request)] * len(passes[0].seeds)
    else:
        images, first_pass = _hires(request, ahead, runner)
    for each in ahead:  # of the details, whose regions follow one another
        images = runner.redraw(each, images)
    return images, first_pass


def _hires(
    request: Hires, ahead: list[PassSpec], runner: Runner
) -> tuple[list[Image.Image], list[Image.Image]]:
    if request.first_pass is not None:
        composed = [as_rgb(each) for each in request.first_pass]
        source = Source("image", composed)
    elif UPSCALERS[request.upscaler].space == "latent":
        first = ahead.pop(0)
        latents = runner.latents(first, _begun(request.image, first, request))
        composed = runner.decode(latents)
        source = Source("latent", latents)
    else:
        first = ahead.pop(0)
        composed = runner.images(first, _begun(request.image, first, request))
        source = Source("image", composed)
    runner.keep_first_pass(composed)
    second = ahead.pop(0)
    enlarged = runner.upscale(source, request, second)
    return runner.images(second, enlarged), composed


def _begun(image: Image.Image | None, spec: PassSpec, request: Img2Img | Hires) -> Source | None:
    """Return what a pass over a picture begins with: that at its size; None without one."""
    if image is None:
        return None
    size = (spec.width, spec.height)
    brought = upscale_image(as_rgb(image), "lanczos", size, request.fit)
    return Source("image", [brought] * len(spec.seeds))


def settle_seeds(request: Request) -> tuple[int, ...]:
    """Return the seed of each image: ``seed + i``, from a random one where none was given."""
    seed = secrets.randbelow(_RANDOM_SEEDS) if request.seed is None else request.seed
    return tuple(range(seed, seed + request.batch))


def modes_of(request: Request) -> tuple[Mode, ...]:
    """Return the modes that a request goes through."""
    if isinstance(request, Detail):
        return (Mode.INPAINT,)
    if isinstance(request, Hires):
        over = request.image is not None or request.first_pass is not None
        modes = (Mode.IMG2IMG,) if over else (Mode.TXT2IMG, Mode.IMG2IMG)
    else:
        modes = (Mode(request.kind),)
    return (*modes, Mode.INPAINT) if request.detail else modes


def passes_of(
    request: Request, seeds: tuple[int, ...], config: EngineConfig, models: Models
) -> tuple[PassSpec, ...]:
    """
    Settle everything that a request leaves open, and return its passes.

    Args:
        request: What was asked for.
        seeds: Of it, from `settle_seeds`.
        config: The engine's settings.
        models: Returns the model of a name, and for None the engine's.

    Raises:
        InvalidRequest: The model cannot make an image of this size, or a region has no place in
            it.
    """
    model = models(None)
    plain = _plain(request, seeds, config, model)
    passes = list(_passes(request, plain, models))
    last = passes[-1] if passes else plain
    if isinstance(request, Detail):
        passes += _details((request,), plain, _picture(request).size, model)
    elif request.detail:
        size = request.size if isinstance(request, Inpaint) else (last.width, last.height)
        likewise = replace(plain, model=last.model, loras=last.loras)
        passes += _details(request.detail, likewise, size, models(last.model))
    for each in passes:
        models(each.model).check_size(each.width, each.height)
    return tuple(
        replace(each, number=number, eta=_eta(each)) for number, each in enumerate(passes, start=1)
    )


def _plain(
    request: Request, seeds: tuple[int, ...], config: EngineConfig, model: Model
) -> PassSpec:
    """Return a pass of what all of a request's have in common, at the model's own size."""
    on_cpu = "GPU" not in config.device_of(model.family.denoiser)
    if isinstance(request, Detail):
        request = _as_plain(request)
    scheduler = _scheduler(request, config, model)
    if request.eta is not None:
        _check(check_eta, model.scheduler_label(scheduler))
    return PassSpec(
        number=1,
        mode=Mode.TXT2IMG,
        width=model.scale.default[0],
        height=model.scale.default[1],
        steps=request.steps,
        strength=None,
        guidance=request.guidance,
        scheduler=scheduler,
        sampler=model.scheduler_label(scheduler),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seeds=seeds,
        loras=request.lora,
        clip_skip=request.clip_skip,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        variation=_variation(request, model),
        images_per_inference=config.images_per_inference or (1 if on_cpu else len(seeds)),
        speed=request.speed,
    )


def _as_plain(detail: Detail) -> Txt2Img:
    """Return what a detail that stands alone has in common with other requests."""
    return Txt2Img(
        prompt=detail.prompt,
        negative_prompt=detail.negative_prompt,
        steps=detail.steps or _STEPS,
        guidance=_given(detail.guidance, _GUIDANCE),
        scheduler=detail.scheduler,
        lora=detail.lora,
        speed=detail.speed or "exact",
    )


def _passes(request: Request, plain: PassSpec, models: Models) -> Iterator[PassSpec]:
    """Yield a request's passes over whole images."""
    if isinstance(request, Txt2Img):
        width, height = request.width or plain.width, request.height or plain.height
        yield replace(plain, width=width, height=height)
    elif isinstance(request, Img2Img):
        yield _over(plain, request.size, request.strength)
    elif isinstance(request, Inpaint):
        region = region_of(request, models(None).scale)
        yield _within(plain, region, request.strength)
    elif isinstance(request, Hires):
        size = request.first_size((plain.width, plain.height))
        if request.image is not None:
            yield _over(plain, size, request.first_strength)
        elif request.first_pass is None:
            yield replace(plain, width=size[0], height=size[1])
        yield _second(request, plain, size, models(request.hires_model))


def _second(request: Hires, plain: PassSpec, size: tuple[int, int], model: Model) -> PassSpec:
    fixed, scheduler = request.hires_seed, request.hires_scheduler or plain.scheduler
    return replace(
        _over(plain, request.target(*size), request.strength),
        steps=request.hires_steps or request.steps,
        guidance=_given(request.hires_guidance, request.guidance),
        scheduler=scheduler,
        sampler=model.scheduler_label(scheduler),
        prompt=_given(request.hires_prompt, request.prompt),
        negative_prompt=_given(request.hires_negative_prompt, request.negative_prompt),
        seeds=plain.seeds if fixed is None else (fixed,) * len(plain.seeds),
        loras=_given(request.hires_lora, request.lora),
        steps_before=request.steps,
        model=request.hires_model,
        speed=request.hires_speed or request.speed,
    )


def _details(
    details: Sequence[Detail], plain: PassSpec, size: tuple[int, int], model: Model
) -> Iterator[PassSpec]:
    """Yield one pass for each region, on pictures of a size."""
    for detail in details:
        try:
            regions = detail.regions(size)
        except ValueError as error:
            msg = f"The detail cannot be made as asked: {error}."
            raise InvalidRequest(msg) from error
        scheduler = detail.scheduler or plain.scheduler
        for index, selection in enumerate(regions):
            region = region_of_detail(selection, detail, model.scale)
            fixed = None if detail.image is not None else detail.seed
            seeds = plain.seeds if fixed is None else (fixed,) * len(plain.seeds)
            yield replace(
                _within(plain, region, detail.strength),
                steps=detail.steps or plain.steps,
                guidance=_given(detail.guidance, plain.guidance),
                scheduler=scheduler,
                sampler=model.scheduler_label(scheduler),
                prompt=_part(detail.prompt, index) or plain.prompt,
                negative_prompt=_part(detail.negative_prompt, index) or plain.negative_prompt,
                seeds=tuple((seed + index) % SEEDS for seed in seeds),
                loras=_given(detail.lora, plain.loras),
                variation=THE_SEEDS_OWN,
                speed=detail.speed or plain.speed,
            )


def _part(prompt: str, index: int) -> str:
    """Return the prompt of a region; the last part is that of all which have none."""
    parts = [part.strip() for part in prompt.split("[SEP]")]
    return parts[min(index, len(parts) - 1)]


def _over(plain: PassSpec, size: tuple[int, int], strength: float) -> PassSpec:
    return replace(plain, mode=Mode.IMG2IMG, width=size[0], height=size[1], strength=strength)


def _within(plain: PassSpec, region: Region, strength: float) -> PassSpec:
    width, height = region.size
    return replace(
        plain, mode=Mode.INPAINT, width=width, height=height, strength=strength, region=region
    )


def _picture(request: Detail) -> Image.Image:
    if request.image is None:
        msg = (
            "A Detail was asked for without an image. Give it one, or give it as detail= to a "
            "request that makes one."
        )
        raise InvalidRequest(msg)
    return as_rgb(request.image)


def _scheduler(request: Drawn, config: EngineConfig, model: Model) -> str | None:
    """Return the scheduler of the first pass; None for the model's own, as it is."""
    asked = request.scheduler or config.scheduler
    if request.schedule is None:
        return asked
    own = model.scheduler_label(asked)
    if own not in SCHEDULERS:
        msg = (
            f"schedule={request.schedule!r} was asked for, but the model's own scheduler is {own}, "
            "which has none but its own. Ask for a scheduler as well."
        )
        raise InvalidRequest(msg)
    return _check(with_schedule, own, request.schedule)


def _check(made: Callable[..., T], *arguments: Any) -> T:
    """Return what is made, or say why the request cannot be."""
    try:
        return made(*arguments)
    except ValueError as error:
        raise InvalidRequest(f"{error}.") from error


def _eta(spec: PassSpec) -> float | None:
    """Return the share of fresh noise of a pass: as asked for, where its sampler takes one."""
    usual = SCHEDULERS[spec.sampler].eta if spec.sampler in SCHEDULERS else None
    return None if usual is None else _given(spec.eta, usual)


def _variation(request: Drawn, model: Model) -> Variation:
    resize = request.seed_resize
    if resize is not None:
        model.check_size(*resize)
        resize = (resize[0] // model.scale.factor, resize[1] // model.scale.factor)
    return Variation(request.variation_seed or 0, request.variation_strength, resize)


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value
