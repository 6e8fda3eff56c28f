"""A log told in plain words, a line for each event: what ``holdfast log show`` prints."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING, Any

from rich.text import Text

from holdfast.engine.logbook.write import printable

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping, Sequence

    from holdfast.engine.logbook.read import Entry

_COMPILE = "{component} {key} for {device_asked}, shape {shape}"
_DENOISING = "pass {pass}: {mode} on {pipeline}, {width}x{height}, {steps} steps of {scheduler}"
_REQUEST = "{kind} {size}, {steps} steps, seeds {seeds}"
WORDS: Mapping[str, str] = {
    "engine.opened": "engine {engine_id} opened for {device_asked}: {model}; {versions}",
    "engine.closed": "engine {engine_id} closed in {state} after {uptime_seconds:s}",
    "engine.snapshot": "snapshot: {state}, LoRA {lora}, held {held}",
    "engine.crash_found": "an earlier process ({pid}) died in {died_in}, {elapsed_seconds:s} in",
    "model.resolved": "model {model} found: {pipeline}, {fingerprint}",
    "state.changed": (
        "{source} -> {dest} ({trigger}; {reason}), after {seconds:s} in {source}, {rss_bytes:b}"
    ),
    "state.refused": "{trigger} refused in {state}: legal are {legal}",
    "plan.made": "plan: {steps}; about {expected_seconds:s}, {expected_bytes:b}",
    "plan.missed": "plan missed: planned {planned}, done {done}",
    "component.read.started": "reading {component}",
    "component.read.completed": "read {component}, {bytes:b}, in {seconds:s}",
    "component.read.failed": "could not read {component}, after {seconds:s}: {error}",
    "component.fuse.started": "fusing {lora} into {component}",
    "component.fuse.completed": "fused {lora} into {component}, {layers} layers, in {seconds:s}",
    "component.fuse.failed": "could not fuse {lora} into {component}: {error}",
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
    "recompile.policy": "recompiles {policy} ({why})",
    "recompile.failed": "recompile failed ({given_up} given up for it): {error}",
    "view.created": "pipeline of {mode}: {pipeline}, {compiles} compiles",
    "view.refused": "pass {pass} was about to run as {mode} on {pipeline}, not on {expected}",
    "request.queued": "waits, {ahead} ahead of it: {kind}",
    "request.started": f"begins: {_REQUEST}",
    "request.completed": f"done in {{seconds:s}}: {_REQUEST}; {{timings}}; compiled {{compiled}}",
    "request.failed": f"failed after {{seconds:s}} ({_REQUEST}): {{error}}",
    "request.cancelled": f"cancelled after {{seconds:s}} ({_REQUEST})",
    "prompt.encoded": "encoded the prompt {prompt_digest}, {tokens} tokens, in {seconds:s}",
    "pass.started": f"{_DENOISING}, from {{input}} {{input_digest}}",
    "pass.completed": "pass {pass}: done in {seconds:s}, {evaluations} evaluations, "
    "made {output_digest}",
    "pass.failed": "pass {pass}: failed after {seconds:s}: {error}",
    "pass.cancelled": "pass {pass}: cancelled after {seconds:s}",
    "step.completed": "step {step} of {steps}, {seconds:s}",
    "encode.completed": "images to latents: {images}, in {seconds:s}, tiled: {tiled}",
    "decode.completed": "latents to images: {images}, in {seconds:s}, tiled: {tiled}",
    "upscale.completed": (
        "enlarged {input_digest} to {width}x{height} with {upscaler}: {output_digest}, "
        "in {seconds:s}"
    ),
    "memory.sampled": "memory {rss_bytes:b}, components {held_bytes:b}",
    "imports.torchvision_hidden": "torchvision cannot be imported and is left out: {error}",
    "degradation": "{kind}: {asked} was asked for, {given} is given",
    "subscriber.failed": "subscriber {subscriber} failed: {error}",
    "cancel.requested": "asked to stop ({why}), keep {keep}",
    "cancel.observed": "stops in {phase}, {seconds_to_stop:s} after it was asked to",
}
_COMMON = frozenset({"event", "engine_id", "seq", "timestamp", "level", "request_id", "pid"})
_STYLES = {"debug": "dim", "warning": "yellow", "error": "bold red", "critical": "bold red"}
_STYLES_OF = {
    "state.changed": "bold cyan",
    "request.started": "bold",
    "request.completed": "bold green",
    "component.read.started": "dim",
    "component.fuse.started": "dim",
    "component.compile.started": "dim",
}
_DIGEST = re.compile(r"(?<![\w./-])([0-9a-f]{8})[0-9a-f]{8,24}(?![\w./-])")
_STEP = "  "
_ABSURD = 1e15


class _Words(string.Formatter):
    """Fills in facts: ``:s`` writes seconds, ``:b`` bytes, and what is missing is a ``?``."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(key) if isinstance(key, str) else args[key]

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "?"
        if format_spec and isinstance(value, (int, float)) and abs(value) < _ABSURD:
            return seconds(value) if format_spec == "s" else size(value)
        if isinstance(value, dict):
            return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
        return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


