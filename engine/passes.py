"""One denoising pass, and the VAE both ways."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import GenerationError
from holdfast.engine.families import VAE_DECODER, VAE_ENCODER, Geometry
from holdfast.engine.faults import generation_errors
from holdfast.engine.images import digest
from holdfast.engine.imports import quiet
from holdfast.engine.schedulers import schedule_length
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from holdfast.engine.events import Emitter
    from holdfast.engine.families import Family
    from holdfast.engine.jobs import Job
    from holdfast.engine.model import Model
    from holdfast.engine.requests import Lora
    from holdfast.engine.views import View

    StepHook = Callable[["PassSpec", int, int, torch.Tensor], None]


@dataclass(frozen=True)
class PassSpec:
    """
    One pass, with everything settled.

    Attributes:
        number: 1 or 2.
        mode: What it must run as.
        width: Pixels.
        height: Pixels.
        steps: That are run, exactly.
        strength: Of img2img; None for txt2img.
        guidance: Classifier-free guidance scale.
        scheduler: A key of `SCHEDULERS`, or None for the model's own.
        prompt: What to draw.
        negative_prompt: What to keep away from.
        seeds: One for each image.
        loras: In place of the engine's, or None.
        images_per_inference: How many go through the denoiser at once, at most.
    """

    number: int
    mode: Mode
    width: int
    height: int
    steps: int
    strength: float | None
    guidance: float
    scheduler: str | None
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    loras: tuple[Lora, ...] | None = None
    images_per_inference: int = 1

    @property
    def geometry(self) -> Geometry:
        """What a static shape of this pass depends on."""
        batch = len(self.seeds)  # split evenly: a static graph takes no smaller rest
        images = max(n for n in range(1, self.images_per_inference + 1) if batch % n == 0)
        return Geometry(self.width, self.height, images, guided=self.guidance > 1)


@dataclass(frozen=True)
class Source:
    """
    What an img2img pass starts from.

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
    prompts: Mapping[str, torch.Tensor],
    source: Source | None,
    encode: Callable[[Image.Image, torch.Generator], torch.Tensor],
    finish: Callable[[list[torch.Tensor]], list[Any]],
    job: Job[Any],
    emit: Emitter,
    on_step: StepHook,
) -> list[Any]:
    """
    Denoise: one output for each seed of `spec`.

    Image i starts from the noise of a fresh generator with seed i, so that it does not depend on
    which others are made with it.

    Args:
        spec: What to run.
        view: Runs it; `check_view` has made sure of it.
        model: Gives the scheduler.
        prompts: Embeddings by the pipeline's argument names, one row each.
        source: What img2img starts from; None for txt2img.
        encode: Turns an image into latents, drawing from the generator.
        finish: Turns latents (1, C, H, W) into what the pass gives.
        job: Told each step; stops the pass between two steps and within one.
        emit: Told each step.
        on_step: Called after each step with `spec`, its number, their count, and the latents.

    Raises:
        GenerationError: The pipeline failed.
        Cancelled: The job was stopped.
    """
    import torch

    chunk = spec.geometry.images
    outputs: list[torch.Tensor] = []
    evaluations = 0
    phase = f"pass {spec.number}"
    began = time.perf_counter()
    chunks = [spec.seeds[first : first + chunk] for first in range(0, len(spec.seeds), chunk)]

    def at_step_end(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal evaluations, began
        evaluations += 1
        seconds, began = time.perf_counter() - began, time.perf_counter()
        done = min(len(outputs) // chunk * spec.steps + index + 1, spec.steps * len(chunks))
        job.advance(phase, pass_number=spec.number, step=done, steps=spec.steps * len(chunks))
        emit(
            "step.completed",
            step=index + 1, steps=spec.steps, image=len(outputs), seconds=round(seconds, 6),
        )  # fmt: skip
        on_step(spec, done, spec.steps * len(chunks), tensors["latents"])
        job.checkpoint("step")
        return tensors

    with (
        emit.scope(**{"pass": spec.number}, mode=str(spec.mode)),
        emit.span("pass", **_facts(spec, view, source)) as learned,
        generation_errors("denoise"),
    ):
        for seeds in chunks:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            starts = [] if source is None else source.values[len(outputs) :][: len(seeds)]
            if source is not None and source.kind == "image":
                starts = [encode(*each) for each in zip(starts, generators, strict=True)]
            scheduler = model.scheduler(spec.scheduler)
            view.pipeline.scheduler = scheduler
            began = time.perf_counter()
            latents = view(
                **_arguments(spec, view.mode, starts, model.family),
                **{name: rows.repeat_interleave(len(seeds), 0) for name, rows in prompts.items()},
                guidance_scale=spec.guidance,
                generator=generators,
                callback_on_step_end=at_step_end,
            )
            outputs += latents.split(1)
        view.relax()
        _refuse_broken(outputs)
        learned["evaluations"] = evaluations // len(chunks)
        rows, columns = outputs[0].shape[-2:]
        learned["width"] = columns * model.scale.factor
        learned["height"] = rows * model.scale.factor
        given = finish(outputs)
        learned["output_digest"] = digest(given)
    return given


def _refuse_broken(outputs: Sequence[torch.Tensor]) -> None:
    """Refuse latents that hold no numbers: they would decode to a black image without a word."""
    if not all(bool(each.isfinite().all()) for each in outputs):
        msg = (
            "The denoiser computed values that are not finite, which would give a black image. Use "
            "precision='f32', or another scheduler or guidance."
        )
        raise GenerationError(msg)


def _arguments(spec: PassSpec, mode: Mode, starts: Sequence[Any], family: Family) -> dict[str, Any]:
    """Return what this kind of pipeline takes beside prompt and guidance."""
    import torch

    if mode is Mode.TXT2IMG:
        size = {"width": spec.width, "height": spec.height}
        return {"num_inference_steps": spec.steps, **size}
    strength = 1.0 if spec.strength is None else spec.strength
    return {
        "image": torch.cat(list(starts)),
        "strength": strength,
        "num_inference_steps": (
            spec.steps if family.runs_whole_schedule else schedule_length(spec.steps, strength)
        ),
    }


def _facts(spec: PassSpec, view: View, source: Source | None) -> dict[str, Any]:
    return {
        "pass": spec.number,
        "mode": str(spec.mode),
        "pipeline": view.class_name,
        "width": spec.width,
        "height": spec.height,
        "steps": spec.steps,
        "strength": spec.strength,
        "scheduler": spec.scheduler,
        "guidance": spec.guidance,
        "lora": sorted({str(use) for part in view.components.values() for use in part.key.lora}),
        "input": "none" if source is None else source.kind,
        "input_digest": None if source is None else digest(source.values),
        "images": len(spec.seeds),
    }


def decode_latents(view: View, latents: torch.Tensor) -> torch.Tensor:
    """Turn latents (1, C, h, w) as the denoiser sees them into pixels (1, 3, H, W) in -1 to 1."""
    import torch

    vae = view.pipeline.vae
    scaled = latents / vae.config.scaling_factor
    if VAE_DECODER in view.tiled:
        return torch.from_numpy(view.tiled[VAE_DECODER].decode(scaled.numpy()))
    pixels: torch.Tensor = vae.decode(scaled, return_dict=False)[0]
    return pixels


def encode_pixels(view: View, pixels: torch.Tensor) -> torch.Tensor:
    """Turn pixels (1, 3, H, W) in -1 to 1 into the moments (1, 2 C, h, w) of their latents."""
    import torch

    if VAE_ENCODER in view.tiled:
        return torch.from_numpy(view.tiled[VAE_ENCODER].encode(pixels.numpy()))
    moments: torch.Tensor = view.pipeline.vae.encode(pixels).latent_dist.parameters
    return moments


def decode(latents: torch.Tensor, view: View) -> Image.Image:
    """
    Turn latents (1, C, h, w) into an image.

    Args:
        latents: As the denoiser sees them.
        view: Runs it.

    Raises:
        GenerationError: The VAE decoder failed.
    """
    with generation_errors("decode latents"), quiet():
        pixels = decode_latents(view, latents)
        images: list[Image.Image] = view.pipeline.image_processor.postprocess(pixels)
    view.relax()
    return images[0]


def encode(image: Image.Image, generator: torch.Generator, view: View) -> torch.Tensor:
    """
    Turn an image into latents (1, C, h, w), drawn from the VAE's posterior with `generator`.

    Args:
        image: RGB.
        generator: Draws.
        view: Runs it.

    Raises:
        GenerationError: The VAE encoder failed.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    with generation_errors("encode the image"), quiet():
        moments = encode_pixels(view, view.pipeline.image_processor.preprocess(image))
        drawn = DiagonalGaussianDistribution(moments).sample(generator)
        latents: torch.Tensor = drawn * view.pipeline.vae.config.scaling_factor
    view.relax()
    return latents


def decode_array(latents: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """Turn latents (N, C, H, W) into pixels (N, 3, height, width) in -1 to 1, as arrays."""
    import numpy as np
    import torch

    rows = (torch.from_numpy(each[None].copy()) for each in latents)
    return np.concatenate([decode_latents(view, each).numpy() for each in rows])
