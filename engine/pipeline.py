"""
The compiled pipeline: its lifecycle, what serves in it, and the transactions that change that.

Everything here runs in the engine's owner thread. Work is done between triggers, so that the state
is true whatever fails.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from holdfast.engine.components import ComponentStore
from holdfast.engine.errors import CompileError, GenerationError, HoldfastError, InvalidRequest
from holdfast.engine.faults import blamed, let_go, move_error, named
from holdfast.engine.imports import begin_heavy
from holdfast.engine.memory import budget_bytes, resident_bytes
from holdfast.engine.plan import Cost, Move, Plan, Stage, Standing, Step, plan, plan_again
from holdfast.engine.settings import Resolver, Settings
from holdfast.engine.views import View, check_view, make_view
from holdfast.states import Lifecycle, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from holdfast.engine.config import EngineConfig
    from holdfast.engine.diskcache import DiskCache
    from holdfast.engine.events import Emitter
    from holdfast.engine.families import Geometry
    from holdfast.engine.jobs import Job
    from holdfast.engine.keys import ComponentKey
    from holdfast.engine.model import Model
    from holdfast.engine.passes import PassSpec
    from holdfast.engine.plan import Action
    from holdfast.engine.requests import Lora
    from holdfast.states import Mode


class CompiledPipeline:
    """
    One model's compiled components and the views on them. Begins ``unloaded``.

    Args:
        config: What it is set to.
        lifecycle: Its state.
        cache: Exports, compiled blobs and learned costs.
        emit: Where events go.
    """

    def __init__(
        self, config: EngineConfig, lifecycle: Lifecycle, cache: DiskCache, emit: Emitter
    ) -> None:
        self.lifecycle = lifecycle
        self._emit = emit
        self.store = ComponentStore(emit, cache, self._checkpoint)
        self._views: dict[Mode, View] = {}
        self._job: Job[Any] | None = None
        self._geometry: Geometry | None = None
        self._resolver = Resolver(self.store.compiler, cache, emit)
        self._config = config
        self._found: Settings | None = None
        self.store.compiler.keeps_blobs = config.compiled_cache

    @property
    def config(self) -> EngineConfig:
        """What it is set to."""
        return self._config

    @property
    def _settings(self) -> Settings:
        """What follows from `config`; the model is found (and exported) when it is needed first."""
        if self._found is None:
            self._found = self._resolver.settings(self._config)
        return self._found

    @property
    def model(self) -> Model:
        """The model in force."""
        return self._settings.model

    @property
    def budget(self) -> int:
        """Bytes that all compiled components may hold: as set, or half of the machine's memory."""
        return budget_bytes(self.config.memory_budget)

    def standing(self) -> Standing:
        """Return where the pipeline stands, as plans are made from it."""
        return Standing(
            mode=self.lifecycle.mode,
            service={name: part.key for name, part in self.store.service.items()},
            held=self.store.held,
            graphs=self.store.compiler.graphs,
            budget=self.budget,
            policy=self.config.policy,
        )

    def stage(
        self,
        mode: Mode,
        geometry: Geometry | None = None,
        loras: tuple[Lora, ...] | None = None,
    ) -> Stage:
        """
        Return what one pass needs.

        Args:
            mode: Of the pass.
            geometry: Of its images. None: of the latest pass's, or the model's own where there was
                none or it cannot make that.
            loras: In place of the engine's, or None.

        Raises:
            LoraError: A LoRA file is refused.
        """
        settings = self._settings
        uses = None if loras is None else self._resolver.identify(loras, settings.model)
        return Stage(mode, settings.keys(mode, geometry or self._geometry, uses))

    def plan(self, stages: Sequence[Stage]) -> Plan:
        """Decide what serving these stages takes. No side effect."""
        return self._plan_from(self.standing(), stages)

    def _plan_from(self, now: Standing, stages: Sequence[Stage]) -> Plan:
        compiler = self.store.compiler
        keys = {key for stage in stages for key in stage.keys.values()}
        absent = frozenset(key.graph for key in keys if compiler.is_absent(key))
        return plan(replace(now, absent=absent), stages, compiler.price)

    def plan_ahead(self, config: EngineConfig, modes: Sequence[Mode]) -> Plan | None:
        """
        Decide what serving these modes takes, as far as that is known while a model is missing.

        Returns:
            The plan, which begins with a download or an export; None where nothing is missing.

        Raises:
            ModelSourceError: The model or VAE is not there, or is refused.
        """
        missing = self._resolver.missing(config)
        if not missing:
            return None
        keys = {
            mode: self._resolver.foresee(config, mode, self._geometry, missing) for mode in modes
        }
        steps = tuple(
            Step(each.needs, str(getattr(config, field)), "", f"{field}: not here as OpenVINO IR",
                 Cost(each.seconds))
            for field, each in missing.items()
        )  # fmt: skip
        return replace(self.plan([Stage(mode, keys[mode]) for mode in modes]), ahead=steps)

    @contextlib.contextmanager
    def working_for(self, job: Job[Any]) -> Iterator[None]:
        """Let `job` stop native calls made inside, and let go of what only it needed."""
        self._job = job
        try:
            yield
        finally:
            self._job = None
            self.store.compiler.loras.clear()

    def carry_out(self, move: Move) -> None:
        """
        Put exactly the move's components in service, or leave what serves as it is.

        Raises:
            CompileError: A component failed. The state is the one from before; only where the
                components from before had to be given up first and could not be compiled again
                is it ``unloaded``.
            Cancelled: The job was cancelled between two native calls. The same holds.
        """
        before = {name: part.key for name, part in self.store.service.items()}
        serving = {key.digest for key in before.values()}
        if any(step.action == "evict" or step.key in serving for step in move.steps):
            self._drop_views()
        if move.action == "recompile":
            policy = "evict_first" if move.evicts_first else "stage_first"
            self._fire(Trigger.RECOMPILE, move.reason)
            self._emit("recompile.policy", policy=policy, why=self.config.policy)
        if move.action == "load":
            begin_heavy()
        try:
            self.store.serve(move.service, self.store.stage(move))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is undone and goes on
            given_up = self._roll_back(move, before, error)
            raise move_error(error, move, given_up=given_up) from error.__cause__
        if move.action != "reuse":
            self._fire(_TRIGGERS[move.action](move.mode), move.reason)
            self.store.done.append(Step(move.action, str(move.mode)))

    def view(self, mode: Mode) -> View:
        """Return the pipeline of `mode` on the components in service, built anew where needed."""
        view = self._views.get(mode)
        if view is None or not view.serves(self.store.service):
            view = self._views[mode] = make_view(
                self.model, mode, self.store.service, self._checkpoint, self._emit
            )
        return view

    def view_in_service(self) -> View:
        """Return the view of the mode in service."""
        mode = self.lifecycle.mode
        if mode is None:
            msg = "Nothing is loaded, so there is no pipeline; load one first."
            raise GenerationError(msg)
        return self.view(mode)

    def ready(self, spec: PassSpec, moves: Sequence[Move]) -> View:
        """
        Put in service what a pass needs, and return its pipeline, made sure of.

        Args:
            spec: The pass.
            moves: Planned for it.

        Raises:
            CompileError: See `carry_out`.
            GenerationError: The pipeline is not that of the pass's mode.
        """
        for move in moves:
            self.carry_out(move)
        self._geometry = spec.geometry
        view = self.view(spec.mode)
        check_view(view, self.model.family, spec.mode, spec.number, self._emit)
        return view

    def plan_change(self, config: EngineConfig) -> Plan:
        """Decide what other settings would take. No side effect."""
        mode = self.lifecycle.mode
        try:
            ahead = self.plan_ahead(config, [] if mode is None else [mode])
            return ahead or self._plan_change(self._resolver.settings(config))
        finally:
            self._resolver.keep(self._found)

    def configure(self, config: EngineConfig) -> Plan:
        """
        Change the settings; recompile what they touch, and return to the same state.

        Another model's components are given up, except for those that the new one shares. Other
        components that serve no more (of a LoRA set, a VAE, a precision) stay held for as long as
        the memory budget has room.

        Returns:
            The plan that was carried out.

        Raises:
            ModelSourceError: The new model or LoRA is refused. Nothing has changed.
            InvalidRequest: The device does not exist, or the budget is too small. The same.
            CompileError: See `carry_out`. The settings are the ones from before.
        """
        before = self._found
        try:
            found = self._resolver.settings(config)
            made = self._plan_change(found)
            self._found = found  # what a pass after a failed one is planned with
            self.follow(made)
        except BaseException:
            self._found = before
            raise
        else:
            self._config = config
        finally:
            self._resolver.keep(self._found)
        self.store.compiler.keeps_blobs = config.compiled_cache
        if before is not None and config.model != before.config.model:
            self._drop_views()
            sources = frozenset(found.setup.sources.values())
            self.store.forget(sources, "its model was replaced")
        return made

    def follow(self, made: Plan) -> None:
        """
        Carry out a whole plan, and hold it against what was done.

        Raises:
            InvalidRequest: The memory budget can never hold it. Nothing has changed.
            CompileError: See `carry_out`.
        """
        self.announce(made)
        for moves in made.stages:
            for move in moves:
                self.carry_out(move)
        self.compare(made)

    def recompile(self) -> Plan:
        """
        Compile everything that serves again, and return to the same state.

        Raises:
            IllegalTransition: Nothing is loaded.
            CompileError: See `carry_out`.
        """
        mode = self.lifecycle.mode
        if mode is None:
            self._fire(Trigger.RECOMPILE, "asked for")  # which the chart refuses, and the log tells
        made = plan_again(self.standing(), self.store.compiler.price)
        self.follow(made)
        return made

    def unload(self, reason: str) -> None:
        """Give every component back. Does nothing while unloaded."""
        if self.lifecycle.mode is None:
            return
        self._drop_views()
        self.store.release(reason)
        self._fire(Trigger.UNLOAD, reason)

    def close(self) -> None:
        """Give every component back, and let go of the model's files."""
        self.unload("closed")
        self._resolver.keep(None)

    def announce(self, made: Plan) -> None:
        """
        Log what will be done, and forget what was done before.

        Raises:
            InvalidRequest: The memory budget can never hold it; the text has the figures.
        """
        self.store.done.clear()
        self._emit(
            "plan.made",
            steps=[str(step) for step in made.steps],
            reasons=[step.reason for step in made.steps],
            expected_seconds=made.expected_seconds,
            expected_bytes=made.expected_bytes,
            fits=made.fits,
        )
        if not made.fits:
            msg = (
                f"This needs {made.peak_bytes / 2**20:.0f} MiB of compiled components at once, but "
                f"the memory budget is {(made.budget or 0) / 2**20:.0f} MiB. Raise memory_budget, "
                "or use precision='bf16' or 'int8', or policy='auto'."
            )
            raise InvalidRequest(msg)

    def compare(self, made: Plan) -> None:
        """Log where what was done differs from what was planned."""
        planned = sorted(str(step) for step in made.steps)
        done = sorted(str(step) for step in self.store.done)
        self.store.done.clear()
        if planned != done:
            self._emit("plan.missed", planned=planned, done=done)

    def _drop_views(self) -> None:
        """Let go of all views: they would keep in memory what is given up after this."""
        if self._views:
            self._views.clear()
            gc.collect()  # optimum's pipelines hold reference cycles

    def _plan_change(self, settings: Settings) -> Plan:
        """Plan what other settings change; all else serves on, be it of a pass's own."""
        mode, config = self.lifecycle.mode, settings.config
        now = replace(
            self.standing(), budget=budget_bytes(config.memory_budget), policy=config.policy
        )
        if mode is None:
            return self._plan_from(now, [])
        was = self._settings.keys(mode, self._geometry)
        keys = {
            name: self.store.service[name].key if was.get(name) == key else key
            for name, key in settings.keys(mode, self._geometry).items()
        }
        return self._plan_from(now, [Stage(mode, keys)])

    def _roll_back(
        self, move: Move, before: Mapping[str, ComponentKey], error: BaseException
    ) -> bool:
        """Put back what served before a move, and return whether some had been given up."""
        given_up = [key.digest for key in before.values() if key not in self.store.held]
        if move.action == "recompile":
            self._emit("recompile.failed", error=named(error), given_up=given_up)
        job, self._job = self._job, None  # a cancelled job must not stop its own rolling back
        try:
            self.store.restore(before)
        except HoldfastError as second:
            let_go(second)
            self._drop_views()
            self.store.release("nothing could be kept")
            self._fire(Trigger.RECOMPILE_ABANDONED, str(second))
            msg = (
                f"{error} The components from before had been given up first, and compiling them "
                f"again failed too ({second}). Nothing is in service any more: the engine is "
                "unloaded. Load it again once the cause is gone."
            )
            component, key = blamed(second, move)
            raise CompileError(msg, component=component, key=key) from error
        finally:
            self._job = job
        if move.action == "recompile":
            self._fire(Trigger.RECOMPILE_ROLLED_BACK, named(error))
        return bool(given_up)

    def _fire(self, trigger: Trigger, reason: str) -> None:
        self.lifecycle.fire(trigger, reason=reason, rss_bytes=resident_bytes())

    def _checkpoint(self, phase: str) -> None:
        if self._job is not None:
            self._job.checkpoint(phase)


_TRIGGERS: Mapping[Action, Callable[[Mode], Trigger]] = {
    "load": Trigger.load,
    "switch": Trigger.switch,
    "recompile": lambda _: Trigger.RECOMPILED,
}