_fill = _Words().vformat


def words(entry: Entry) -> str:
    """Tell an event in one line of printable text, without its time; digests by their first 8."""
    template = WORDS.get(entry.name)
    if template is None:
        facts = (f"{k}={v}" for k, v in entry.event.items() if k not in _COMMON)
        return _shown(f"{entry.name} {' '.join(facts)}")
    return _shown(_DIGEST.sub(r"\1", _fill(template, (), _told(entry.event))).rstrip())


def _shown(text: str) -> str:
    """Spell out, beside what `printable` does, what a terminal may show as nothing at all."""
    text = printable(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def _told(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the facts that the words of an event need into the form in which they are told."""
    if event.get("input") == "none":
        return {**event, "input": "noise", "input_digest": ""}
    if "kind" in event and "seeds" in event:
        sides = (event.get("width"), event.get("height"))
        size = "at the model's size" if sides == (None, None) else _fill("{0}x{1}", sides, {})
        event = {**event, "size": size}
    timings = event.get("timings")
    if isinstance(timings, dict):
        lasted = {
            phase: _fill("{0:s}", (value,), {})
            for phase, value in timings.items()
            if phase != "total"
        }
        return {**event, "timings": lasted}
    return event


class Story:
    """
    Tells the events of a log in their order.

    A request's events stand under it, those of a pass under the pass. The engine is named in a
    column of its own from where a second one appears.
    """

    def __init__(self) -> None:
        self._engines: set[str] = set()
        self._day: dt.date | None = None

    def day(self, entry: Entry) -> str:
        """Return the day of an event where it is another one than before, otherwise nothing."""
        before, self._day = self._day, entry.at.date()
        return "" if before == self._day else f"{self._day}, times in UTC"

    def tell(self, entry: Entry) -> tuple[Text, Text]:
        """Return where the log's next event stands (when, whose), and what it tells: one line."""
        self._engines.add(entry.engine_id)
        engine = f"{_shown(entry.engine_id)[:8]:8} " if len(self._engines) > 1 else ""
        style = _STYLES.get(str(entry.event.get("level")), _STYLES_OF.get(entry.name, ""))
        request = _shown(str(entry.event.get("request_id") or ""))
        where = Text.assemble(
            (f"{entry.at:%H:%M:%S}.{entry.at.microsecond // 1000:03} ", "dim"),
            (engine, "dim"),
            (f"{request:10} ", "magenta"),
            _STEP * _depth(entry),
        )
        return where, Text(words(entry), style, overflow="fold")


def _depth(entry: Entry) -> int:
    """Return how far under other lines an event stands: a request's 1, a pass's 2."""
    if not entry.event.get("request_id") or entry.name.startswith("request."):
        return 0
    return 1 if "pass" not in entry.event or entry.name.startswith("pass.") else 2


def seconds(value: float) -> str:
    """Write a duration for a person: ``"12 ms"``, ``"4.2 s"``, ``"3 min 20 s"``."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    minutes, rest = divmod(value, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{value:.1f} s"


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size(value: float) -> str:
    """Write bytes for a person: ``"96 KiB"``, ``"812 MiB"``, ``"1.7 GiB"``."""
    unit, scale = next((each for each in _UNITS if abs(value) >= each[1]), _UNITS[-1])
    return f"{value / scale:.1f} {unit}" if unit == "GiB" else f"{value / scale:.0f} {unit}"
