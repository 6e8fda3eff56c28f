"""
The engine, as a host holds it: any thread may call any method, and one thread does the work.

What happens, and in which order, is `Service`'s to say for each job; this file says which jobs
there are and brings the parts together.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import secrets
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import platformdirs

from holdfast.engine.config import EngineConfig
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.events import Emitter
from holdfast.engine.logbook.write import JsonLines
from holdfast.engine.owner import Owner
from holdfast.engine.recorder import FlightRecorder, crash_found
from holdfast.engine.service import Service
from holdfast.engine.subscribers import Subscribers
from holdfast.states import Lifecycle, Mode, State

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from types import TracebackType

    from holdfast.engine.jobs import Job
    from holdfast.engine.plan import Plan
    from holdfast.engine.requests import Request
    from holdfast.engine.result import Result
    from holdfast.engine.subscribers import Event

_LIBRARIES = (
    "holdfast", "openvino", "optimum-intel", "diffusers", "transformers", "torch", "transitions",
    "structlog",
)  # fmt: skip
_FIXED = ("cache_dir", "cache_limit", "log_file", "flight_recorder", "queue_limit", "order")


@dataclass(frozen=True)
class Snapshot:
    """
    Where an engine stands.

    Attributes:
        state: Of the lifecycle.
        mode: In service, or that a recompile began in; None while unloaded.
        activity: ``"idle"``, ``"compiling"``, ``"running"`` or ``"cancelling"``.
        held: Digest of the key of every compiled component.
        lora: Name and weight of each LoRA in force.
        config: All settings.
    """

    state: State
    mode: Mode | None
    activity: str
    held: tuple[str, ...]
    lora: tuple[str, ...]
    config: EngineConfig


class Engine:
    """
    Makes images with one diffusion model on OpenVINO.

    Nothing is loaded until it is needed: the first request, `load`, `plan` or `prepare` finds the
    model, and a missing one is told then. Close it, or use it as a context manager.

    Args:
        model: See `EngineConfig.model`; or a whole `EngineConfig`.
        **settings: The other fields of `EngineConfig`.

    Raises:
        InvalidRequest: A setting is unknown or out of its range.
    """

    def __init__(self, model: str | Path | EngineConfig = "demo", **settings: Any) -> None:
        self._closed = True  # until it is whole: a failed construction leaves nothing to close
        if isinstance(model, EngineConfig):
            config = model.but(**settings) if settings else model
        else:
            config = EngineConfig(model=model, **settings)
        self._id = secrets.token_hex(4)
        crashed = None if config.flight_recorder is None else crash_found(config.flight_recorder)
        files = _log_files(config)
        self._emit = Emitter(self._id, files)
        self._lifecycle = Lifecycle(self._emit)
        self._owner = Owner(
            f"holdfast-{self._id}", self._emit, queue_limit=config.queue_limit, order=config.order
        )
        self._subscribers = Subscribers(self._owner)
        from holdfast.engine.diskcache import DiskCache  # late: filelock brings asyncio, and ssl

        cache_dir = config.cache_dir or Path(platformdirs.user_cache_dir("holdfast"))
        versions = {name: _version(name) for name in _LIBRARIES}
        self._service = Service(
            config,
            self._lifecycle,
            DiskCache(cache_dir, config.cache_limit, self._emit),
            self._emit,
            versions=versions,
            subscribers=self._subscribers,
        )
        self._release = functools.partial(
            _release, self._service, self._subscribers, self._emit, files, time.monotonic()
        )
        self._closed = False
        self._emit(
            "engine.opened",
            versions=versions,
            model=str(config.model),
            device_asked=config.device,
            config_digest=hashlib.blake2b(config.to_json().encode(), digest_size=8).hexdigest(),
            platform=platform.platform(),
        )
        if crashed is not None:
            self._emit("engine.crash_found", **crashed)
        if config.idle_unload is not None:
            self._owner.idle(config.idle_unload, self._service.rest)

    def __repr__(self) -> str:
        config = self._service.config
        return f"<Engine [{self.state.value}, {config.device}, {config.shapes}]>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=1)
            self._closed = True
            self._owner.close(wait=False, release=self._release)

    @property
    def config(self) -> EngineConfig:
        """All settings in force."""
        return self._service.config

    @property
    def state(self) -> State:
        """Where the lifecycle stands."""
        return self._lifecycle.state

    @property
    def mode(self) -> Mode | None:
        """The mode in service, or that a recompile began in; None while unloaded."""
        return self._lifecycle.mode

    @property
    def activity(self) -> str:
        """What goes on: ``"idle"``, ``"compiling"``, ``"running"`` or ``"cancelling"``."""
        job = self._owner.running
        if job is None:
            return "idle"
        if job.status == "cancelling":
            return "cancelling"
        return "compiling" if job.progress.phase.startswith("prepare") else "running"

    def snapshot(self) -> Snapshot:
        """Return where the engine stands."""
        facts = self._service.facts()
        return Snapshot(
            self.state,
            self.mode,
            self.activity,
            tuple(facts["held"]),
            tuple(facts["lora"]),
            self.config,
        )

    def load(self, mode: Mode | str = Mode.TXT2IMG) -> None:
        """
        Compile what `mode` needs and put it in service.

        State afterwards: ``compiled-<mode>``; where it fails: ``unloaded``.

        Raises:
            IllegalTransition: Something is loaded already.
            ModelSourceError: The model cannot be found, read or exported.
            CompileError: A component could not be compiled.
        """
        wanted = Mode(mode)
        self._owner.call("load", lambda job: self._service.load(job, wanted))

    def switch(self, mode: Mode | str) -> None:
        """
        Put another mode in service; compiles only what no mode has needed before.

        State afterwards: ``compiled-<mode>``; where it fails: unchanged.

        Raises:
            IllegalTransition: Nothing is loaded, or the mode is in service already.
            CompileError: A component could not be compiled.
        """
        wanted = Mode(mode)
        self._owner.call("switch", lambda job: self._service.switch(job, wanted))

    def configure(self, **changes: Any) -> Plan:
        """
        Change settings; what they touch is recompiled, and the state afterwards is the one before.

        Args:
            **changes: Fields of `EngineConfig`.

        Returns:
            What was done.

        Raises:
            InvalidRequest: A setting is unknown, out of its range, fixed, or does not fit here.
            ModelSourceError: A new model or LoRA is refused.
            CompileError: A component could not be compiled: settings and components are the ones
                from before.
        """
        return self._owner.call(
            "configure", lambda job: self._service.configure(job, self._changed(changes))
        )

    def recompile(self) -> Plan:
        """
        Compile everything that serves again. The state afterwards is the one before.

        Raises:
            IllegalTransition: Nothing is loaded.
            CompileError: A component could not be compiled; what served before still does.
        """
        made: Plan = self._owner.call("recompile", self._service.recompile)
        return made

    def unload(self) -> None:
        """Give all components and their memory back. State afterwards: ``unloaded``."""
        self._owner.call("unload", lambda _: self._service.unload("asked for"))

    def plan(self, request: Request | None = None, /, **changes: Any) -> Plan:
        """
        Return what a request, or a change of settings, would take. Nothing that serves changes.

        Raises:
            InvalidRequest: It could not be served at all.
            ModelSourceError: The model or a LoRA is refused.
        """
        return self._owner.call(
            "plan", lambda _: self._service.plan(request or self._changed(changes))
        )

    def prepare(self, request: Request) -> Plan:
        """
        Compile ahead everything that a request needs. State afterwards: its first pass's mode.

        Raises:
            InvalidRequest: It could not be served at all.
            ModelSourceError: The model or a LoRA is refused.
            CompileError: A component could not be compiled.
        """
        return self._owner.call("prepare", lambda job: self._service.prepare(job, request))

    def run(self, request: Request) -> Result:
        """
        Serve a request and wait for it. An interrupt of the waiting thread stops it.

        State afterwards: the mode of its last pass; where it fails: the error's `state_after`.

        Raises:
            InvalidRequest: It cannot be served as asked.
            ModelSourceError: The model or a LoRA is refused.
            CompileError: What it needs could not be put in service.
            GenerationError: A pass failed.
            Cancelled: It was stopped.
            QueueFull: As many requests wait as may.
            EngineClosed: The engine was closed.
        """
        return self.submit(request).bound_result()

    def submit(
        self, request: Request, *, priority: int = 0, deadline: float | None = None
    ) -> Job[Result]:
        """
        Queue a request.

        Args:
            request: What to make.
            priority: Higher ones come first.
            deadline: Seconds from now, waiting included, after which it is stopped.

        Raises:
            QueueFull: As many requests wait as may.
            EngineClosed: The engine was closed.
        """
        return self._owner.submit(
            request.kind,
            lambda job: self._service.run(job, request),
            priority=priority,
            deadline=deadline,
            recompiles=lambda: bool(self._service.plan(request).compiles),
        )

    def job(self, job_id: str) -> Job[Any]:
        """
        Return the job with this `Job.id`: while it waits or runs, and as long as anybody holds it.

        Raises:
            InvalidRequest: There is no such job.
        """
        return self._owner.job(job_id)

    def subscribe(
        self,
        callback: Callable[[Any], object],
        kinds: Collection[type[Event]] | None = None,
        *,
        preview_every: int = 1,
    ) -> Callable[[], None]:
        """
        Have `callback` called with every later event, in a thread of its own.

        Args:
            callback: Takes one event; see `holdfast.engine.subscribers`.
            kinds: Classes of events to receive. None: all.
            preview_every: Steps from one preview to the next.

        Returns:
            A function that ends it.

        Raises:
            EngineClosed: The engine was closed.
        """
        return self._subscribers.subscribe(callback, kinds, preview_every=preview_every)

    def attach(self, sink: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
        """
        Hand every later event of the log to `sink`, at once and in order.

        Args:
            sink: Takes one event as a mapping; must be quick, for the engine waits for it. Where
                it raises it is dropped, and the log says so.

        Returns:
            A function that ends it.
        """
        self._emit.add_sink(sink)
        return lambda: self._emit.remove_sink(sink)

    def close(self, *, wait: bool = True, timeout: float | None = None) -> bool:
        """
        Give everything back. May be called again. State afterwards: ``unloaded``.

        Args:
            wait: Let the running job end; else it is cancelled.
            timeout: Seconds to wait at most; then the running job is cancelled.

        Returns:
            Whether everything has ended.
        """
        self._closed = True
        return self._owner.close(wait=wait, timeout=timeout, release=self._release)

    def _changed(self, changes: dict[str, Any]) -> EngineConfig:
        fixed = sorted(set(changes) & set(_FIXED))
        if fixed:
            msg = (
                f"{', '.join(fixed)} cannot be changed on an open engine; open another one with "
                "the setting that you want."
            )
            raise InvalidRequest(msg, state_after=self.state.value)
        return self.config.but(**changes)


def _log_files(config: EngineConfig) -> tuple[JsonLines | FlightRecorder, ...]:
    try:
        return (
            *([] if config.log_file is None else [JsonLines(config.log_file)]),
            *([] if config.flight_recorder is None else [FlightRecorder(config.flight_recorder)]),
        )
    except OSError as error:
        msg = f"The log was to be written, but that is not possible: {error}. Give another path."
        raise InvalidRequest(msg) from error


def _release(
    service: Service,
    subscribers: Subscribers,
    emit: Emitter,
    files: Iterable[JsonLines | FlightRecorder],
    opened_at: float,
) -> None:
    """Give back in the reverse order of taking. Holds no engine: one may be collected unclosed."""
    service.release()
    emit(
        "engine.closed",
        state=State.UNLOADED.value,
        uptime_seconds=round(time.monotonic() - opened_at, 3),
    )
    subscribers.close()
    for file in files:
        emit.remove_sink(file)
        file.close()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
