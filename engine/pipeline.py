"""
The compiled pipeline: its lifecycle, what serves in it, and the transactions that change that.

Everything here runs in the engine's worker thread. Work is done between triggers, so that the state
is true whatever fails.
"""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.engine.compiling.components import ComponentStore
from holdfast.engine.compiling.faults import blamed, move_error, named
from holdfast.engine.compiling.memory import budget_bytes, resident_bytes
from holdfast.engine.compiling.plan import Cost, Move, Plan, Stage, Standing, Step, plan, plan_again
from holdfast.engine.compiling.settings import Resolver, Settings
from holdfast.engine.errors import (
    CompileError,
    GenerationError,
    HoldfastError,
    InvalidRequest,
    let_go,
)
from holdfast.engine.imports import begin_heavy
from holdfast.engine.passes.views import View, check_view, make_view
from holdfast.engine.requests.told import told_settings
from holdfast.states import State, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from holdfast.engine.compiling.keys import ComponentKey
    from holdfast.engine.compiling.plan import Action
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.diskcache import DiskCache
    from holdfast.engine.models.families import Geometry
    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.requests.config import EngineConfig
    from holdfast.engine.requests.lora import Lora
    from holdfast.states import Lifecycle, Mode

T = TypeVar("T")


@dataclass(frozen=True)
class _Before:
    """
    What a move began with, and goes back to where it fails.

    Attributes:
        move: That was begun.
        service: The key of each component that served.
        config: The settings in force.
        state: Of the lifecycle.
    """

    move: Move
    service: Mapping[str, ComponentKey]
    config: EngineConfig
    state: State


