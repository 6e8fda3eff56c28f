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
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.jobs.worker import Worker
from holdfast.engine.logbook.events import EVENTS, Emitter
from holdfast.engine.logbook.recorder import FlightRecorder, crash_found
from holdfast.engine.logbook.writing import JsonLines
from holdfast.engine.requests.config import FIXED, EngineConfig, users_cache
from holdfast.engine.requests.kinds import Request
from holdfast.engine.requests.told import (
    shown,
    told_machine,
    told_path,
    told_request,
    told_settings,
)
from holdfast.engine.service import Service
from holdfast.engine.subscribers import Subscribers
from holdfast.states import Lifecycle, Mode, State

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Unpack

    from holdfast.engine.compiling.plan import Plan
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.requests.given import EngineChanges, EngineSettings
    from holdfast.engine.results.result import Result
    from holdfast.engine.subscribers import Event

EventT = TypeVar("EventT", bound="Event")
_LIBRARIES = (
    "holdfast", "openvino", "optimum-intel", "diffusers", "transformers", "torch", "transitions",
    "structlog",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """
    The state of an engine at one moment.

    Attributes:
        state: The lifecycle's state.
        mode: The mode in service; in a recompile, the one it began in; None while unloaded.
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

    Nothing is loaded until it is needed. The first request, `load`, `plan` or `prepare` finds the
    model, and fails if there is none. Close the engine, or use it as a context manager.

    Args:
        model: See `EngineConfig.model`; or a whole `EngineConfig`.
        **settings: The other fields of `EngineConfig`.

    Raises:
        InvalidRequest: A setting is unknown or out of its range.
    """

    def __init__(
        self, model: str | Path | EngineConfig = "demo", **settings: Unpack[EngineSettings]
    ) -> None:
        self._closed = True  # until it is whole: a failed construction leaves nothing to close
        if isinstance(model, EngineConfig):
            config = model.but(**settings) if settings else model
        else:
            config = EngineConfig(model=model, **settings)
        self._id = secrets.token_hex(4)
        cache = config.cache_dir or users_cache()
        crashed, files = _log_files(config)
        self._emit = Emitter(self._id, files)
        self._lifecycle = Lifecycle(self._emit)
        self._worker = Worker(
            f"holdfast-{self._id}",
            self._emit,
            self._lifecycle,
            queue_limit=config.queue_limit,
            order=config.order,
        )
        self._subscribers = Subscribers(self._worker)
        from holdfast.engine.models.diskcache import (
            DiskCache,  # late: filelock brings asyncio, and ssl
        )

        versions = {name: _version(name) for name in _LIBRARIES}
        self._service = Service(
            config,
            self._lifecycle,
            DiskCache(cache, config.cache_limit, self._emit),
            self._emit,
            versions=versions,
            subscribers=self._subscribers,
        )
        self._release = _Release(
            self._service,
            self._emit,
            {
                "subscribers": self._subscribers.close,
                **{str(file): functools.partial(_close, file, self._emit) for file in files},
            },
        )
        self._closed = False
        self._emit(
            "engine.opened",
            versions=versions,
            model=told_path(config.model),
            device_asked=config.device,
            settings=told_settings(config.model_dump()),
            machine=told_machine(),
            config_digest=hashlib.blake2b(config.to_json().encode(), digest_size=8).hexdigest(),
            platform=platform.platform(),
        )
        if crashed is not None:
            self._emit("engine.crash_found", **crashed)
        self._worker.idle(self._service.idle_seconds, self._service.rest)

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
        if not self._closed and not self._worker.is_forked:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=1)
            self._closed = True
            self._worker.close(cancel=True, timeout=0, release=self._release)

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
        """The mode in service; in a recompile, the one it began in; None while unloaded."""
        return self._lifecycle.mode

    @property
    def activity(self) -> str:
        """What it is doing: ``"idle"``, ``"compiling"``, ``"running"`` or ``"cancelling"``."""
        job = self._worker.running
        if job is None:
            return "idle"
        if job.status == "cancelling":
            return "cancelling"
        compiles = job.progress.phase.startswith(("prepare", "import"))
        return "compiling" if compiles else "running"

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

    def model_facts(self) -> ModelFacts:
        """
        Return what there is to know of the model: sizes, modes, schedulers, names.

        It is found, and exported, where that has not happened yet; nothing is compiled.

        Raises:
            ModelSourceError: The model cannot be found, read or exported.
        """
        facts: ModelFacts = self._worker.call("model_facts", lambda _: self._service.model_facts())
        return facts

    def load(self, mode: Mode | str = Mode.TXT2IMG) -> None:
        """
        Compile what `mode` needs and put it in service.

        State afterwards: ``compiled-<mode>``; where it fails: ``unloaded``.

        Raises:
            InvalidRequest: There is no such mode.
            IllegalTransition: Something is loaded already.
            ModelSourceError: The model cannot be found, read or exported.
            CompileError: A component could not be compiled.
        """
        asked = told_settings({"mode": mode})
        with self._worker.checking("load", asked):
            wanted = _mode(mode)
        self._worker.call("load", lambda job: self._service.load(job, wanted), asked)

    def switch(self, mode: Mode | str) -> None:
        """
        Put another mode in service; compiles only what no mode has needed before.

        State afterwards: ``compiled-<mode>``; where it fails: unchanged.

        Raises:
            InvalidRequest: There is no such mode.
            IllegalTransition: Nothing is loaded, or the mode is in service already.
            CompileError: A component could not be compiled.
        """
        asked = told_settings({"mode": mode})
        with self._worker.checking("switch", asked):
            wanted = _mode(mode)
        self._worker.call("switch", lambda job: self._service.switch(job, wanted), asked)

    def configure(self, **changes: Unpack[EngineChanges]) -> Plan:
        """
        Change settings, and recompile what they affect. State afterwards: the one before.

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
        asked = told_settings(changes)
        with self._worker.checking("configure", asked):
            self._changed(changes)
        return self._worker.call(
            "configure", lambda job: self._service.configure(job, self._changed(changes)), asked
        )

    def recompile(self) -> Plan:
        """
        Compile every component in service again. State afterwards: the one before.

        Raises:
            IllegalTransition: Nothing is loaded.
            CompileError: A component could not be compiled; the ones from before are in service.
        """
        made: Plan = self._worker.call("recompile", self._service.recompile)
        return made

    def unload(self) -> None:
        """Give all components and their memory back. State afterwards: ``unloaded``."""
        self._worker.call("unload", lambda _: self._service.unload("asked for"))

    def plan(self, request: Request | None = None, /, **changes: Unpack[EngineChanges]) -> Plan:
        """
        Return what a request, or a change of settings, would take. Nothing that serves changes.

        Raises:
            InvalidRequest: It could not be served at all.
            ModelSourceError: The model or a LoRA is refused.
        """
        asked = told_settings(changes) if request is None else told_request(request)
        with self._worker.checking("plan", asked):
            if request is None:
                self._changed(changes)
            else:
                self._check_request(request, "planned")
        return self._worker.call(
            "plan",
            lambda _: self._service.plan(self._changed(changes) if request is None else request),
            asked,
        )

    def prepare(self, request: Request) -> Plan:
        """
        Compile ahead everything that a request needs. State afterwards: its first pass's mode.

        Raises:
            InvalidRequest: It could not be served at all.
            ModelSourceError: The model or a LoRA is refused.
            CompileError: A component could not be compiled.
        """
        asked = told_request(request)
        with self._worker.checking("prepare", asked):
            self._check_request(request, "to be prepared")
        return self._worker.call("prepare", lambda job: self._service.prepare(job, request), asked)

    def run(self, request: Request) -> Result:
        """
        Serve a request and wait for it. An interrupt of the waiting thread (Ctrl-C) stops it.

        State afterwards: the mode of its last pass; where it fails: the error's `state_after`.

        Raises:
            InvalidRequest: It cannot be served as asked.
            ModelSourceError: The model or a LoRA is refused.
            CompileError: What it needs could not be put in service.
            GenerationError: A pass failed.
            Cancelled: It was stopped.
            QueueFull: `queue_limit` requests wait already.
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
            priority: Requests with a higher one run first.
            deadline: Seconds from now, over 0, after which it is stopped, even in the queue.

        Raises:
            InvalidRequest: `priority` is no whole number, or `deadline` is not over 0.
            QueueFull: `queue_limit` requests wait already.
            EngineClosed: The engine was closed.
        """
        with self._worker.checking("submit", {"request": type(request).__name__}):
            self._check_request(request, "submitted")
        return self._worker.submit(
            request.kind,
            lambda job: self._service.run(job, request),
            asked=told_request(request),
            priority=priority,
            deadline=deadline,
            recompiles=lambda: bool(self._service.plan(request).compiles),
        )

    def job(self, job_id: str) -> Job[Any]:
        """
        Return the job with this `Job.id`, as long as it waits, runs, or anybody has a reference.

        Raises:
            InvalidRequest: There is no such job.
        """
        return self._worker.job(job_id)

    @overload
    def subscribe(
        self,
        callback: Callable[[EventT], object],
        kinds: Collection[type[EventT]],
        *,
        preview_every: int = 1,
    ) -> Callable[[], None]: ...

    @overload
    def subscribe(
        self,
        callback: Callable[[Event], object],
        kinds: None = None,
        *,
        preview_every: int = 1,
    ) -> Callable[[], None]: ...

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
            callback: Takes one event; see `Event` and its subclasses.
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
                it raises, it is dropped, and the log says so. If it has an attribute
                `goes_on_after`, a tuple of classes of errors, it is not dropped for these.

        Returns:
            A function that ends it.

        Raises:
            InvalidRequest: `sink` cannot be called.
        """
        if not callable(sink):
            msg = f"{shown(sink)} was to be called with events, but it is no function; give one."
            raise InvalidRequest(msg, state_after=self.state.value)
        self._emit.add_sink(sink)
        return lambda: self._emit.remove_sink(sink)

    def emit(self, event: str, /, *, level: str = "", **facts: object) -> None:
        """
        Add an event to the log, for what stands around the engine, as a server does.

        Args:
            event: A name of the reference of events.
            level: Overrides the one that the event has there.
            **facts: Its keys.

        Raises:
            InvalidRequest: There is no such event.
        """
        if event not in EVENTS:
            msg = f"{shown(event)} was to be logged, which is no event; docs/events.md lists them."
            raise InvalidRequest(msg, state_after=self.state.value)
        self._emit(event, level=level, **facts)

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> bool:
        """
        Release everything, and return when that is done. May be called again.

        State afterwards: ``unloaded``.

        Args:
            cancel: Stop the running job. False: wait until it ends.
            timeout: Seconds to wait at most; then the running job is cancelled.

        Returns:
            Whether everything has ended and was given back. Where it has not, call it again.

        Raises:
            InvalidRequest: `timeout` is no number; nothing was closed.
        """
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout == timeout):  # noqa: PLR0124 - a NaN is no number
            msg = f"close was called with the timeout {shown(timeout)}; give seconds, or None."
            raise InvalidRequest(msg, state_after=self.state.value)
        self._closed = True
        return self._worker.close(cancel=cancel, timeout=timeout, release=self._release)

    def _check_request(self, request: object, what: str) -> None:
        if not isinstance(request, Request):
            msg = (
                f"{type(request).__name__} was {what}, which is no request; make one such as "
                "Txt2Img or Hires, or read one with request_from_json."
            )
            raise InvalidRequest(msg, state_after=self.state.value)

    def _changed(self, changes: Mapping[str, Any]) -> EngineConfig:
        fixed = sorted(set(changes) & set(FIXED))
        if fixed:
            msg = (
                f"{', '.join(fixed)} cannot be changed on an open engine; open another one with "
                "the setting that you want."
            )
            raise InvalidRequest(msg, state_after=self.state.value)
        return self.config.but(**changes)


