"""One denoising pass, and the VAE both ways."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.engine.compiling.faults import generation_errors
from holdfast.engine.errors import GenerationError
from holdfast.engine.imports import quiet
from holdfast.engine.models.families import VAE_DECODER, VAE_ENCODER, Geometry
from holdfast.engine.passes.guidance import cadence_of, guided
from holdfast.engine.passes.images import digest
from holdfast.engine.passes.late_start import begin_late
from holdfast.engine.passes.masks import Region, binary
from holdfast.engine.passes.noise import THE_SEEDS_OWN, Variation
from holdfast.engine.passes.reading import NOTHING, Reading
from holdfast.engine.requests.cadence import Evaluations, counted
from holdfast.engine.requests.schedulers import SCHEDULERS, flow_length, schedule_length
from holdfast.engine.requests.told import told_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from holdfast.engine.jobs.job import Job
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.families import Family
    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.prompts import Conditioning
    from holdfast.engine.passes.views import View
    from holdfast.engine.requests.lora import Lora
    from holdfast.engine.requests.values import Speed
    from holdfast.states import Mode

    StepHook = Callable[["PassSpec", int, int, torch.Tensor], None]

    class Encode(Protocol):
        """Turns an image into latents: see `encode`, whose `view` it knows."""

        def __call__(
            self,
            image: Image.Image,
            generator: torch.Generator,
            hidden: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """Encode."""


@dataclass(frozen=True)
class PassSpec:
    """
    One pass, with everything settled.

    Attributes:
        number: 1, 2, ... in the order of the request.
        mode: What it must run as.
        width: Pixels.
        height: Pixels.
        steps: That are run, exactly.
        strength: Share of the schedule; None where it begins with noise alone.
        guidance: Classifier-free guidance scale.
        scheduler: A key of `SCHEDULERS`, or None for the model's own.
        sampler: What that is called: such a key, or a class of diffusers.
        prompt: What to draw.
        negative_prompt: What to keep away from.
        seeds: One for each image.
        loras: In place of the engine's, or None.
        steps_before: Of the request's pass before this one, 0 for the first.
        reading: What the prompts say.
        chunks: Of the prompt, as the denoiser is told it.
        clip_skip: Layer of the text encoders that is read, from the end; None: the model's own.
        guidance_rescale: Share of guidance's gain in contrast that is taken back.
        eta: Share of fresh noise in each step; None where the sampler takes none.
        variation: What is made of the seeds' noise.
        images_per_inference: How many go through the denoiser at once, at most.
        region: What of each picture it redraws, or None.
        model: In place of the engine's, or None.
        speed: How many of its evaluations are whole.
    """

    number: int
    mode: Mode
    width: int
    height: int
    steps: int
    strength: float | None
    guidance: float
    scheduler: str | None
    sampler: str
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    loras: tuple[Lora, ...] | None = None
    steps_before: int = 0
    reading: Reading = NOTHING
    chunks: int = 1
    clip_skip: int | None = None
    guidance_rescale: float = 0.0
    eta: float | None = None
    variation: Variation = THE_SEEDS_OWN
    images_per_inference: int = 1
    region: Region | None = None
    model: str | Path | None = None
    speed: Speed = "exact"

    @property
    def geometry(self) -> Geometry:
        """What a static shape of this pass depends on."""
        batch = len(self.seeds)  # split evenly: a static graph takes no smaller rest
        images = max(n for n in range(1, self.images_per_inference + 1) if batch % n == 0)
        apart = self.speed != "exact"  # so that the prompt can go through the graph alone
        return Geometry(self.width, self.height, images, self.guidance, self.chunks, apart)


@dataclass(frozen=True)
class Source:
    """
    What a pass starts from that does not start from noise alone.

    Attributes:
        kind: ``"image"`` or ``"latent"``.
        values: One image, or one latent tensor (1, C, H, W), for each seed.
    """

    kind: str
    values: Sequence[Any]


def run_pass(
    spec: PassSpec,
    view: View,
    model: Model,
    *,
    prompts: Conditioning,
    source: Source | None,
    encode: Encode,
    finish: Callable[[list[torch.Tensor]], list[Any]],
    job: Job[Any],
    emit: Emitter,
    on_step: StepHook,
) -> tuple[list[Any], Evaluations]:
    """
    Denoise: one output for each seed of `spec`, and the evaluations that each took.

    Image i starts from the noise of a fresh generator with seed i, so that it does not depend on
    which others are made with it.

    Args:
        spec: What to run.
        view: Runs it; `check_view` has made sure of it.
        model: Gives the scheduler.
        prompts: What the denoiser is told.
        source: What it starts from; None: noise alone.
        encode: See `encode`.
        finish: Turns latents (1, C, H, W) into what the pass gives.
        job: Told each step; stops the pass between two steps and within one.
        emit: Told each step.
        on_step: Called after each step with `spec`, its number, their count, and the latents.

    Raises:
        GenerationError: The pipeline failed.
        Cancelled: The job was stopped.
    """
    import torch

    family, chunk = model.family, spec.geometry.images
    outputs: list[torch.Tensor] = []
    whole: tuple[bool, ...] = ()
    told = 0
    phase = f"pass {spec.number}"
    began = time.perf_counter()
    chunks = [spec.seeds[first : first + chunk] for first in range(0, len(spec.seeds), chunk)]

    def at_step_end(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal began, told, whole
        whole = whole if index else cadence_of(spec, family, pipe.num_timesteps)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        # Some schedulers evaluate more often than they step.
        step = spec.steps * (index + 1) // pipe.num_timesteps
        done, steps = len(outputs) // chunk * spec.steps + step, spec.steps * len(chunks)
        job.advance(phase, pass_number=spec.number, step=done, steps=steps)
        emit(
            "step.completed",
            step=step, steps=spec.steps, image=len(outputs), seconds=round(seconds, 6),
            evaluation="whole" if whole[index] else "cheap",
        )  # fmt: skip
        if done > told:
            told = done
            on_step(spec, done, steps, family.unpack(tensors["latents"], spec.height, spec.width))
        job.checkpoint("step")
        return tensors

    with (
        emit.scope(**{"pass": spec.number}, mode=str(spec.mode)),
        emit.span("pass", **_facts(spec, view, source)) as learned,
        generation_errors("denoise"),
    ):
        for seeds in chunks:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            begun: dict[str, Any] = {"width": spec.width, "height": spec.height}
            if source is not None:
                values = source.values[len(outputs) :][: len(seeds)]
                begun = _begin(spec, Source(source.kind, values), generators, encode, model)
            scheduler = model.scheduler(spec.scheduler, spec.steps, spec.strength or 1.0, view.mode)
            view.pipeline.scheduler = scheduler
            if family.schedulers and source is not None:
                noise = _first_noise(spec, model, seeds, generators)
                latents = begin_late(scheduler, spec.steps, family.pack(begun["image"]), noise)
                begun = {"latents": latents, "width": spec.width, "height": spec.height}
            elif spec.variation.changes and source is None:
                begun["latents"] = _first_noise(spec, model, seeds, generators)
            elif spec.variation.changes:
                spec.variation.apply_to(scheduler, seeds)
            began = time.perf_counter()
            embedded = {n: _repeated(rows, len(seeds)) for n, rows in prompts.first.items()}
            with guided(view, spec, prompts, len(seeds)):
                latents = view(
                    **begun,
                    num_inference_steps=_length(spec, family),
                    **embedded,
                    **{family.guidance.argument: spec.guidance},
                    **family.settings,
                    **({} if spec.eta is None else {"eta": spec.eta}),
                    generator=generators,
                    callback_on_step_end=at_step_end,
                )
            outputs += [*family.unpack_output(latents, spec.height, spec.width)[:, None]]
        view.relax()
        refuse_broken(outputs, view, model.family.denoiser)
        made = counted(whole)
        rows, columns = outputs[0].shape[-2:]
        learned |= {
            "evaluations": len(whole),
            "whole": made.whole,
            "cheap": made.cheap,
            "width": columns * model.scale.factor,
            "height": rows * model.scale.factor,
        }
        given = finish(outputs)
        learned["output_digest"] = digest(given)
    return given, made


def _first_noise(
    spec: PassSpec, model: Model, seeds: Sequence[int], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Draw what the pipeline would, and vary it."""
    import torch

    height, width = spec.height // model.scale.factor, spec.width // model.scale.factor
    shape = model.family.noise_shape((1, model.scale.channels, height, width))
    drawn = torch.cat([torch.randn(shape, generator=each) for each in generators])
    varied = spec.variation.of(drawn, seeds) if spec.variation.changes else drawn
    return model.family.pack_noise(varied)


