"""Does what a request's passes ask for, one after the other, on the compiled pipeline."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from holdfast.engine.families import VAE_DECODER, VAE_ENCODER
from holdfast.engine.images import digest, text_digest
from holdfast.engine.passes import PassSpec, Source, decode, encode, run_pass
from holdfast.engine.result import Degradation
from holdfast.engine.upscale import UPSCALERS, upscale_image, upscale_latents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from PIL import Image

    from holdfast.engine.events import Emitter
    from holdfast.engine.jobs import Job
    from holdfast.engine.passes import StepHook
    from holdfast.engine.pipeline import CompiledPipeline
    from holdfast.engine.plan import Plan
    from holdfast.engine.prompts import Prompts
    from holdfast.engine.views import View


class Runner:
    """
    One request's work on the pipeline, in the owner thread.

    Args:
        pipeline: What runs it.
        plan: The moves before each pass.
        prompts: Embeddings that are known already.
        job: Told how far it has come, and asked whether to go on.
        emit: Where events go.
        on_step: Called after each step with the pass, its number, their count, and the latents.
        log_prompts: Whether events hold prompts or digests alone.

    Attributes:
        timings: Seconds by phase so far.
        degradations: What was done otherwise than a host would expect.
    """

    def __init__(
        self,
        pipeline: CompiledPipeline,
        plan: Plan,
        prompts: Prompts,
        *,
        job: Job[Any],
        emit: Emitter,
        on_step: StepHook,
        log_prompts: bool,
    ) -> None:
        self.timings: dict[str, float] = {}
        self.degradations: list[Degradation] = []
        self._pipeline = pipeline
        self._plan = plan
        self._prompts = prompts
        self._job = job
        self._emit = emit
        self._on_step = on_step
        self._log_prompts = log_prompts

    def images(self, spec: PassSpec, source: Source | None) -> list[Image.Image]:
        """
        Run a pass down to pixels.

        Raises:
            CompileError: What it needs could not be put in service.
            GenerationError: The view at hand is not what the pass asks for, or it failed.
            Cancelled: The job was stopped.
        """
        return self._run(spec, source, self.decode)

    def latents(self, spec: PassSpec, source: Source | None) -> list[torch.Tensor]:
        """Run a pass, and leave its latents as they are. Raises as `images` does."""
        return self._run(spec, source, lambda latents: latents)

    def decode(self, latents: Sequence[torch.Tensor]) -> list[Image.Image]:
        """Turn latents into images, one by one; in tiles where the plan says so."""
        view = self._pipeline.view_in_service()
        began = time.perf_counter()
        images = []
        for each in latents:
            self._job.checkpoint("decode")
            images.append(decode(each, view))
        self._tell_of_vae("decode.completed", VAE_DECODER, view, len(images), began)
        return images

    def upscale(self, source: Source, name: str, spec: PassSpec) -> Source:
        """Enlarge the first pass's images or latents to the size of `spec`."""
        self._job.checkpoint("upscale")
        began = time.perf_counter()
        factor = self._pipeline.model.scale.factor
        with self._timed("upscale", "upscale"):
            if source.kind == "latent":
                size = (spec.width // factor, spec.height // factor)
                values: list[Any] = [upscale_latents(e, name, *size) for e in source.values]
            else:
                size = (spec.width, spec.height)
                values = [upscale_image(each, name, *size) for each in source.values]
        self._emit(
            "upscale.completed",
            upscaler=name,
            space=UPSCALERS[name].space,
            width=spec.width,
            height=spec.height,
            input_digest=digest(source.values),
            output_digest=digest(values),
            seconds=round(time.perf_counter() - began, 6),
        )
        return Source(source.kind, values)

    def keep_first_pass(self, images: Sequence[Image.Image]) -> None:
        """Hold on to the first pass's images, whatever becomes of the second."""
        self._job.keep_first_pass(images)

    def _run(
        self,
        spec: PassSpec,
        source: Source | None,
        finish: Callable[[list[torch.Tensor]], list[Any]],
    ) -> list[Any]:
        with self._timed("prepare", f"prepare {spec.number}"):
            view = self._pipeline.ready(spec, self._plan.stages[spec.number - 1])
        with self._timed("encode prompt", f"prepare {spec.number}"):
            rows = self._encode_prompt(spec, view)
        with self._timed(f"pass {spec.number}", f"pass {spec.number}"):
            return run_pass(
                spec,
                view,
                self._pipeline.model,
                prompts=rows,
                source=source,
                encode=lambda image, generator: self._encode(image, generator, view),
                finish=finish,
                job=self._job,
                emit=self._emit,
                on_step=self._on_step,
            )

    def _encode_prompt(self, spec: PassSpec, view: View) -> dict[str, torch.Tensor]:
        self._job.checkpoint("encode prompt")
        began = time.perf_counter()
        fresh, rows = self._prompts.encode(spec, view, self._pipeline.model)
        if fresh:
            shown = {"prompt": spec.prompt} if self._log_prompts else {}
            self._emit(
                "prompt.encoded",
                prompt_digest=text_digest(f"{spec.prompt}\0{spec.negative_prompt}"),
                tokens=int(rows["prompt_embeds"].shape[1]),
                seconds=round(time.perf_counter() - began, 6),
                **shown,
            )
        return rows

    def _encode(self, image: Image.Image, generator: torch.Generator, view: View) -> torch.Tensor:
        self._job.checkpoint("encode")
        began = time.perf_counter()
        latents = encode(image, generator, view)
        self._tell_of_vae("encode.completed", VAE_ENCODER, view, 1, began)
        return latents

    def _tell_of_vae(
        self, event: str, component: str, view: View, images: int, began: float
    ) -> None:
        tiles = view.tiled.get(component)
        seconds = round(time.perf_counter() - began, 6)
        self._emit(event, images=images, seconds=seconds, tiled=tiles is not None)
        if tiles is None or tiles.exact:
            return
        told = Degradation("vae_tiled", f"{component} on the whole image", "tiles near it")
        if told not in self.degradations:
            self.degradations.append(told)
            self._emit("degradation", kind=told.kind, asked=told.asked, given=told.given)

    @contextlib.contextmanager
    def _timed(self, phase: str, progress: str) -> Iterator[None]:
        self._job.advance(progress)
        began = time.perf_counter()
        yield
        taken = time.perf_counter() - began
        self.timings[phase] = self.timings.get(phase, 0.0) + taken
