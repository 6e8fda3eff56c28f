"""
The worker thread's side of an engine: every job's work, from the first load to the last release.

It knows no host and no queue. Each method is one job; each leaves a state that is true.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.engine.compiling.faults import unexpected
from holdfast.engine.compiling.memory import resident_bytes
from holdfast.engine.compiling.plan import Cost, PassCost, Standing
from holdfast.engine.errors import HoldfastError, InvalidRequest
from holdfast.engine.imports import runtime, still_to_come, tell_imports
from holdfast.engine.jobs.forks import keep_in_children
from holdfast.engine.logbook.rules import EVALUATIONS
from holdfast.engine.models.facts import facts_of
from holdfast.engine.models.families import VAE_DECODER
from holdfast.engine.passes.guidance import cadence_of
from holdfast.engine.passes.hires import modes_of, passes_of, run_request, settle_seeds
from holdfast.engine.passes.images import digest
from holdfast.engine.passes.metadata import Provenance, infotext
from holdfast.engine.passes.one_pass import decode_array
from holdfast.engine.passes.prompts import Prompts
from holdfast.engine.passes.reading import PromptReader
from holdfast.engine.passes.runner import Runner
from holdfast.engine.requests.cadence import counted
from holdfast.engine.requests.config import EngineConfig
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.kinds import alone
from holdfast.engine.requests.told import told_request
from holdfast.engine.results.result import Degradation, Result
from holdfast.engine.subscribers import Preview
from holdfast.states import Mode, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from holdfast.engine.compiling.plan import Plan
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.diskcache import DiskCache
    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.passes.previews import LatentMap
    from holdfast.engine.pipeline import CompiledPipeline
    from holdfast.engine.requests.cadence import Evaluations
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.subscribers import Subscribers
    from holdfast.states import Lifecycle

T = TypeVar("T")


class Service:
    """
    Serves one engine's jobs. All methods but `__init__` run in the worker thread.

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
        self._config = config
        self._lifecycle = lifecycle
        self._cache = cache
        self._emit = emit
        self._versions = versions
        self._subscribers = subscribers
        self._latent_map: LatentMap | None = None
        self._opened: CompiledPipeline | None = None
        self._reader = PromptReader()
        self._prompts = Prompts(self._reader)
        keep_in_children(self)

    @property
    def config(self) -> EngineConfig:
        """What the engine is set to; the pipeline's, once there is one."""
        opened = self._opened
        return self._config if opened is None else opened.config

    @property
    def pipeline(self) -> CompiledPipeline:
        """The compiled pipeline; its model is found (and exported) when it is needed first."""
        if self._opened is None:
            # OpenVINO comes in here, with the first thing that needs a model.
            runtime()
            from holdfast.engine.pipeline import CompiledPipeline

            self._opened = CompiledPipeline(self._config, self._lifecycle, self._cache, self._emit)
        return self._opened

    def load(self, job: Job[Any], mode: Mode) -> Plan:
        """Put `mode` in service when nothing is. State afterwards: ``compiled-<mode>``."""
        return self._go(job, mode, Trigger.load(mode))

    def switch(self, job: Job[Any], mode: Mode) -> Plan:
        """Put `mode` in service in place of another. State afterwards: ``compiled-<mode>``."""
        return self._go(job, mode, Trigger.switch(mode))

    def recompile(self, job: Job[Any]) -> Plan:
        """Compile what serves again. The state afterwards is the one before."""
        return self._do(job, self.pipeline.recompile)

    def configure(self, job: Job[Any], config: EngineConfig) -> Plan:
        """Change the settings. The state afterwards is the one before."""
        return self._do(job, lambda: self.pipeline.configure(config))

    def plan(self, asked: Request | EngineConfig) -> Plan:
        """Decide what a request, or a change of settings, would take. Changes nothing."""
        with self._true_state():
            if isinstance(asked, EngineConfig):
                return self.pipeline.plan_change(asked)
            if not self._needs_no_file(asked):
                ahead = self._ahead(asked)
                if ahead is not None:
                    return dataclasses.replace(ahead, imports=self._imports())
            passes = self._settle(asked, settle_seeds(asked))
            return self._priced(self._plan(passes), passes)

    def model_facts(self) -> ModelFacts:
        """Return what there is to know of the model in force; it is found where it is not yet."""
        with self._true_state():
            return facts_of(self._model, self.config.model)

    def _ahead(self, request: Request) -> Plan | None:
        """Decide what a request takes while one of its models is missing; None: none is."""
        ahead = self.pipeline.plan_ahead(self.config, modes_of(request))
        if ahead is None and isinstance(request, Hires) and request.hires_model is not None:
            config = self.config.but(model=request.hires_model, vae=None)
            ahead = self.pipeline.plan_ahead(config, modes_of(request)[1:])
        return ahead

    def _needs_no_file(self, request: Request) -> bool:
        """Tell whether all that serves a request is held, so that the model's files may be gone."""
        if isinstance(request, Hires) and request.hires_model is not None:
            return False
        return self.pipeline.knows_model and all(
            self.pipeline.holds(each.mode, each.geometry, each.loras)
            for each in self._settle(request, settle_seeds(request))
        )

    def prepare(self, job: Job[Any], request: Request) -> Plan:
        """Compile everything that a request needs, and stop in the mode of its first pass."""

        def work() -> Plan:
            passes = self._settle(request, settle_seeds(request))
            made = self._plan((*passes, passes[0]) if len(passes) > 1 else passes)
            self.pipeline.follow(made)
            self.pipeline.ready(passes[0], ())
            return made

        return self._do(job, work)

    def idle_seconds(self) -> float | None:
        """Return how long nobody asks for anything before `rest`; None: for ever."""
        return self.config.idle_unload

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
        """Give everything back, for good. Where it was broken into, the next call goes on."""
        opened = self._opened
        if opened is None:
            return
        opened.settle()
        self._emit("engine.snapshot", **self.facts())
        self.unload("closed")
        opened.close()
        self._config = opened.config
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
            "settings": told_request(request),
        }

        def work() -> Result:
            with self._emit.span("request", **facts) as learned:
                return self._run(job, request, seeds, learned)

        return self._do(job, work)

    def _run(
        self, job: Job[Any], request: Request, seeds: tuple[int, ...], learned: dict[str, object]
    ) -> Result:
        began = time.perf_counter()
        passes = self._settle(request, seeds)
        if whole := [each for each in passes if each.region is None]:
            learned |= {"width": whole[-1].width, "height": whole[-1].height}
        made = self._priced(self._plan(passes), passes)
        self._expect(job, made, passes)
        degradations = self._check_prompts(passes)
        self.pipeline.announce(made)
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
        provenance = self._provenance()
        return Result(
            images=tuple(images),
            first_pass=tuple(first_pass),
            seeds=seeds,
            request=request,
            timings=timings,
            degradations=(*degradations, *runner.degradations),
            evaluations=tuple(runner.evaluations),
            infotexts=tuple(
                infotext(alone(request, seeds, index), passes, index, provenance)
                for index in range(len(images))
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
        """Settle what a request leaves open, what its prompts ask for included."""
        settled = []
        for each in passes_of(request, seeds, self.config, self.pipeline.model_of):
            model = self.pipeline.model_of(each.model)
            model.check_mode(each.mode)
            model.check_steps(each.scheduler, each.steps, each.strength or 1.0, each.mode)
            model.check_memory(each.geometry, self.pipeline.budget)
            settled.append(self._reader.settle(each, self.config, model))
        return tuple(settled)

    def _plan(self, passes: tuple[PassSpec, ...]) -> Plan:
        made = self.pipeline.plan(
            [
                self.pipeline.stage(each.mode, each.geometry, each.loras, each.model)
                for each in passes
            ]
        )
        return dataclasses.replace(made, imports=self._imports())

    def _priced(self, made: Plan, passes: tuple[PassSpec, ...]) -> Plan:
        """Return a plan with what each pass of its request takes."""
        costs = []
        for each in passes:
            seconds = self._step_seconds(each)
            whole = None if seconds is None else seconds * each.steps * len(each.seeds)
            costs.append(PassCost(self._evaluations(each), whole))
        return dataclasses.replace(made, passes=tuple(costs))

    def _evaluations(self, spec: PassSpec) -> Evaluations:
        """Return how many evaluations a pass will take, by what its scheduler is known for."""
        count = EVALUATIONS.get(spec.sampler, int)(spec.steps)
        return counted(cadence_of(spec, self.pipeline.model_of(spec.model).family, count))

    def _step_seconds(self, spec: PassSpec) -> float | None:
        """Return what a step takes; guessed from whole evaluations where there were no cheap."""
        known = self._cache.costs.expected("step", *self._step_bucket(spec))
        if known is not None:
            return known.seconds
        if spec.speed == "exact":
            return None
        whole = self._step_seconds(dataclasses.replace(spec, speed="exact"))
        made = self._evaluations(spec)
        saved = _SAVED * made.cheap / (made.whole + made.cheap)
        return None if whole is None else whole * (1 - saved)

    def _imports(self) -> Cost | None:
        """Return what the imports that a pass waits for will take; None where all are made."""
        seconds = self._import_seconds()
        known = [each for each in seconds.values() if each is not None]
        return Cost(sum(known) if len(known) == len(seconds) else None) if seconds else None

    def _import_seconds(self) -> dict[str, float | None]:
        """Return what each import still to come has taken; a part that never was waited for not."""
        costs = {each: self._cache.costs.expected(*_import(each)) for each in still_to_come()}
        return {
            wanted: None if cost is None else cost.seconds
            for wanted, cost in costs.items()
            if cost is not None or wanted == "optimum"
        }

    def _go(self, job: Job[Any], mode: Mode, trigger: Trigger) -> Plan:
        def work() -> Plan:
            if trigger not in self._lifecycle.legal():
                self._lifecycle.fire(trigger)  # refuses, and the log tells
            made = self.pipeline.plan([self.pipeline.stage(mode)])
            self.pipeline.follow(made)
            return made

        return self._do(job, work)

    def _check_prompts(self, passes: tuple[PassSpec, ...]) -> tuple[Degradation, ...]:
        """Refuse prompts of which a part would be lost, or say so where that is allowed."""
        found = self._reader.losses(passes, self.config, self._model)
        for each in found:
            if self.config.strict:
                hidden = f"{each.kind}: {len(each.words)} characters of a prompt"
                shown = None if self.config.log_prompts else hidden
                raise InvalidRequest(each.advice, log_text=shown)
            private = {} if not self.config.log_prompts else {"words": each.words}
            kept = f"{len(each.prompt)} characters"
            self._emit("degradation", kind=each.kind, asked=kept, given=each.given, **private)
        return tuple(Degradation(e.kind, e.words, e.given, e.words) for e in found)

    def _show(
        self, job: Job[Any], spec: PassSpec, step: int, steps: int, latents: torch.Tensor
    ) -> None:
        """Hand on a preview of the image as it stands, if anybody wants one."""
        if not self._subscribers.wants_preview(step, steps):
            return
        latent_map = self._latent_map or self._fit_latent_map()
        draw = functools.partial(latent_map.picture, latents[0].numpy().copy())
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
        from holdfast.engine.passes.previews import latent_map

        view = self.pipeline.view_in_service()
        side = self._model.probe_side(VAE_DECODER)
        self._latent_map = latent_map(
            self._model.vae, side, lambda latents: decode_array(latents, view)
        )
        return self._latent_map

    def _provenance(self) -> Provenance:
        named = dict.fromkeys(map(str, self.config.lora))
        name = str(self.config.model).rstrip("/").rsplit("/", 1)[-1]
        return Provenance(
            name, self._model.folder.fingerprint[:10], tuple(named), self._versions["holdfast"]
        )

    def _expect(self, job: Job[Any], made: Plan, passes: tuple[PassSpec, ...]) -> None:
        """Tell the job what each phase will take, as far as is known."""
        imports = {
            f"import {wanted}": _UNKNOWN_IMPORT if each is None else each
            for wanted, each in self._import_seconds().items()
        }
        # The rest comes in beside the first compile, and is waited for behind it.
        seconds = {phase: each for phase, each in imports.items() if phase != "import optimum"}
        for each, moves, cost in zip(passes, made.stages, made.passes, strict=True):
            known = [step.cost.seconds or 1.0 for move in moves for step in move.steps]
            seconds[f"prepare {each.number}"] = sum(known) + 0.01
            seconds |= imports
            unknown = each.width * each.height * _UNKNOWN_STEP * each.steps * len(each.seeds)
            seconds[f"pass {each.number}"] = cost.seconds or unknown
        job.expect(seconds)

    def _tell_import(self, job: Job[Any], event: str, /, **facts: Any) -> None:
        """Log an import, show it as a phase of the job that waits, and learn what it took."""
        self._emit(event, **facts)
        wanted = facts.get("wanted", "")
        if event == "imports.started":
            job.advance(f"import {wanted}")
        if event == "imports.completed":
            with self._learning():
                self._cache.costs.record(*_import(wanted), seconds=facts["seconds"], bytes=0)

    def _learn(self, timings: Mapping[str, float], passes: tuple[PassSpec, ...]) -> None:
        """Remember what steps took; the images are there, and no disk can take them back."""
        began = time.perf_counter()
        learned: dict[str, float] = {}
        with self._learning():
            for each in passes:
                taken = timings[f"pass {each.number}"] / each.steps / len(each.seeds)
                self._cache.costs.record("step", *self._step_bucket(each), seconds=taken, bytes=0)
                learned[f"pass {each.number}"] = round(taken, 6)
            seconds = round(time.perf_counter() - began, 6)
            self._emit("steps.learned", step_seconds=learned, seconds=seconds)

    @contextlib.contextmanager
    def _learning(self) -> Iterator[None]:
        """Go on where something cannot be remembered, and say so."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a full disk or a lost descriptor raises
            self._emit("learning.failed", error=f"{type(error).__name__}: {error}")

    def _step_bucket(self, spec: PassSpec) -> tuple[str, str, str]:
        denoiser = self._model.family.denoiser
        geometry = spec.geometry
        guided = self._model.family.guides(geometry)
        facts = (self._model.source(denoiser)[:12], geometry, guided)
        bucket = " ".join(map(str, (*facts, self.config.precision)))
        bucket += "" if spec.speed == "exact" else f" {spec.speed} {self._evaluations(spec)}"
        return self.config.device_of(denoiser), denoiser, bucket

    def _do(self, job: Job[Any], work: Callable[[], T]) -> T:
        """Do a job's work on the pipeline."""
        tell_imports(functools.partial(self._tell_import, job))
        try:
            return self.pipeline.work(job, work)
        except HoldfastError as error:
            error.state_after = error.state_after or self._lifecycle.state.value
            raise

    @contextlib.contextmanager
    def _true_state(self) -> Iterator[None]:
        """Let every error tell the state in which it leaves the engine."""
        tell_imports(self._emit)
        try:
            yield
        except HoldfastError as error:
            error.state_after = error.state_after or self._lifecycle.state.value
            raise
        except Exception as error:
            told = unexpected(error)
            told.state_after = self._lifecycle.state.value
            raise told from error


def _import(wanted: str) -> tuple[str, str, str, str]:
    """Return what the cost of an import is learned under."""
    return "import", "", wanted, ""


_UNKNOWN_IMPORT = 6.0
"""Seconds that the imports take which a pass waits for, where none was made yet."""
_SAVED = 0.5
"""Share of an evaluation that a cheap one saves at least."""
_UNKNOWN_STEP = 3e-5
"""Seconds that a step takes for each pixel, where nothing has been measured yet."""