class CompiledPipeline:
    """
    One model's compiled components and the views on them. Begins ``unloaded``.

    A change is made by two assignments and a trigger, at the end of a move (see `carry_out`). What
    comes before them is undone, whatever is raised; what comes after them is cleaning up, which
    fails nothing and is logged where it could not be done.

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
        self._before: _Before | None = None
        self._leaving = ""
        self._geometry: Geometry | None = None
        self._resolver = Resolver(self.store.compiler, cache, emit)
        self._config = config
        self._found: Settings | None = None
        self._others: dict[str | Path, Settings] = {}

    @property
    def config(self) -> EngineConfig:
        """What it is set to."""
        return self._config

    @property
    def _settings(self) -> Settings:
        """What follows from `config`; the model is found (and exported) when it is needed first."""
        if self._found is None or self._found.config is not self._config:
            self._found = self._resolver.settings(self._config)
        return self._found

    @property
    def model(self) -> Model:
        """The model in force."""
        return self._settings.model

    def model_of(self, name: str | Path | None) -> Model:
        """
        Return the model of a pass: that of this name, or for None the one in force.

        Raises:
            ModelSourceError: It cannot be found, read or exported.
        """
        return self._settings_of(name).model

    def _settings_of(self, name: str | Path | None) -> Settings:
        if name is None or name == self._config.model:
            return self._settings
        config = self._config.but(model=name, vae=None)
        found = self._others.get(name)
        if found is None or found.config != config or not found.model.is_unchanged:
            found = self._resolver.settings(config)
            self._others = {name: found}
        return found

    @property
    def _in_service(self) -> Settings:
        """The settings of the model that serves, which may be that of a pass alone."""
        serving = {part.key.source for part in self.store.service.values()}
        own = self._settings
        found = (own, *self._others.values())
        return next((each for each in found if serving <= set(each.setup.sources.values())), own)

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
        model: str | Path | None = None,
    ) -> Stage:
        """
        Return what one pass needs.

        Args:
            mode: Of the pass.
            geometry: Of its images. None: of the latest pass's, or the model's own where there was
                none or it cannot make that.
            loras: In place of the engine's, or None.
            model: The same.

        Raises:
            LoraError: A LoRA file is refused.
            ModelSourceError: The model is.
        """
        settings = self._settings_of(model)
        own = settings is self._settings
        if own and not settings.model.is_unchanged and not self.holds(mode, geometry, loras):
            # Its files were replaced, or removed by a cleaner of caches, and some must be read now.
            self._found = settings = self._resolver.settings(self._config)
        return self._stage(settings, mode, geometry, loras)

    @property
    def knows_model(self) -> bool:
        """Whether the model in force was found; its files may be gone again."""
        return self._found is not None and self._found.config is self._config

    def holds(self, mode: Mode, geometry: Geometry | None, loras: tuple[Lora, ...] | None) -> bool:
        """
        Tell whether all that one pass needs is compiled, so that no file is read for it.

        What is compiled has weights mapped still, and may not run where these were written into.
        """
        if self.model.is_overwritten:
            return False
        if not self.store.service.keys() >= set(self.model.family.components(mode)):
            return False
        needed = self._stage(self._settings, mode, geometry, loras).keys.values()
        return set(needed) <= set(self.store.held)

    def _stage(
        self,
        settings: Settings,
        mode: Mode,
        geometry: Geometry | None,
        loras: tuple[Lora, ...] | None,
    ) -> Stage:
        uses = None if loras is None else self._resolver.identify(loras, settings.model)
        keys = settings.keys(mode, geometry or self._geometry, uses)
        for key in self.store.held.keys() & set(keys.values()):
            self.store.compiler.check_mapped(key)
        return Stage(mode, keys)

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

    def work(self, job: Job[Any], work: Callable[[], T]) -> T:
        """
        Do `work`, in which `job` stops native calls, and let go of what only it needed.

        Whatever breaks into it, and be it into the undoing, what the state says is true afterwards.
        """
        self.settle()
        self._job = job
        try:
            return work()
        finally:
            self._job = None
            try:
                self.settle()
                self.store.compiler.loras.clear()
            except BaseException as error:  # noqa: BLE001 - the work is done, or its own error is on its way
                self._tell_of(error)

    def settle(self) -> None:
        """End what was broken into: a move is undone, an unload is done; else do nothing."""
        self.store.tell()
        if self._before is not None:
            msg = "it was broken into"
            self._roll_back(HoldfastError(msg))
        if self._leaving:
            self._give_up(self._leaving)

    def carry_out(self, move: Move, config: EngineConfig | None = None) -> None:
        """
        Put exactly the move's components in service, or leave what serves as it is.

        Args:
            move: What is to serve, and the steps to it.
            config: Settings that come into force with it. None: those that are.

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
        served = False
        self._before = _Before(move, before, self._config, self.lifecycle.state)
        try:
            self._begin(move)
            self.store.compiler.keeps_blobs = (config or self._config).compiled_cache
            self.store.serve(move.service, self.store.stage(move))
            self._config, served = config or self._config, True
            self._end(move)
            self._before = None
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is undone and goes on
            if served and self.lifecycle.state is State.compiled(move.mode):
                self._before = None
                self._tell_of(error)
                return
            given_up = self._roll_back(error)
            raise move_error(error, move, given_up=given_up) from error.__cause__

    def _begin(self, move: Move) -> None:
        if move.action == "recompile":
            policy = "evict_first" if move.evicts_first else "stage_first"
            self._fire(Trigger.RECOMPILE, move.reason)
            self._emit("recompile.policy", policy=policy, why=self.config.policy)
        if move.action == "load":
            with contextlib.suppress(RuntimeError):  # no thread is left: they come in when needed
                begin_heavy()

    def _end(self, move: Move) -> None:
        if move.action != "reuse":
            self.store.done.append(Step(move.action, str(move.mode)))
            self._fire(_TRIGGERS[move.action](move.mode), move.reason)

    def view(self, mode: Mode) -> View:
        """Return the pipeline of `mode` on the components in service, built anew where needed."""
        view = self._views.get(mode)
        if view is None or not view.serves(self.store.service):
            view = self._views[mode] = make_view(
                self._in_service.model, mode, self.store.service, self._checkpoint, self._emit
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
        check_view(view, view.model.family, spec.mode, spec.number, self._emit)
        return view

    def plan_change(self, config: EngineConfig) -> Plan:
        """Decide what other settings would take. No side effect."""
        mode = self.lifecycle.mode
        try:
            ahead = self.plan_ahead(config, [] if mode is None else [mode])
            return ahead or self._plan_change(self._resolver.settings(config))
        finally:
            self._keep_model()

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
        was = self._config
        try:
            found = self._resolver.settings(config)
            made = self._plan_change(found)
            self.announce(made)
            for move in [move for moves in made.stages for move in moves]:
                self.carry_out(move, config)
        except BaseException:
            self._keep_model()
            raise
        self._config = config
        try:
            self._found = found
            self._tell_changes(was)
            self.compare(made)
            if config.model != was.model:
                self._drop_views()
                sources = frozenset(found.setup.sources.values())
                self.store.forget(sources, "its model was replaced")
            self._others.clear()
            self._resolver.keep(found)
        except BaseException as error:  # noqa: BLE001 - the change is made, and this is what comes after it
            self._tell_of(error)
        return made

    def _tell_changes(self, was: EngineConfig) -> None:
        before, after = (told_settings(each.model_dump()) for each in (was, self._config))
        changes = {
            name: [before[name], after[name]] for name in after if before[name] != after[name]
        }
        if changes:
            self._emit("settings.changed", changes=changes)

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
        try:
            self.compare(made)
        except BaseException as error:  # noqa: BLE001 - it is done, and this is what comes after it
            self._tell_of(error)

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
        self._leaving = reason
        try:
            self._give_up(reason)
        except BaseException as error:  # noqa: BLE001 - what is given up by half is given up whole
            self._give_up(reason)
            self._tell_of(error)

    def close(self) -> None:
        """Give every component back, and let go of the model's files."""
        self.settle()
        self.unload("closed")
        self.store.compiler.forget()
        self._others.clear()
        self._resolver.keep()

    def announce(self, made: Plan) -> None:
        """
        Log what will be done, and forget what was done before.

        Raises:
            InvalidRequest: The memory budget can never hold it; the text has the figures.
        """
        self.store.done.clear()
        more: dict[str, Any] = {}
        if made.imports is not None:
            more["import_seconds"] = made.imports.seconds
        if made.passes:
            more["passes"] = [str(each.evaluations) for each in made.passes]
        self._emit(
            "plan.made",
            steps=[str(step) for step in made.steps],
            reasons=[step.reason for step in made.steps],
            expected_seconds=made.expected_seconds,
            expected_bytes=made.expected_bytes,
            fits=made.fits,
            seconds=0.0 if self._job is None else round(self._job.seconds, 6),
            **more,
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
            began, modes = time.perf_counter(), [str(mode) for mode in self._views]
            self._views.clear()
            gc.collect()  # optimum's pipelines hold reference cycles
            self._emit("view.dropped", modes=modes, seconds=round(time.perf_counter() - began, 6))

    def _plan_change(self, settings: Settings) -> Plan:
        """Plan what other settings change; all else serves on, be it of a pass's own."""
        mode, config = self.lifecycle.mode, settings.config
        now = replace(
            self.standing(), budget=budget_bytes(config.memory_budget), policy=config.policy
        )
        if mode is None:
            return self._plan_from(now, [])
        serving = self._in_service
        if serving is not self._settings and config.model == self._config.model:
            settings = self._resolver.settings(config.but(model=serving.config.model, vae=None))
        was = serving.keys(mode, self._geometry)
        keys = {
            name: self.store.service[name].key if was.get(name) == key else key
            for name, key in settings.keys(mode, self._geometry).items()
        }
        return self._plan_from(now, [Stage(mode, keys)])

    def _roll_back(self, error: BaseException) -> bool:
        """Put back what served before a move, and return whether some had been given up."""
        before = self._before
        if before is None:
            return False
        if self.lifecycle.state not in (before.state, State.recompiling(before.move.mode)):
            self._before = None  # the move was made: it is only this that was still to be done
            return False
        self._config = before.config
        job, self._job = self._job, None  # a cancelled job must not stop its own rolling back
        try:
            given_up = [key.digest for key in before.service.values() if key not in self.store.held]
            if self.lifecycle.state.is_recompiling:
                self._emit("recompile.failed", error=named(error), given_up=given_up)
            self.store.restore(before.service)
            if self.lifecycle.state.is_recompiling:
                self._fire(Trigger.RECOMPILE_ROLLED_BACK, named(error))
        except BaseException as second:  # noqa: BLE001 - whatever it is, nothing may stay half done
            let_go(second)
            self._leaving = "nothing could be kept"
            self._give_up(str(second))
            msg = (
                f"{error} The components from before had been given up first, and compiling them "
                f"again failed too ({second}). Nothing is in service any more: the engine is "
                "unloaded. Load it again once the cause is gone."
            )
            component, key = blamed(second, before.move)
            raise CompileError(msg, component=component, key=key) from error
        finally:
            self._job = job
        self._before = None
        return bool(given_up)

    def _give_up(self, reason: str) -> None:
        """Give up all that is held, and be ``unloaded``. Where it was broken into, do it again."""
        self._drop_views()
        self.store.release("nothing could be kept" if self._before else reason)
        state = self.lifecycle.state
        if state.mode is not None:
            trigger = Trigger.RECOMPILE_ABANDONED if self._before else Trigger.UNLOAD
            self._fire(trigger if state.is_recompiling else Trigger.UNLOAD, reason)
        self._before, self._leaving = None, ""
        try:
            self.store.compiler.forget()
        except BaseException as error:  # noqa: BLE001 - it is unloaded, and this is what comes after it
            self._tell_of(error)

    def _keep_model(self) -> None:
        """Let go of every model but the one in force."""
        try:
            self._resolver.keep(*filter(None, (self._found, *self._others.values())))
        except BaseException as error:  # noqa: BLE001 - nothing depends on it
            self._tell_of(error)

    def _tell_of(self, error: BaseException) -> None:
        self._emit("cleanup.failed", error=named(error))

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