def refuse_broken(outputs: Iterable[torch.Tensor], view: View, component: str) -> None:
    """
    Refuse what leaves a component and holds no numbers: it would end as a black image.

    Raises:
        GenerationError: Some value is not finite.
    """
    if all(bool(each.isfinite().all()) for each in outputs):
        return
    precision = view.components[component].precision
    advice = (
        "Its weights are damaged, or made for other inputs: use another one"
        if precision == "f32"
        else "Use precision='f32'"
    )
    msg = (
        f"{component}, which computes in {precision}, gave values that are not finite; the image "
        f"would be black. {advice}, or another scheduler or guidance."
    )
    raise GenerationError(msg)


def _repeated(rows: Any, count: int) -> Any:
    """Return a row for each image: of a tensor, or of the list that ragged rows come as."""
    if rows is None:
        return None
    return rows * count if isinstance(rows, list) else rows.repeat_interleave(count, 0)


def _begin(
    spec: PassSpec,
    source: Source,
    generators: Sequence[torch.Generator],
    encode: Encode,
    model: Model,
) -> dict[str, Any]:
    """
    Return what the pipeline takes of pictures: their latents, and which part of them is redrawn.

    A generator draws what diffusers draws with it, in the same order: the picture's latents, the
    noise (in the pipeline), and the latents of the picture without what is redrawn.
    """
    import torch

    region, strength = spec.region, 1.0 if spec.strength is None else spec.strength
    shape = model.latent_shape(spec.width, spec.height)
    if source.kind == "latent":
        starts = list(source.values)
    elif region is not None and model.sees_masks and strength == 1:  # noise alone is what it sees
        starts = [torch.zeros(shape) for _ in generators]
    else:
        starts = [encode(*each) for each in zip(source.values, generators, strict=True)]
    if region is None:
        return {"image": torch.cat(starts), "strength": strength}

    mask = torch.from_numpy(binary(region.cut_mask))[None, None]
    hidden = [torch.zeros(shape) for _ in generators]
    if model.sees_masks:
        hidden = [
            encode(picture, _past_noise(generator, shape), mask)
            for picture, generator in zip(source.values, generators, strict=True)
        ]
    if region.fill in ("noise", "nothing"):
        small = torch.nn.functional.interpolate(mask, size=shape[-2:])
        for index, generator in enumerate(generators):
            noise = torch.zeros(shape)
            if region.fill == "noise":
                fresh = torch.Generator().manual_seed(generator.initial_seed())
                noise = torch.randn(shape, generator=fresh)
            starts[index] = starts[index] * (1 - small) + noise * small
    return {
        "image": torch.cat(starts),
        "mask_image": mask,
        "masked_image_latents": torch.cat(hidden),
        "strength": strength,
        "width": spec.width,
        "height": spec.height,
    }


