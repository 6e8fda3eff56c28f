"""
The one emit point: what Holdfast tells of itself, in one order, to the log and to every sink.

`EVENTS` is the reference of every event and its keys. `docs/events.md` is written from it, and the
test suite holds each event that was emitted against it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import re
import threading
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from holdfast.engine.logbook.writing import printable
from holdfast.states.hosting import HostLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Sink = Callable[[Mapping[str, Any]], None]

COMMON = ("event", "engine_id", "seq", "timestamp", "level")
PROMPT_KEYS = frozenset(
    {"prompt", "negative_prompt", "hires_prompt", "hires_negative_prompt", "words"}
)
"""Keys that hold what a prompt says, where an event has them at all."""


_FOLDERS = re.compile(  # of absolute paths; with spaces in them where they are quoted
    r"""(?<=['"])(?:[A-Za-z]:|~)?[\\/](?:[^'"\n\\/]*[\\/])*(?=[^'"\n\\/]*['"])"""
    r"""|(?<![\w/:.~\\])(?:[A-Za-z]:|~)?[\\/](?:[^\s'"<>|*?,;()\\/]+[\\/])+"""
)


@dataclass(frozen=True, slots=True)
class EventSpec:
    """What one event means, its level, and the keys that it always carries beside `COMMON`."""

    meaning: str
    keys: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    level: str = "info"


def _span(
    meaning: str,
    keys: tuple[str, ...],
    done: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> dict[str, EventSpec]:
    return {
        "started": EventSpec(f"{meaning}: begins", keys, optional),
        "completed": EventSpec(f"{meaning}: done", (*keys, *done, "seconds"), optional),
        "failed": EventSpec(
            f"{meaning}: failed", (*keys, "error", "seconds"), optional, level="error"
        ),
        "cancelled": EventSpec(
            f"{meaning}: stopped on demand", (*keys, "seconds"), optional, level="warning"
        ),
    }


_SPANS = {
    "job": _span("a job of any kind is done", ("request_id", "kind"), ("state",)),
    "imports": _span(
        "the heavy libraries are imported, or waited for", ("wanted",), ("libraries",)
    ),
    "download": _span("a model is fetched from the hub", ("source", "revision")),
    "export": _span("a model is converted to OpenVINO IR", ("source", "fingerprint"), ("bytes",)),
    "component.read": _span("a component's graph is read", ("component",), ("bytes",)),
    "component.fuse": _span(
        "LoRA weights are fused into a clone of a graph", ("component", "lora"), ("layers",)
    ),
    "component.compile": _span(
        "a component is compiled and tried with one small inference",
        ("component", "key", "device_asked", "shape", "lora"),
        ("device", "precision", "cache", "bytes", "private_bytes_delta"),
    ),
    "request": _span(
        "a request", ("request_id", "kind", "width", "height", "steps", "seeds", "settings"),
        ("timings", "compiled", "output_digest", "degradations", "rss_bytes"),
    ),
    "pass": _span(
        "one denoising pass",
        (
            "request_id", "pass", "mode", "pipeline", "width", "height", "steps", "strength",
            "scheduler", "guidance", "seeds", "lora", "input", "input_digest", "images",
        ),
        ("evaluations", "whole", "cheap", "output_digest"),
        ("region", "mask_digest", "model"),
    ),
}  # fmt: skip

EVENTS: Mapping[str, EventSpec] = MappingProxyType({
    "engine.opened": EventSpec(
        "an engine exists; nothing is loaded yet",
        ("versions", "model", "device_asked", "settings", "config_digest", "machine", "platform"),
    ),
    "engine.closed": EventSpec("the engine gave everything back", ("state", "uptime_seconds")),
    "engine.snapshot": EventSpec(
        "where the engine stands, as its snapshot() says", ("state", "mode", "held", "lora")
    ),
    "engine.crash_found": EventSpec(
        "an earlier process died inside a native call", ("died_in", "pid", "elapsed_seconds"),
        level="warning",
    ),
    "export.progress": EventSpec(
        "how far a conversion has come", ("source", "fingerprint", "phase", "done", "total"),
        level="debug",
    ),
    "imports.torchvision_hidden": EventSpec(
        "torchvision cannot be imported here and is hidden from transformers", ("error",),
        level="warning",
    ),
    "model.resolved": EventSpec(
        "the model was found, and exported where it had to be",
        ("model", "fingerprint", "pipeline", "seconds"),
    ),
    "device.found": EventSpec(
        "a physical device is asked for first: what OpenVINO tells of it; `driver` is null where "
        "it has none of its own, as a CPU", ("device", "name", "driver", "plugin"),
    ),
    "cache.discarded": EventSpec(
        "a corrupt or foreign entry of the disk cache was thrown away", ("entry", "why"),
        level="warning",
    ),
    "cache.failed": EventSpec(
        "something of the disk cache cannot be read or written; the work goes on without it",
        ("entry", "error"), level="warning",
    ),
    "cache.recovered": EventSpec("what failed of the disk cache works again", ("entry",)),
    "state.changed": EventSpec(
        "the lifecycle moved", ("trigger", "source", "dest", "reason", "seconds"),
        ("origin", "rss_bytes"),
    ),
    "state.refused": EventSpec(
        "a trigger was refused; nothing changed", ("trigger", "state", "legal"), level="warning"
    ),
    "plan.made": EventSpec(
        "what will be done and why, before it is done; `seconds` from the job's begin to here: the "
        "model was found, what is asked was checked",
        ("steps", "reasons", "expected_seconds", "expected_bytes", "fits", "seconds"),
        ("import_seconds", "passes"),
    ),
    "plan.missed": EventSpec(
        "what was done differs from the plan", ("planned", "done"), level="error"
    ),
    "component.reused": EventSpec(
        "a component that is already held serves again", ("component", "key", "bytes", "why")
    ),
    "component.evicted": EventSpec(
        "a component was given up", ("component", "key", "bytes", "why")
    ),
    "recompile.policy": EventSpec(
        "the way a recompile takes: stage_first or evict_first", ("policy", "why")
    ),
    "recompile.failed": EventSpec(
        "a recompile failed; what was given up for it is compiled again now",
        ("error", "given_up"), level="error",
    ),
    "lora.checked": EventSpec(
        "the LoRAs of a component were read, and fit it", ("component", "lora", "seconds")
    ),
    "view.created": EventSpec(
        "a pipeline view was built", ("mode", "pipeline", "compiles", "seconds")
    ),
    "view.dropped": EventSpec(
        "pipeline views were let go of, with what memory only they held", ("modes", "seconds")
    ),
    "view.refused": EventSpec(
        "a pass was about to run on the wrong pipeline and was stopped",
        ("pass", "mode", "pipeline", "expected"), level="error",
    ),
    "upscale.completed": EventSpec(
        "the first pass's output was enlarged",
        ("upscaler", "fit", "space", "width", "height", "input_digest", "output_digest", "seconds"),
    ),
    "region.cut": EventSpec(
        "a region was cut out of the pictures and brought to the size of its pass",
        ("pass", "region", "mask_digest", "picture_digest", "output_digest"),
    ),
    "region.pasted": EventSpec(
        "what a pass made of a region was put in its place; all else of the pictures stayed",
        ("pass", "region", "mask_digest", "picture_digest", "input_digest", "output_digest"),
    ),
    "prompt.encoded": EventSpec(
        "a prompt went through the text encoders", ("prompt_digest", "tokens", "seconds"),
        ("prompt",),
    ),
    "step.completed": EventSpec(
        "one step of a pass; its evaluation of the denoiser was `whole` or `cheap`",
        ("step", "steps", "image", "seconds", "evaluation"), level="debug",
    ),
    "decode.completed": EventSpec("latents became pixels", ("images", "seconds", "tiled")),
    "encode.completed": EventSpec("pixels became latents", ("images", "seconds", "tiled")),
    "compile.heartbeat": EventSpec(
        "a component is still being compiled",
        ("component", "key", "elapsed_seconds", "expected_seconds", "rss_bytes"), level="debug",
    ),
    "compile.slow": EventSpec(
        "a compile takes far longer than it ever did", ("component", "key", "elapsed_seconds",
        "expected_seconds"), level="warning",
    ),
    "degradation": EventSpec(
        "something was done other than asked, as the host allowed", ("kind", "asked", "given"),
        ("words",), level="warning",
    ),
    "request.queued": EventSpec("a request waits", ("request_id", "kind", "ahead")),
    "cancel.requested": EventSpec("a holder asked to stop a job", ("request_id", "keep", "why")),
    "cancel.observed": EventSpec(
        "the engine noticed", ("request_id", "phase", "seconds_to_stop", "kept")
    ),
    "cleanup.failed": EventSpec(
        "something that came after a change failed; the change is made", ("error",),
        level="warning",
    ),
    "steps.learned": EventSpec(
        "what a step of each pass took was kept for later plans", ("step_seconds", "seconds"),
        level="debug",
    ),
    "learning.failed": EventSpec(
        "what was learned of the time that work takes could not be kept; nothing depends on it",
        ("error",), level="warning",
    ),
    "release.failed": EventSpec(
        "something could not be given back; the rest was, and the next close tries it again",
        ("what", "error"), level="error",
    ),
    "worker.failed": EventSpec(
        "something was raised in the engine's thread outside of any job; it goes on", ("error",),
        level="error",
    ),
    "memory.sampled": EventSpec("resident memory", ("rss_bytes", "held_bytes"), level="debug"),
    "subscriber.failed": EventSpec(
        "a subscriber raised; it goes on receiving", ("error", "subscriber"), level="warning"
    ),
    "http.answered": EventSpec(
        "a server answered a client; `request_id` where it became a request, `error` why it was "
        "refused; status 499: the client left",
        ("method", "path", "status", "client_address", "seconds"), ("request_id", "error"),
    ),
    "settings.changed": EventSpec("settings changed: the old value of each, and the new one",
        ("changes",)),
    **{
        f"{prefix}.{ending}": spec
        for prefix, endings in _SPANS.items()
        for ending, spec in endings.items()
    },
    "job.started": EventSpec(
        "a job of any kind begins; what it is to do", ("request_id", "kind", "asked")
    ),
    "job.failed": EventSpec(
        "a job failed; the state that it leaves",
        ("request_id", "kind", "error", "state", "seconds"), level="error",
    ),
    "job.cancelled": EventSpec(
        "a job was stopped, perhaps before it began",
        ("request_id", "kind", "state", "seconds"), level="warning",
    ),
    "job.refused": EventSpec(
        "a job was not taken on, as when the queue is full or the engine closed",
        ("request_id", "kind", "asked", "error", "state"), level="warning",
    ),
})  # fmt: skip


@dataclass(slots=True)
class _Told:
    """One event on its way: its record, who has yet to get it, and whether the host's log hears."""

    record: Mapping[str, Any]
    sinks: deque[Sink]
    heard: bool


class Emitter:
    """
    Numbers, stamps and hands out one engine's events, to structlog and to each sink.

    Goes through ``logging.getLogger("holdfast")``, which carries a ``NullHandler``: silent until
    the host routes it. Safe to call from any thread; `seq` has no gap and gives the order in
    which every sink saw the events. An event that comes up while another is handed out, as where a
    sink calls back into the engine, is handed out after it.

    Args:
        engine_id: Told in every event, so that several engines in one log can be told apart.
        sinks: Called with each event, in order, under the emitter's lock: must be quick. Each gets
            a record of its own. These stay whatever they raise, as the file on a disk that is full
            for a while. One that is added later is dropped where it raises anything but what its
            own `goes_on_after` names. The log says so.

    Attributes:
        all_or_nothing: An event that is broken into before it has its number is not told at all.
    """

    all_or_nothing = True

    def __init__(self, engine_id: str, sinks: tuple[Sink, ...] = ()) -> None:
        self._host = HostLog()
        self._engine_id = engine_id
        self._pid = os.getpid()
        self._sinks = list(sinks)
        self._lasting = sinks
        self._failing: list[Sink] = []
        self._number = 0
        self._told: deque[_Told] = deque()
        self._handing_out = False
        self._lock = threading.RLock()
        self._scope: ContextVar[Mapping[str, object]] = ContextVar(
            "scope", default=MappingProxyType({})
        )

    def __call__(self, event: str, /, *, level: str = "", **facts: object) -> None:
        """
        Emit one event.

        Args:
            event: A name of `EVENTS`.
            level: Overrides the level that `EVENTS` gives it.
            facts: Its keys; those of the surrounding `scope` are added.
        """
        level = level or EVENTS[event].level
        if os.getpid() != self._pid:  # a forked child has no number to give in its parent's log
            return
        with self._lock:
            heard = self._host.is_configured() or _is_heard(self._host.logger, level)
            if not (heard or self._sinks):
                self._number += 1
                return
            record = {
                "event": event,
                "engine_id": self._engine_id,
                "seq": self._number + 1,
                "timestamp": dt.datetime.now(dt.UTC).isoformat(),
                "level": level,
                **self._scope.get(),
                **facts,
            }
            told = _Told(_own(record), deque(self._sinks), heard)
            self._told.append(told)
            self._number += 1  # from here on it is told, be it with the next one
            if not self._handing_out:
                try:
                    self._hand_out()
                except BaseException as error:
                    if _is_for_the_host(error):
                        raise
                    self._hand_out()  # what was broken into goes on where it was

    def _hand_out(self) -> None:
        try:
            self._handing_out = True
            while self._told:
                self._hand_over(self._told[0])
                self._told.popleft()
        finally:
            self._handing_out = False

    def _hand_over(self, told: _Told) -> None:
        while told.sinks:
            record, present = _own(told.record), self._sinks
            sink = told.sinks.popleft()
            if sink not in present:
                continue
            try:
                sink(record)
            except BaseException as error:
                if _is_for_the_host(error):
                    raise
                self._put_up_with(sink, error)
            else:
                if sink in self._failing:
                    self._failing.remove(sink)
        if told.heard:
            told.heard = False
            self._tell_host(told.record)

    def _put_up_with(self, sink: Sink, error: BaseException) -> None:
        """Drop a sink that has raised, or keep one that goes on after this, and tell it once."""
        if sink in self._failing:
            return
        if sink in self._lasting or isinstance(error, getattr(sink, "goes_on_after", ())):
            self._failing.append(sink)
        else:
            self.remove_sink(sink)
        self("subscriber.failed", error=repr(error), subscriber=repr(sink))

    def _tell_host(self, record: Mapping[str, Any]) -> None:
        """Hand a record to the host's logging, with nothing in it that could end a line there."""
        event = record["event"]
        facts = {
            key: printable(value) if isinstance(value, str) else value
            for key, value in _own(record).items()
            if key not in ("event", "level")
        }
        try:
            self._host(event, record["level"], facts)
        except BaseException as error:
            if _is_for_the_host(error):
                raise
            if event != "subscriber.failed":  # which goes through the same handler
                self("subscriber.failed", error=repr(error), subscriber="logging")

    def add_sink(self, sink: Sink) -> None:
        """Hand every later event to `sink` too."""
        with self._lock:
            self._sinks.append(sink)

    def remove_sink(self, sink: Sink) -> None:
        """Hand no later event to `sink`."""
        with self._lock:
            self._sinks = [each for each in self._sinks if each != sink]
            self._failing = [each for each in self._failing if each != sink]

    @contextlib.contextmanager
    def scope(self, **facts: object) -> Iterator[None]:
        """Add `facts` to every event emitted inside, in this thread and context."""
        token = self._scope.set({**self._scope.get(), **facts})
        try:
            yield
        finally:
            self._scope.reset(token)

    @contextlib.contextmanager
    def span(self, prefix: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """
        Emit ``prefix.started``, then exactly one of ``completed``, ``failed``, ``cancelled``.

        Yields:
            A dictionary; what is put into it goes into the ending.
        """
        from holdfast.engine.errors import Cancelled

        self(f"{prefix}.started", **facts)
        began = time.perf_counter()
        learned: dict[str, Any] = {}
        more: dict[str, str] = {}
        ending = "completed"

        def end() -> None:
            seconds = round(time.perf_counter() - began, 6)
            self(f"{prefix}.{ending}", **{**facts, **learned, **more, "seconds": seconds})

        try:
            yield learned
        except Cancelled:
            ending = "cancelled"
            raise
        except BaseException as error:
            ending = "failed"
            more = {"error": error_words(error)}
            raise
        finally:
            try:
                end()
            except BaseException as error:  # what is begun has an ending, whatever breaks into that
                end()
                if not isinstance(error, Exception):
                    raise


def _own(value: Any) -> Any:
    """Copy a record as far as it can be changed: nobody changes what another one gets."""
    if isinstance(value, dict):
        return {key: _own(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_own(each) for each in value]
    return value


def _is_for_the_host(error: BaseException) -> bool:
    """Whether it is a Ctrl-C of the host that came while its own thread told something."""
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
    )


def error_words(error: BaseException) -> str:
    """Return an error as the log tells it: its class, and its text without the folders of paths."""
    text = getattr(error, "log_text", None) or str(error)
    return f"{type(error).__name__}: {_FOLDERS.sub('', text)}"


def _is_heard(logger: logging.Logger | None, level: str) -> bool:
    """
    Say whether an event of this level could reach anybody through `logger`.

    Rendering it costs more than all else that is done for it, so an event is not rendered for a
    null handler. Where the host has configured structlog, its processors may do anything, and it
    is not asked.
    """
    if logger is None or not logger.isEnabledFor(getattr(logging, level.upper())):
        return False
    while logger is not None:
        if logger.filters or any(type(each) is not logging.NullHandler for each in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
