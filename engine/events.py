"""
The one emit point: what Holdfast tells of itself, in one order, to the log and to every sink.

`EVENTS` is the reference of every event and its keys. `docs/events.md` is written from it, and the
test suite holds each event that was emitted against it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import logging
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from holdfast.engine.logbook.write import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Sink = Callable[[Mapping[str, Any]], None]

LOGGER_NAME = "holdfast"
COMMON = ("event", "engine_id", "seq", "timestamp", "level")
PROMPT_KEYS = frozenset(
    {"prompt", "negative_prompt", "hires_prompt", "hires_negative_prompt", "words"}
)
"""Keys that hold what a prompt says, where an event has them at all."""


@dataclass(frozen=True, slots=True)
class EventSpec:
    """What one event means, its level, and the keys that it always carries beside `COMMON`."""

    meaning: str
    keys: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    level: str = "info"


def _span(meaning: str, keys: tuple[str, ...], done: tuple[str, ...] = ()) -> dict[str, EventSpec]:
    return {
        "started": EventSpec(f"{meaning}: begins", keys),
        "completed": EventSpec(f"{meaning}: done", (*keys, *done, "seconds")),
        "failed": EventSpec(f"{meaning}: failed", (*keys, "error", "seconds"), level="error"),
        "cancelled": EventSpec(
            f"{meaning}: stopped on demand", (*keys, "seconds"), level="warning"
        ),
    }


_SPANS = {
    "download": _span("a model is fetched from the hub", ("source", "revision")),
    "export": _span("a model is converted to OpenVINO IR", ("source", "fingerprint"), ("bytes",)),
    "component.read": _span("a component's graph is read", ("component",), ("bytes",)),
    "component.fuse": _span(
        "LoRA weights are fused into a clone of a graph", ("component", "lora"), ("layers",)
    ),
    "component.compile": _span(
        "a component is compiled and tried with one small inference",
        ("component", "key", "device_asked", "shape", "lora"),
        ("device", "precision", "cache", "bytes"),
    ),
    "request": _span(
        "a request", ("request_id", "kind", "width", "height", "steps", "seeds")
    ),
    "pass": _span(
        "one denoising pass",
        (
            "request_id", "pass", "mode", "pipeline", "width", "height", "steps", "strength",
            "scheduler", "guidance", "lora", "input", "input_digest", "images",
        ),
        ("evaluations", "output_digest"),
    ),
}  # fmt: skip

EVENTS: Mapping[str, EventSpec] = MappingProxyType({
    "engine.opened": EventSpec(
        "an engine exists; nothing is loaded yet",
        ("versions", "model", "device_asked", "config_digest", "platform"),
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
        "the model was found", ("model", "fingerprint", "pipeline"), ("path",)
    ),
    "cache.discarded": EventSpec(
        "a corrupt or foreign entry of the disk cache was thrown away", ("entry", "why"),
        level="warning",
    ),
    "state.changed": EventSpec(
        "the lifecycle moved", ("trigger", "source", "dest", "reason", "seconds"),
        ("origin", "rss_bytes"),
    ),
    "state.refused": EventSpec(
        "a trigger was refused; nothing changed", ("trigger", "state", "legal"), level="warning"
    ),
    "plan.made": EventSpec(
        "what will be done and why, before it is done",
        ("steps", "reasons", "expected_seconds", "expected_bytes", "fits"),
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
    "view.created": EventSpec("a pipeline view was built", ("mode", "pipeline", "compiles")),
    "view.refused": EventSpec(
        "a pass was about to run on the wrong pipeline and was stopped",
        ("pass", "mode", "pipeline", "expected"), level="error",
    ),
    "upscale.completed": EventSpec(
        "the first pass's output was enlarged",
        ("upscaler", "space", "width", "height", "input_digest", "output_digest", "seconds"),
    ),
    "prompt.encoded": EventSpec(
        "a prompt went through the text encoders", ("prompt_digest", "tokens", "seconds"),
        ("prompt",),
    ),
    "step.completed": EventSpec(
        "one step of a pass", ("step", "steps", "image", "seconds"), level="debug"
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
    "memory.sampled": EventSpec("resident memory", ("rss_bytes", "held_bytes"), level="debug"),
    "subscriber.failed": EventSpec(
        "a subscriber raised; it goes on receiving", ("error", "subscriber"), level="warning"
    ),
    **{
        f"{prefix}.{ending}": spec
        for prefix, endings in _SPANS.items()
        for ending, spec in endings.items()
    },
})  # fmt: skip


class Emitter:
    """
    Numbers, stamps and hands out one engine's events, to structlog and to each sink.

    Goes through ``logging.getLogger("holdfast")``, which carries a ``NullHandler``: silent until
    the host routes it. Safe to call from any thread; `seq` has no gap and gives the order in
    which every sink saw the events.

    Args:
        engine_id: Told in every event, so that several engines in one log can be told apart.
        sinks: Called with each event, in order, under the emitter's lock: must be quick. A sink
            that raises is dropped, and the log says so.
    """

    def __init__(self, engine_id: str, sinks: tuple[Sink, ...] = ()) -> None:
        import structlog  # late, as it brings asyncio, and rich where that is installed

        self._logger = logging.getLogger(LOGGER_NAME)
        if not self._logger.handlers:
            self._logger.addHandler(logging.NullHandler())
        self._log = structlog.wrap_logger(self._logger)
        self._engine_id = engine_id
        self._sinks = list(sinks)
        self._numbers = itertools.count(1)
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
        with self._lock:
            number = next(self._numbers)
            heard = _is_heard(self._logger, level)
            if not (heard or self._sinks):
                return
            record: dict[str, Any] = {
                "event": event,
                "engine_id": self._engine_id,
                "seq": number,
                "timestamp": dt.datetime.now(dt.UTC).isoformat(),
                "level": level,
                **self._scope.get(),
                **facts,
            }
            broken: list[tuple[Sink, Exception]] = []
            for sink in tuple(self._sinks):
                try:
                    sink(record)
                except Exception as error:  # noqa: BLE001 - a host's broken sink must not stop a run
                    broken.append((sink, error))
            if heard:
                self._tell(record)
            for sink, why in broken:  # once every other sink has the event that comes before
                self.remove_sink(sink)
                self("subscriber.failed", error=repr(why), subscriber=repr(sink))

    def _tell(self, record: dict[str, Any]) -> None:
        """Hand a record to the host's logging, with nothing in it that could end a line there."""
        event = record["event"]
        facts = {
            key: printable(value) if isinstance(value, str) else value
            for key, value in record.items()
            if key not in ("event", "level")
        }
        try:
            getattr(self._log, record["level"])(event, **facts)
        except Exception as error:  # noqa: BLE001 - a host's broken handler must not stop a run
            if event != "subscriber.failed":  # which goes through the same handler
                self("subscriber.failed", error=repr(error), subscriber="logging")

    def add_sink(self, sink: Sink) -> None:
        """Hand every later event to `sink` too."""
        with self._lock:
            self._sinks.append(sink)

    def remove_sink(self, sink: Sink) -> None:
        """Hand no later event to `sink`."""
        with self._lock:
            self._sinks = [each for each in self._sinks if each is not sink]

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

        def end(ending: str, **more: Any) -> None:
            seconds = round(time.perf_counter() - began, 6)
            self(f"{prefix}.{ending}", **{**facts, **learned, **more, "seconds": seconds})

        try:
            yield learned
        except Cancelled:
            end("cancelled")
            raise
        except BaseException as error:
            text = getattr(error, "log_text", None) or str(error)
            end("failed", error=f"{type(error).__name__}: {text}")
            raise
        end("completed")


def _is_heard(logger: logging.Logger | None, level: str) -> bool:
    """
    Say whether an event of this level could reach anybody through `logger`.

    Rendering it costs more than all else that is done for it, so an event is not rendered for a
    null handler. Where the host has configured structlog, its processors may do anything.
    """
    import structlog

    if structlog.is_configured():
        return True
    if logger is None or not logger.isEnabledFor(getattr(logging, level.upper())):
        return False
    while logger is not None:
        if logger.filters or any(type(each) is not logging.NullHandler for each in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