def _past_noise(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Generator:
    """Return a generator that stands where this one will have drawn the noise of one image."""
    import torch

    later = torch.Generator().set_state(generator.get_state())
    torch.randn(shape, generator=later)
    return later


def _length(spec: PassSpec, family: Family) -> int:
    """Return the length of the schedule of which a pass runs its steps."""
    if family.schedulers:
        return flow_length(spec.steps, 1.0 if spec.strength is None else spec.strength)
    if spec.strength is None or spec.mode in family.runs_whole_schedule:
        return spec.steps
    return schedule_length(spec.steps, spec.strength)


def _facts(spec: PassSpec, view: View, source: Source | None) -> dict[str, Any]:
    return {
        "pass": spec.number,
        "mode": str(spec.mode),
        "pipeline": view.class_name,
        "width": spec.width,
        "height": spec.height,
        "steps": spec.steps,
        "strength": spec.strength,
        "scheduler": spec.sampler if spec.sampler in SCHEDULERS else None,
        "guidance": spec.guidance,
        "seeds": list(spec.seeds),
        "lora": sorted({str(use) for part in view.components.values() for use in part.key.lora}),
        "input": "none" if source is None else source.kind,
        "input_digest": None if source is None else digest(source.values),
        "images": len(spec.seeds),
        **({} if spec.region is None else spec.region.facts),
        **({} if spec.model is None else {"model": told_path(spec.model)}),
    }


def decode_latents(view: View, latents: torch.Tensor) -> torch.Tensor:
    """Turn latents (1, C, h, w) as the denoiser sees them into pixels (1, 3, H, W) in -1 to 1."""
    import torch

    factor, offset = (torch.from_numpy(e) for e in (view.latents.factor, view.latents.offset))
    scaled = latents / factor + offset
    if VAE_DECODER in view.tiled:
        return torch.from_numpy(view.tiled[VAE_DECODER].decode(scaled.numpy()))
    framed = scaled[:, :, None] if view.has_frames else scaled
    pixels: torch.Tensor = view.pipeline.vae.decode(framed, return_dict=False)[0]
    return pixels[:, :, 0] if view.has_frames else pixels


def encode_pixels(view: View, pixels: torch.Tensor) -> torch.Tensor:
    """
    Turn pixels (1, 3, H, W) in -1 to 1 into the moments (1, 2 C, h, w) of their latents.

    Earlier exports draw from them themselves, and give latents (1, C, h, w).
    """
    import torch

    if VAE_ENCODER in view.tiled:
        return torch.from_numpy(view.tiled[VAE_ENCODER].encode(pixels.numpy()))
    encoded = view.pipeline.vae.encode(pixels[:, :, None] if view.has_frames else pixels)
    found = encoded.latent_dist.parameters if "latent_dist" in encoded else encoded.latents
    moments: torch.Tensor = found
    return moments[:, :, 0] if view.has_frames else moments


def decode(latents: torch.Tensor, view: View) -> Image.Image:
    """
    Turn latents (1, C, h, w) into an image.

    Args:
        latents: As the denoiser sees them.
        view: Runs it.

    Raises:
        GenerationError: The VAE decoder failed, or gave pixels that are no numbers.
    """
    with generation_errors("decode latents"), quiet():
        pixels = decode_latents(view, latents)
        refuse_broken([pixels], view, VAE_DECODER)
        images: list[Image.Image] = view.pipeline.image_processor.postprocess(pixels)
    view.relax()
    return images[0]


def encode(
    image: Image.Image, generator: torch.Generator, view: View, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Turn an image into latents (1, C, h, w), drawn from the VAE's posterior with `generator`.

    Args:
        image: RGB.
        generator: Draws.
        view: Runs it.
        hidden: Mask (1, 1, H, W) of what is grey instead, or None.

    Raises:
        GenerationError: The VAE encoder failed, or gave latents that are no numbers.
    """
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    with generation_errors("encode the image"), quiet():
        pixels = view.pipeline.image_processor.preprocess(image)
        moments = encode_pixels(view, pixels if hidden is None else pixels * (1 - hidden))
        refuse_broken([moments], view, VAE_ENCODER)
        factor, offset = view.latents.factor, view.latents.offset
        is_drawn = moments.shape[1] == factor.shape[1]
        drawn = moments if is_drawn else DiagonalGaussianDistribution(moments).sample(generator)
        latents: torch.Tensor = (drawn - torch.from_numpy(offset)) * torch.from_numpy(factor)
    view.relax()
    return latents


def decode_array(latents: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """Turn latents (N, C, H, W) into pixels (N, 3, height, width) in -1 to 1, as arrays."""
    import numpy as np
    import torch

    rows = (torch.from_numpy(each[None].copy()) for each in latents)
    return np.concatenate([decode_latents(view, each).numpy() for each in rows])