def _log_files(
    config: EngineConfig,
) -> tuple[dict[str, Any] | None, tuple[JsonLines | FlightRecorder, ...]]:
    """Return what the last process died in, as far as that is known, and the open files."""
    recorder = config.flight_recorder
    try:
        crashed = None if recorder is None else crash_found(recorder)
        return crashed, (
            *([] if config.log_file is None else [JsonLines(config.log_file)]),
            *([] if recorder is None else [FlightRecorder(recorder)]),
        )
    except (OSError, ValueError) as error:
        msg = f"The log was to be written, but that is not possible: {error}. Give another path."
        raise InvalidRequest(msg) from error


class _Release:
    """
    Gives back in the reverse order of taking: each step is tried, whatever became of those before.

    Holds no engine: one may be collected unclosed. Called again, it does what had failed.

    Args:
        service: Given back first.
        emit: Told ``engine.closed`` after that.
        rest: What is given back then, by name.
    """

    def __init__(
        self, service: Service, emit: Emitter, rest: Mapping[str, Callable[[], None]]
    ) -> None:
        self._emit = emit
        self._opened_at = time.monotonic()
        self._service = service
        self._steps = {"engine": service.release, "log": self._tell, **rest}

    def __call__(self) -> bool:
        for name, step in tuple(self._steps.items()):
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - closing always closes: what comes after is given back too
                self._emit("release.failed", what=name, error=f"{type(error).__name__}: {error}")
            else:
                del self._steps[name]
        return not self._steps

    def _tell(self) -> None:
        self._emit(
            "engine.closed",
            state=self._service.facts()["state"],
            uptime_seconds=round(time.monotonic() - self._opened_at, 3),
        )


def _mode(asked: Mode | str) -> Mode:
    if isinstance(asked, str) and asked in tuple(Mode):
        return Mode(asked)
    msg = f"the mode {shown(asked)} was asked for; there are {', '.join(Mode)}."
    raise InvalidRequest(msg)


def _close(file: JsonLines | FlightRecorder, emit: Emitter) -> None:
    emit.remove_sink(file)
    file.close()
    if isinstance(file, JsonLines):
        emit.add_sink(functools.partial(_append, file.path))


def _append(path: Path, event: Mapping[str, Any]) -> None:
    """Write what is told of an engine that is closed, such as a refused job; hold no file open."""
    if path.exists():
        with JsonLines(path) as file:
            file(event)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
