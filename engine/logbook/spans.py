"""What was begun and has not ended: each ``started`` event paired with its ending."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.engine.logbook.events import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from holdfast.engine.logbook.reading import Entry

STARTED = tuple(name for name in EVENTS if name.endswith(".started"))
_SHAPES = ("started", "completed", "failed", "cancelled")
SPAN_EVENTS: Mapping[str, str] = {
    f"{prefix}.{shape}": prefix
    for prefix in (name.removesuffix(".started") for name in STARTED)
    for shape in _SHAPES
}
_IDENTITY = ("request_id", "pass", "component", "key", "source")


class Span(NamedTuple):
    """
    Something that takes time: a request, a pass, a compile.

    Attributes:
        prefix: What the names of its events have in common, such as ``"component.compile"``.
        identity: What tells it from others of its kind.
        started: The event that began it, as an entry.
    """

    prefix: str
    identity: tuple[str, ...]
    started: Entry

    def __str__(self) -> str:
        facts = self.started.event
        match self.prefix:
            case "pass":
                return f"pass {facts.get('pass')} of request {facts.get('request_id')}"
            case "request" | "job":
                return f"{self.prefix} {facts.get('request_id')}"
            case "export" | "imports" | "download":
                return self.prefix
        return f"{self.prefix} of {facts.get('component')}"


class OpenSpans:
    """The spans of one engine that have begun and not ended, in the order in which they began."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, ...], Span] = {}

    def fold(self, entry: Entry) -> Span | None:
        """
        Take in the engine's next event.

        Returns:
            The span that this event ends, if it ends one that was seen to begin.
        """
        event = entry.event
        prefix = SPAN_EVENTS.get(event["event"])
        if prefix is None:
            return None
        identity = _identity(prefix, event)
        if event["event"] in STARTED:
            self._open[identity] = Span(prefix, identity, entry)
            return None
        return self._open.pop(identity, None)

    def begun(self, event: Mapping[str, Any]) -> Span | None:
        """Return the open span that `event`, an ending or a second start, belongs to."""
        return self._open.get(_identity(SPAN_EVENTS[event["event"]], event))

    def __iter__(self) -> Iterator[Span]:
        return iter(tuple(self._open.values()))

    @property
    def innermost(self) -> Span | None:
        """The open span that began last."""
        return next(reversed(self._open.values()), None)


def _identity(prefix: str, event: Mapping[str, Any]) -> tuple[str, ...]:
    return (prefix, *(str(event.get(key)) for key in _IDENTITY))
