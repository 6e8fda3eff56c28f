"""
The owner thread's side of an engine: every job's work, from the first load to the last release.

It knows no host and no queue. Each method is one job; each leaves a state that is true.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

from holdfast.engine.config import EngineConfig
from holdfast.engine.errors import HoldfastError, InvalidRequest
from holdfast.engine.families import VAE_DECODER
from holdfast.engine.hires import modes_of, passes_of, run_request, settle_seeds
from holdfast.engine.images import digest
from holdfast.engine.imports import runtime
from holdfast.engine.memory import resident_bytes
from holdfast.engine.metadata import Provenance, infotext
from holdfast.engine.passes import decode_array
from holdfast.engine.plan import Standing
from holdfast.engine.prompts import Prompts
from holdfast.engine.result import Degradation, Result
from holdfast.engine.runner import Runner
from holdfast.engine.subscribers import Preview
from holdfast.states import Mode, Trigger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from holdfast.engine.diskcache import DiskCache
    from holdfast.engine.events import Emitter
    from holdfast.engine.jobs import Job
    from holdfast.engine.model import Model
    from holdfast.engine.passes import PassSpec
    from holdfast.engine.pipeline import CompiledPipeline
    from holdfast.engine.plan import Plan
    from holdfast.engine.previews import LatentMap
    from holdfast.engine.requests import Request
    from holdfast.engine.subscribers import Subscribers
    from holdfast.states import Lifecycle


class Service:
    """
    Serves one engine's jobs. All methods but `__init__` run in the owner thread.

    Args:
        config: What the engine is set to.
        lifecycle: Its state.
        cache: Exports and learned costs.
        emit: Where events go.
        versions: Told in results and infotexts.
        subscribers: Shown previews.
    """

    def __init__(
        self,
        config: EngineConfig,
        lifecycle: Lifecycle,
        cache: DiskCache,
        emit: Emitter,
        *,
        versions: Mapping[str, str],
        subscribers: Subscribers,
    ) -> None:
        self.config = config
        self._lifecycle = lifecycle
        self._cache = cache
        self._emit = emit
        self._versions = versions
        self._subscribers = subscribers
        self._latent_map: LatentMap | None = None
        self._opened: CompiledPipeline | None = None
        self._prompts = Prompts()

    @property
    def pipeline(self) -> CompiledPipeline:
        """The compiled pipeline; its model is found (and exported) when it is needed first."""
        if self._opened is None:
            # OpenVINO comes in here, with the first thing that needs a model.
            runtime()
            from holdfast.engine.pipeline import CompiledPipeline

            self._opened = CompiledPipeline(self.config, self._lifecycle, self._cache, self._emit)
        return self._opened

    def load(self, job: Job[Any], mode: Mode) -> Plan:
        """Put `mode` in service when nothing is. State afterwards: ``compiled-<mode>``."""
        return self._go(job, mode, Trigger.load(mode))

    def switch(self, job: Job[Any], mode: Mode) -> Plan:
        """Put `mode` in service in place of another. State afterwards: ``compiled-<mode>``."""
        return self._go(job, mode, Trigger.switch(mode))

    def recompile(self, job: Job[Any]) -> Plan:
        """Compile what serves again. The state afterwards is the one before."""
        with self._true_state(), self.pipeline.working_for(job):
            return self.pipeline.recompile()

    def configure(self, job: Job[Any], config: EngineConfig) -> Plan:
        """Change the settings. The state afterwards is the one before."""
        with self._true_state(), self.pipeline.working_for(job):
            made = self.pipeline.configure(config)
            self.config = config
            return made

    def plan(self, asked: Request | EngineConfig) -> Plan:
        """Decide what a request, or a change of settings, would take. Changes nothing."""
        with self._true_state():
            if isinstance(asked, EngineConfig):
                return self.pipeline.plan_change(asked)
            ahead = self.pipeline.plan_ahead(self.config, modes_of(asked))
            return ahead or self._plan(self._settle(asked, settle_seeds(asked)))

    def prepare(self, job: Job[Any], request: Request) -> Plan:
        """Compile everything that a request needs, and stop in the mode of its first pass."""
        with self._true_state(), self.pipeline.working_for(job):
            passes = self._settle(request, settle_seeds(request))
            made = self._plan((*passes, passes[0]) if len(passes) > 1 else passes)
            self.pipeline.follow(made)
            self.pipeline.ready(passes[0], ())
            return made

    def rest(self) -> None:
        """Give every component back because nobody has asked for anything in a while."""
        self.unload("idle")

    def unload(self, reason: str) -> None:
        """Give every component back. State afterwards: ``unloaded``."""
        self._prompts.clear()
        self._latent_map = None
        if self._opened is not None:
            self._opened.unload(reason)

    def release(self) -> None:
        """Give everything back, for good."""
        if self._opened is not None:
            self._emit("engine.snapshot", **self.facts())
        self.unload("closed")
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def facts(self) -> dict[str, Any]:
        """Return where the engine stands, as the log tells it."""
        standing = Standing() if self._opened is None else self._opened.standing()
        return {
            "state": self._lifecycle.state.value,
            "mode": None if self._lifecycle.mode is None else str(self._lifecycle.mode),
            "held": sorted(key.digest for key in standing.held),
            "lora": sorted({str(use) for key in standing.service.values() for use in key.lora}),
        }

    def run(self, job: Job[Any], request: Request) -> Result:
        """
        Serve one request. State afterwards: the mode of its last pass.

        Raises:
            InvalidRequest: The model cannot make this, or the budget cannot hold it.
            CompileError: What it needs could not be put in service.
            GenerationError: A pass failed.
            Cancelled: The job was stopped.
        """
        job.advance("find model")
        seeds = settle_seeds(request)
        facts = {
            "kind": request.kind,
            "width": request.width,
            "height": request.height,
            "steps": request.steps,
            "seeds": list(seeds),
        }
        with (
            self._true_state(),
            self._emit.scope(request_id=job.request_id),
            self._emit.span("request", **facts) as learned,
            self.pipeline.working_for(job),
        ):
            return self._run(job, request, seeds, learned)

    def _run(
        self, job: Job[Any], request: Request, seeds: tuple[int, ...], learned: dict[str, object]
    ) -> Result:
        began = time.perf_counter()
        passes = self._settle(request, seeds)
        learned |= {"width": passes[-1].width, "height": passes[-1].height}
        degradations = self._check_prompts(passes)
        made = self._plan(passes)
        self.pipeline.announce(made)
        self._expect(job, made, passes)
        runner = Runner(
            self.pipeline,
            made,
            self._prompts,
            job=job,
            emit=self._emit,
            on_step=functools.partial(self._show, job),
            log_prompts=self.config.log_prompts,
        )
        images, first_pass = run_request(request, passes, runner)
        self.pipeline.compare(made)
        self._learn(runner.timings, passes)
        timings = {**runner.timings, "total": time.perf_counter() - began}
        learned |= {
            "timings": {phase: round(seconds, 4) for phase, seconds in timings.items()},
            "compiled": list(made.compiles),
            "width": images[0].width,
            "height": images[0].height,
            "output_digest": digest(images),
            "degradations": len(degradations) + len(runner.degradations),
            "rss_bytes": resident_bytes(),
        }
        provenance = self._provenance(passes)
        return Result(
            images=tuple(images),
            first_pass=tuple(first_pass),
            seeds=seeds,
            request=request,
            timings=timings,
            degradations=(*degradations, *runner.degradations),
            infotexts=tuple(
                infotext(request, passes, index, provenance) for index in range(len(images))
            ),
            provenance={
                "model": provenance.model,
                "model_fingerprint": self._model.folder.fingerprint,
                "loras": list(provenance.loras),
                "versions": dict(self._versions),
            },
        )

    @property
    def _model(self) -> Model:
        return self.pipeline.model

    def _settle(self, request: Request, seeds: tuple[int, ...]) -> tuple[PassSpec, ...]:
        passes = passes_of(request, seeds, self.config, self._model)
        for each in passes:
            self._model.check_steps(each.scheduler, each.steps, each.strength or 1.0)
            self._model.check_memory(each.geometry, self.pipeline.budget)
        return passes

    def _plan(self, passes: tuple[PassSpec, ...]) -> Plan:
        return self.pipeline.plan(
            [self.pipeline.stage(each.mode, each.geometry, each.loras) for each in passes]
        )

    def _go(self, job: Job[Any], mode: Mode, trigger: Trigger) -> Plan:
        with self._true_state(), self.pipeline.working_for(job):
            if trigger not in self._lifecycle.legal():
                self._lifecycle.fire(trigger)  # refuses, and the log tells
            made = self.pipeline.plan([self.pipeline.stage(mode)])
            self.pipeline.follow(made)
            return made

    def _check_prompts(self, passes: tuple[PassSpec, ...]) -> tuple[Degradation, ...]:
        """Refuse prompts that the text encoders would cut, or say so where that is allowed."""
        found = {}
        for prompt in {text for each in passes for text in (each.prompt, each.negative_prompt)}:
            words = self._prompts.unread(prompt, self._model)
            if not words:
                continue
            if self.config.strict:
                msg = (
                    "The prompt is longer than the model's text encoder can read; it would not see "
                    f"the end: {words!r}. Shorten it, or open the engine with strict=False to have "
                    "it cut there."
                )
                hidden = f"a prompt is too long by {len(words)} characters"
                raise InvalidRequest(msg, log_text=None if self.config.log_prompts else hidden)
            found[prompt] = Degradation("prompt_truncated", prompt, prompt[: -len(words)], words)
        for each in found.values():
            private = {} if not self.config.log_prompts else {"words": each.words}
            self._emit(
                "degradation",
                kind=each.kind,
                asked=f"{len(each.asked)} characters",
                given=f"{len(each.given)} characters",
                **private,
            )
        return tuple(found.values())

    def _show(
        self, job: Job[Any], spec: PassSpec, step: int, steps: int, latents: torch.Tensor
    ) -> None:
        """Hand on a preview of the image as it stands, if anybody wants one."""
        if not self._subscribers.wants_preview(step, steps):
            return
        factor = self._model.scale.factor
        values = latents[0].numpy().copy()
        latent_map = self._latent_map or self._fit_latent_map()
        draw = functools.partial(
            latent_map.picture, values, spec.width // factor, spec.height // factor
        )
        self._subscribers.preview(
            Preview(
                request_id=job.request_id,
                pass_number=spec.number,
                step=step,
                steps=steps,
                draw=draw,
            )
        )

    def _fit_latent_map(self) -> LatentMap:
        from holdfast.engine.previews import latent_map

        view = self.pipeline.view_in_service()
        vae, side = view.pipeline.vae, self._model.probe_side(VAE_DECODER)
        self._latent_map = latent_map(
            dict(vae.config), side, lambda latents: decode_array(latents, view)
        )
        return self._latent_map

    def _provenance(self, passes: tuple[PassSpec, ...]) -> Provenance:
        loras = [each for one in passes for each in (one.loras or ())]
        named = dict.fromkeys(
            f"{each.name}@{each.weight:g}" for each in (*self.config.lora, *loras)
        )
        name = str(self.config.model).rstrip("/").rsplit("/", 1)[-1]
        return Provenance(
            name, self._model.folder.fingerprint[:10], tuple(named), self._versions["holdfast"]
        )

    def _expect(self, job: Job[Any], made: Plan, passes: tuple[PassSpec, ...]) -> None:
        """Tell the job what each phase will take, as far as is known."""
        seconds = {}
        for each, moves in zip(passes, made.stages, strict=True):
            known = [step.cost.seconds or 1.0 for move in moves for step in move.steps]
            seconds[f"prepare {each.number}"] = sum(known) + 0.01
            cost = self._cache.costs.expected("step", *self._step_bucket(each))
            step = cost.seconds if cost else each.width * each.height * _UNKNOWN_STEP
            seconds[f"pass {each.number}"] = step * each.steps * len(each.seeds)
        job.expect(seconds)

    def _learn(self, timings: Mapping[str, float], passes: tuple[PassSpec, ...]) -> None:
        for each in passes:
            taken = timings[f"pass {each.number}"] / each.steps / len(each.seeds)
            self._cache.costs.record("step", *self._step_bucket(each), seconds=taken, bytes=0)

    def _step_bucket(self, spec: PassSpec) -> tuple[str, str, str]:
        denoiser = self._model.family.denoiser
        geometry = spec.geometry
        facts = (self._model.source(denoiser)[:12], geometry, geometry.guided)
        bucket = " ".join(map(str, (*facts, self.config.precision)))
        return self.config.device_of(denoiser), denoiser, bucket

    @contextlib.contextmanager
    def _true_state(self) -> Iterator[None]:
        """Let every error tell the state in which it leaves the engine."""
        try:
            yield
        except HoldfastError as error:
            error.state_after = error.state_after or self._lifecycle.state.value
            raise


_UNKNOWN_STEP = 3e-5
"""Seconds that a step takes for each pixel, where nothing has been measured yet."""
