"""An engine's events as OpenTelemetry spans and metrics, through the host's own providers."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from opentelemetry import context, metrics, trace

from holdfast.engine.logbook.events import PROMPT_KEYS
from holdfast.engine.logbook.reading import Entry
from holdfast.engine.logbook.spans import STARTED, OpenSpans

if TYPE_CHECKING:
    from collections.abc import Mapping

_SCOPE = "holdfast"
_UNTOLD = PROMPT_KEYS | {"event", "timestamp", "level", "seq", "error"}  # told in its own ways
_CALLERS_KEPT = 1024


class OpenTelemetry:
    """
    A sink that follows one engine: request > pass > step, and each read, fuse and compile.

    Needs the extra ``otel``. A request's span belongs to the span that was current in the thread
    that submitted it. Prompts are in nothing that is told, nor are texts of errors, which may
    quote them; an error's type is.

    Args:
        tracer_provider: By default the host's global one; without any, nothing is told.
        meter_provider: The same.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        self._instruments = _Instruments(metrics.get_meter(_SCOPE, meter_provider=meter_provider))
        self._open = OpenSpans()
        self._told: dict[tuple[str, ...], trace.Span] = {}
        self._callers: dict[str, context.Context] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in the engine's next event."""
        entry = Entry(0, dt.datetime.fromisoformat(event["timestamp"]), dict(event))
        self._instruments.record(entry.name, event)
        if entry.name == "job.started" and event["request_id"] in self._callers:
            return  # the request that it is has a span of its own
        if entry.name in STARTED:
            self._begin(entry)
        elif span := self._open.fold(entry):
            self._end(self._told.pop(span.identity), entry)
        elif entry.name == "step.completed":
            self._step(entry)
        elif entry.name == "request.queued":
            self._callers[event["request_id"]] = context.get_current()
            while len(self._callers) > _CALLERS_KEPT:
                del self._callers[next(iter(self._callers))]
        elif current := self._current(event.get("request_id")):
            current.add_event(entry.name, _attributes(event), _nanoseconds(entry.at))

    def _begin(self, entry: Entry) -> None:
        parent = self._parent(entry)
        self._open.fold(entry)
        span = self._open.begun(entry.event)
        if span is not None:
            self._told[span.identity] = self._tracer.start_span(
                span.prefix, parent, attributes=_attributes(entry.event),
                start_time=_nanoseconds(entry.at),
            )  # fmt: skip

    def _end(self, told: trace.Span, entry: Entry) -> None:
        told.set_attributes(_attributes(entry.event))
        if entry.name.endswith(".failed"):
            kind = str(entry.event.get("error", "")).partition(":")[0]
            told.set_attribute("error.type", kind)
            told.set_status(trace.StatusCode.ERROR)
        told.set_attribute("holdfast.ending", entry.name.rpartition(".")[2])
        told.end(_nanoseconds(entry.at))

    def _step(self, entry: Entry) -> None:
        began = entry.at - dt.timedelta(seconds=entry.event["seconds"])
        step = self._tracer.start_span(
            "step", self._parent(entry), attributes=_attributes(entry.event),
            start_time=_nanoseconds(began),
        )  # fmt: skip
        step.end(_nanoseconds(entry.at))

    def _current(self, request_id: str | None) -> trace.Span | None:
        """Return the innermost span, unless another job than its own is meant."""
        inner = self._open.innermost
        if inner is None or request_id not in (None, inner.started.event.get("request_id")):
            return None
        return self._told[inner.identity]

    def _parent(self, entry: Entry) -> context.Context | None:
        current = self._current(entry.event.get("request_id"))
        if current is not None:
            return trace.set_span_in_context(current)
        return self._callers.pop(str(entry.event.get("request_id")), None)


class _Instruments:
    def __init__(self, meter: metrics.Meter) -> None:
        self._transitions = meter.create_counter("holdfast.transitions")
        self._compiles = meter.create_counter("holdfast.compiles")
        self._hits = meter.create_counter("holdfast.cache.hits")
        self._ended = meter.create_counter("holdfast.ended")
        self._seconds = meter.create_histogram("holdfast.duration", unit="s")
        self._held = meter.create_up_down_counter("holdfast.components.held", unit="By")

    def record(self, name: str, event: Mapping[str, Any]) -> None:
        prefix, _, ending = name.rpartition(".")
        if name == "state.changed":
            self._transitions.add(1, {"trigger": event["trigger"], "dest": event["dest"]})
            return
        component = {"component": str(event.get("component"))}
        if name == "component.compile.completed":
            self._compiles.add(1, {**component, "cache": event["cache"]})
            self._held.add(event["bytes"], component)
        elif name == "component.evicted":
            self._held.add(-event["bytes"], component)
        if name == "component.reused" or event.get("cache") == "hit":
            self._hits.add(1, component)
        if "seconds" in event:
            self._seconds.record(event["seconds"], {"of": prefix, "ending": ending})
        if prefix == "request" and ending in ("completed", "failed", "cancelled"):
            self._ended.add(1, {"kind": str(event.get("kind")), "ending": ending})


def _attributes(event: Mapping[str, Any]) -> dict[str, str | bool | int | float | list[str]]:
    return {
        f"holdfast.{key}": _attribute(value)
        for key, value in event.items()
        if key not in _UNTOLD and value is not None
    }


def _attribute(value: object) -> str | bool | int | float | list[str]:
    if isinstance(value, (list, tuple)):
        return [str(each) for each in value]
    return value if isinstance(value, (str, bool, int, float)) else str(value)


def _nanoseconds(at: dt.datetime) -> int:
    return int(at.timestamp() * 1e6) * 1000
