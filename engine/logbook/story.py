"""One line of plain words for each event: what ``holdfast log show`` prints."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from rich.text import Text

from holdfast.engine.logbook.write import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from holdfast.engine.logbook.read import Entry

_COMPILE = "{component} {key} for {device_asked}, shape {shape}"
_DENOISING = "pass {pass}: {mode} on {pipeline}, {width}x{height}, {steps} steps of {scheduler}"
_REQUEST = "{kind} {width}x{height}, {steps} steps, seeds {seeds}"
WORDS: Mapping[str, str] = {
    "engine.opened": "engine opened: {model} on {device_asked}; {versions}",
    "engine.closed": "engine closed in {state} after {uptime_seconds:s}",
    "engine.snapshot": "snapshot: {state}, LoRA {lora}, held {held}",
    "engine.crash_found": "an earlier process ({pid}) died in {died_in}, {elapsed_seconds:s} in",
    "model.resolved": "model {model} found: {pipeline}, {fingerprint}",
    "state.changed": "{source} -> {dest} ({trigger}; {reason}) after {seconds:s}, {rss_bytes:b}",
    "state.refused": "{trigger} refused in {state}: legal are {legal}",
    "plan.made": "plan: {steps}, about {expected_seconds:s}, {expected_bytes:b}",
    "plan.missed": "plan missed: planned {planned}, done {done}",
    "component.read.completed": "read {component}, {bytes:b} in {seconds:s}",
    "component.fuse.completed": "fused {lora} into {component} in {seconds:s}",
    "component.compile.started": f"compiling {_COMPILE}",
    "component.compile.completed": (
        "compiled {component} {key} on {device} as {precision}, cache {cache}, {bytes:b}, "
        "in {seconds:s}"
    ),
    "component.compile.failed": f"could not compile {_COMPILE}, after {{seconds:s}}: {{error}}",
    "component.compile.cancelled": f"stopped compiling {_COMPILE}, after {{seconds:s}}",
    "compile.heartbeat": (
        "still compiling {component}: {elapsed_seconds:s} of about {expected_seconds:s}, "
        "{rss_bytes:b}"
    ),
    "compile.slow": "{component} compiles for {elapsed_seconds:s}, expected {expected_seconds:s}",
    "component.reused": "{component} {key} serves again ({why})",
    "component.evicted": "gave up {component} {key}, {bytes:b} ({why})",
    "request.queued": "waits, {ahead} ahead of it: {kind}",
    "request.started": f"begins: {_REQUEST}",
    "request.completed": f"done in {{seconds:s}}: {_REQUEST}",
    "request.failed": f"failed after {{seconds:s}}: {{error}}; {_REQUEST}",
    "request.cancelled": f"cancelled after {{seconds:s}}: {_REQUEST}",
    "pass.started": f"{_DENOISING}, from {{input}} {{input_digest}}",
    "pass.completed": "pass {pass}: done in {seconds:s}, {evaluations} evaluations, "
    "made {output_digest}",
    "pass.failed": f"pass {{pass}}: failed after {{seconds:s}}: {{error}}; {_DENOISING}",
    "pass.cancelled": f"pass {{pass}}: cancelled after {{seconds:s}}; {_DENOISING}",
    "upscale.completed": (
        "enlarged {input_digest} to {width}x{height} with {upscaler}: {output_digest}, "
        "in {seconds:s}"
    ),
    "step.completed": "step {step} of {steps}, {seconds:s}",
    "memory.sampled": "memory {rss_bytes:b}, components {held_bytes:b}",
    "degradation": "{kind}: {asked} was asked for, {given} is given",
    "cancel.requested": "asked to stop ({why}), keep {keep}",
    "cancel.observed": "stops in {phase}, {seconds_to_stop:s} after it was asked to",
}
_COMMON = frozenset({"event", "engine_id", "seq", "timestamp", "level", "request_id", "pid"})
_STYLES = {"debug": "dim", "warning": "yellow", "error": "bold red", "critical": "bold red"}
_STYLES_OF = {
    "state.changed": "bold cyan",
    "request.started": "bold",
    "request.completed": "bold green",
}


class _Words(string.Formatter):
    """Fills in facts: ``:s`` writes seconds, ``:b`` bytes, and what is missing is a ``?``."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return super().get_value(key, args, kwargs) if key in kwargs else None

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "?"
        if isinstance(value, (int, float)) and format_spec:
            return seconds(value) if format_spec == "s" else size(value)
        if isinstance(value, dict):
            return ", ".join(f"{key} {each}" for key, each in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


_fill = _Words().vformat


def words(entry: Entry) -> str:
    """Tell an event in one line of printable text without its time."""
    template = WORDS.get(entry.name)
    if template is None:
        facts = (f"{k}={v}" for k, v in entry.event.items() if k not in _COMMON)
        return printable(f"{entry.name} {' '.join(facts)}")
    return printable(_fill(template, (), entry.event))


def tell(entry: Entry) -> Text:
    """Tell an event in one styled line, with its time and its request."""
    style = _STYLES.get(str(entry.event.get("level")), _STYLES_OF.get(entry.name, ""))
    stamp = f"{entry.at:%H:%M:%S}.{entry.at.microsecond // 1000:03}"
    request = printable(str(entry.event.get("request_id", "")))
    return Text.assemble(
        (f"{stamp} ", "dim"),
        (f"{printable(entry.engine_id)[:8]:8} ", "dim"),
        (f"{request[:12]:12} ", "magenta"),
        (words(entry), style),
        overflow="fold",
    )


def seconds(value: float) -> str:
    """Write a duration for a person: ``"12 ms"``, ``"4.2 s"``, ``"3 min 20 s"``."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    minutes, rest = divmod(value, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{value:.1f} s"


def size(value: float) -> str:
    """Write bytes for a person: ``"812 MiB"``, ``"1.7 GiB"``."""
    return f"{value / 2**30:.1f} GiB" if abs(value) >= 2**30 else f"{value / 2**20:.0f} MiB"
