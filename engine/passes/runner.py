"""Does what a request's passes ask for, one after the other, on the compiled pipeline."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.engine.errors import GenerationError
from holdfast.engine.models.families import VAE_DECODER, VAE_ENCODER
from holdfast.engine.passes.images import digest, text_digest
from holdfast.engine.passes.one_pass import PassSpec, Source, decode, encode, run_pass
from holdfast.engine.requests.upscalers import UPSCALERS, upscale_image, upscale_latents
from holdfast.engine.results.result import Degradation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from PIL import Image

    from holdfast.engine.compiling.plan import Move, Plan
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.one_pass import StepHook
    from holdfast.engine.passes.prompts import Conditioning, Prompts
    from holdfast.engine.passes.views import View
    from holdfast.engine.requests.cadence import Evaluations
    from holdfast.engine.requests.hires import Hires


class Pipeline(Protocol):
    """What passes run on: the compiled pipeline, as far as they know it."""

    def model_of(self, name: str | Path | None) -> Model:
        """Return the model of a pass: that of this name, or for None the engine's."""

    def ready(self, spec: PassSpec, moves: Sequence[Move]) -> View:
        """Put in service what a pass needs, and return its pipeline, made sure of."""

    def view_in_service(self) -> View:
        """Return the view of the mode in service."""


class Runner:
    """
    One request's work on the pipeline, in the worker thread.

    Args:
        pipeline: What runs it.
        plan: The moves before each pass.
        prompts: Encodes them, or knows them already.
        job: Told how far it has come, and asked whether to go on.
        emit: Where events go.
        on_step: Called after each step with the pass, its number, their count, and the latents.
        log_prompts: Whether events hold prompts or digests alone.

    Attributes:
        timings: Seconds by phase so far.
        degradations: What was done otherwise than a host would expect.
        evaluations: That each pass so far took, for each image.
    """

    def __init__(
        self,
        pipeline: Pipeline,
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
        self.evaluations: list[Evaluations] = []
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

    def upscale(self, source: Source, request: Hires, spec: PassSpec) -> Source:
        """Enlarge the first pass's images or latents to the size of `spec`."""
        name, fit = request.upscaler, request.fit
        self._job.checkpoint("upscale")
        began = time.perf_counter()
        factor = self._pipeline.model_of(spec.model).scale.factor
        with self._timed("upscale", "upscale"):
            if source.kind == "latent":
                size = (spec.width // factor, spec.height // factor)
                values: list[Any] = [upscale_latents(e, name, size, fit) for e in source.values]
            else:
                size = (spec.width, spec.height)
                values = [upscale_image(each, name, size, fit) for each in source.values]
        self._emit(
            "upscale.completed",
            upscaler=name,
            fit=fit,
            space=UPSCALERS[name].space,
            width=spec.width,
            height=spec.height,
            input_digest=digest(source.values),
            output_digest=digest(values),
            seconds=round(time.perf_counter() - began, 6),
        )
        return Source(source.kind, values)

    def redraw(self, spec: PassSpec, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """
        Run a pass over one region of pictures, and paste what it gives back into them.

        Raises as `images` does.
        """
        region = spec.region
        if region is None:
            msg = f"Pass {spec.number} has no region to redraw."
            raise GenerationError(msg)
        self._job.checkpoint("cut")
        before, cut = digest(pictures), [region.cut(each) for each in pictures]
        about = {"pass": spec.number, **region.facts, "picture_digest": before}
        self._emit("region.cut", **about, output_digest=digest(cut))
        drawn = self.images(spec, Source("image", cut))
        pasted = [region.paste(*each) for each in zip(drawn, pictures, strict=True)]
        self._emit(
            "region.pasted", **about, input_digest=digest(drawn), output_digest=digest(pasted)
        )
        return pasted

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
        with self._timed("encode prompt", f"pass {spec.number}"):
            rows = self._encode_prompt(spec, view)
        with self._timed(f"pass {spec.number}", f"pass {spec.number}"):
            given, evaluations = run_pass(
                spec,
                view,
                view.model,
                prompts=rows,
                source=source,
                encode=functools.partial(self._encode, view),
                finish=finish,
                job=self._job,
                emit=self._emit,
                on_step=self._on_step,
            )
        self.evaluations.append(evaluations)
        return given

    def _encode_prompt(self, spec: PassSpec, view: View) -> Conditioning:
        self._job.checkpoint("encode prompt")
        began = time.perf_counter()
        fresh, told = self._prompts.encode(spec, view, view.model)
        if fresh:
            shown = {"prompt": spec.prompt} if self._log_prompts else {}
            self._emit(
                "prompt.encoded",
                prompt_digest=text_digest(f"{spec.prompt}\0{spec.negative_prompt}"),
                tokens=len(told.first["prompt_embeds"][0]),
                seconds=round(time.perf_counter() - began, 6),
                **shown,
            )
        return told

    def _encode(
        self,
        view: View,
        image: Image.Image,
        generator: torch.Generator,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._job.checkpoint("encode")
        began = time.perf_counter()
        latents = encode(image, generator, view, hidden)
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
