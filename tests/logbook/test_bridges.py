from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from holdfast.engine.logbook.bridges import OpenTelemetry
from holdfast.engine.logbook.events import Emitter
from tests.support.audited import events_of

if TYPE_CHECKING:
    from pathlib import Path


class Collector:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider(metric_readers=[self.reader])
        self.bridge = OpenTelemetry(self.tracers, self.meters)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def parent_of(self, span: ReadableSpan) -> str:
        if span.parent is None:
            return ""
        ids = {each.context.span_id: each.name for each in self.spans}
        return ids[span.parent.span_id]

    def metric(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return [point for m in found if m.name == name for point in m.data.data_points]


@pytest.fixture
def collector(hires_log: Path) -> Collector:
    """What the bridge makes of a real engine's events."""
    made = Collector()
    for event in events_of(hires_log):
        made.bridge({**event, "prompt": "a secret prompt"})
    return made


def test_spans_are_nested_as_the_work_is(collector: Collector) -> None:
    """A step belongs to its pass, a pass and a compile to their request."""
    nested = {(span.name, collector.parent_of(span)) for span in collector.spans}
    assert {
        ("request", ""), ("pass", "request"), ("step", "pass"), ("component.compile", "request"),
    } <= nested  # fmt: skip
    assert not any(name == "component.compile" and parent == "pass" for name, parent in nested)


def test_spans_last_as_long_as_the_log_says(collector: Collector, hires_log: Path) -> None:
    """A pass's span is as long as its event says, and has its facts."""
    spans = [span for span in collector.spans if span.name == "pass"]
    told = [e["seconds"] for e in events_of(hires_log) if e["event"] == "pass.completed"]
    lasted = [(span.end_time - span.start_time) / 1e9 for span in spans]
    assert lasted == pytest.approx(told, abs=0.05)
    assert {span.attributes["holdfast.mode"] for span in spans} == {"txt2img", "img2img"}


def test_metrics_count_what_the_log_tells(collector: Collector, hires_log: Path) -> None:
    """Transitions, compiles, requests and held bytes are counted as the log has them."""
    names = [event["event"] for event in events_of(hires_log)]
    for metric, event in {
        "holdfast.transitions": "state.changed",
        "holdfast.compiles": "component.compile.completed",
        "holdfast.ended": "request.completed",
    }.items():
        counted = sum(point.value for point in collector.metric(metric))
        assert counted == names.count(event)
    assert sum(point.value for point in collector.metric("holdfast.components.held")) == 0


def test_no_prompt_is_told(collector: Collector) -> None:
    """Neither spans nor metrics hold a prompt."""
    assert "secret prompt" not in "".join(span.to_json() for span in collector.spans)


def test_failure_is_told_by_its_type() -> None:
    """A failed span has the error's type and status, and not its text."""
    collector = Collector()
    emit = Emitter("e", (collector.bridge,))
    with pytest.raises(ValueError, match="secret"), emit.span("request", request_id="r"):
        raise ValueError("secret")
    (span,) = collector.spans
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    assert "secret" not in span.to_json()


def test_request_belongs_to_the_span_of_its_caller() -> None:
    """A request's span is a child of the span in which the host queued it."""
    collector = Collector()
    emit = Emitter("e", (collector.bridge,))
    with collector.tracers.get_tracer("host").start_as_current_span("http"):
        emit("request.queued", request_id="r", kind="txt2img", ahead=0)
    with emit.span("request", request_id="r"):
        emit("degradation", kind="device", asked="GPU", given="CPU")
    request = next(span for span in collector.spans if span.name == "request")
    assert collector.parent_of(request) == "http"
    assert [event.name for event in request.events] == ["degradation"]


def test_without_providers_nothing_is_told(hires_log: Path) -> None:
    """Where the host has set up no provider, the bridge takes every event and does nothing."""
    bridge = OpenTelemetry()
    for event in events_of(hires_log):
        bridge(event)
