"""A log told in plain words, a line for each event: what ``holdfast log show`` prints."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING, Any

from rich.text import Text

from holdfast.engine.logbook.writing import printable

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Mapping, Sequence

    from holdfast.engine.logbook.reading import Entry

_COMPILE = "{component} {key} for {device_asked}, shape {shape}"
_REQUEST = "{kind} {size}, seeds {seeds}"
WORDS: Mapping[str, str] = {
    "engine.opened": (
        "engine {engine_id} opened for {device_asked}: {model}; set to {settings}; on {machine}; "
        "{versions}"
    ),
    "settings.changed": "settings changed: {changes}",
    "engine.closed": "engine {engine_id} closed in {state} after {uptime_seconds:s}",
    "engine.snapshot": "snapshot: {state}, LoRA {lora}, held {held}",
    "engine.crash_found": "an earlier process ({pid}) died in {died_in}, {elapsed_seconds:s} in",
    "model.resolved": "model {model} found: {pipeline}, {fingerprint}, in {seconds:s}",
    "device.found": "device {device} is {name}, {driver}, OpenVINO's plugin {plugin}",
    "cache.failed": "the cache fails at {entry}, and the work goes on without: {error}",
    "cache.recovered": "the cache works again at {entry}",
    "state.changed": (
        "{source} -> {dest} ({trigger}; {reason}), after {seconds:s} in {source}, {rss_bytes:b}"
    ),
    "state.refused": "{trigger} refused in {state}: legal are {legal}",
    "plan.made": "plan: {imports}{steps}; about {expected_seconds:s}, {expected_bytes:b}{fits}",
    "plan.missed": "plan missed: planned {planned}, done {done}",
    "component.read.started": "reading {component}",
    "component.read.completed": "read {component}, {bytes:b}, in {seconds:s}",
    "component.read.failed": "could not read {component}, after {seconds:s}: {error}",
    "component.read.cancelled": "stopped reading {component}, after {seconds:s}",
    "component.fuse.started": "fusing {lora} into {component}",
    "component.fuse.completed": "fused {lora} into {component}, {layers} layers, in {seconds:s}",
    "component.fuse.failed": "could not fuse {lora} into {component}: {error}",
    "component.fuse.cancelled": "stopped fusing {lora} into {component}, after {seconds:s}",
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
    "lora.checked": "{lora} fits {component}, checked in {seconds:s}",
    "view.created": "pipeline of {mode}: {pipeline}, {compiles} compiles, in {seconds:s}",
    "view.dropped": "let go of the pipeline of {modes}, in {seconds:s}",
    "view.refused": "pass {pass} was about to run as {mode} on {pipeline}, not on {expected}",
    "job.started": "begins: {kind} {asked}",
    "job.completed": "{kind} done in {seconds:s}; the state is {state}",
    "job.failed": "{kind} failed after {seconds:s}; the state is {state}: {error}",
    "job.cancelled": "{kind} cancelled after {seconds:s}; the state is {state}",
    "job.refused": "refused, {kind} {asked}; the state is {state}: {error}",
    "http.answered": "{method} {path} from {client_address}: {status} in {seconds:s}{why}",
    "request.queued": "waits, {ahead} ahead of it: {kind}",
    "request.started": f"begins: {_REQUEST}, {{settings}}",
    "request.completed": f"done in {{seconds:s}}: {_REQUEST}; {{timings}}; compiled {{compiled}}",
    "request.failed": f"failed after {{seconds:s}} ({_REQUEST}): {{error}}",
    "request.cancelled": f"cancelled after {{seconds:s}} ({_REQUEST})",
    "prompt.encoded": "encoded the prompt {prompt_digest}, {tokens} tokens, in {seconds:s}",
    "pass.started": (
        "pass {pass}: {mode} on {pipeline}, {width}x{height}, {how}, from {input} {input_digest}"
    ),
    "pass.completed": "pass {pass}: done in {seconds:s}, {evaluations} evaluations{saved}, "
    "made {output_digest}",
    "pass.failed": "pass {pass}: failed after {seconds:s}: {error}",
    "pass.cancelled": "pass {pass}: cancelled after {seconds:s}",
    "step.completed": "step {step} of {steps}{how}, {seconds:s}",
    "encode.completed": "images to latents: {images}, in {seconds:s}, tiled: {tiled}",
    "decode.completed": "latents to images: {images}, in {seconds:s}, tiled: {tiled}",
    "upscale.completed": (
        "enlarged {input_digest} to {width}x{height} with {upscaler}: {output_digest}, "
        "in {seconds:s}"
    ),
    "region.cut": "pass {pass}: cut {region} out of {picture_digest}: {output_digest}",
    "region.pasted": (
        "pass {pass}: pasted {input_digest} into {region} of {picture_digest}: {output_digest}"
    ),
    "memory.sampled": "memory {rss_bytes:b}, components {held_bytes:b}",
    "imports.started": "importing {wanted} and what it needs",
    "imports.completed": "imported {wanted} and what it needs in {seconds:s}: {libraries}",
    "imports.failed": "could not import {wanted}, after {seconds:s}: {error}",
    "imports.cancelled": "stopped importing {wanted}, after {seconds:s}",
    "download.started": "downloading {source}",
    "download.completed": "downloaded {source} in {seconds:s}",
    "download.failed": "could not download {source}, after {seconds:s}: {error}",
    "download.cancelled": "stopped downloading {source}, after {seconds:s}",
    "export.started": "converting {source} to OpenVINO IR",
    "export.progress": "converting {source}: {phase}, {done} of {total}",
    "export.completed": "converted {source}, {bytes:b}, in {seconds:s}",
    "export.failed": "could not convert {source}, after {seconds:s}: {error}",
    "export.cancelled": "stopped converting {source}, after {seconds:s}",
    "cache.discarded": "threw {entry} out of the cache: {why}",
    "imports.torchvision_hidden": "torchvision cannot be imported and is left out: {error}",
    "degradation": "{kind}: {asked} was asked for, {given} is given",
    "cleanup.failed": "could not clean up after what was done: {error}",
    "steps.learned": "a step takes, in seconds: {step_seconds}; kept in {seconds:s}",
    "learning.failed": "could not keep what was learned: {error}",
    "worker.failed": "raised outside of any job, and survived: {error}",
    "release.failed": "could not give back {what}: {error}",
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
_OLD_AND_NEW = 2
_SHORTEST_ERROR = 16
"""Letters from which on a text that stands in two errors is told once."""
_ERRORS = frozenset({"error", "reason", "why"})
_JOB_ENDINGS = ("job.completed", "job.failed", "job.cancelled")
_AS_ABOVE = "(as above)"
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
        if isinstance(value, float):
            return f"{value:g}"
        if isinstance(value, dict):
            return (
                ", ".join(f"{key} {self.format_field(each, '')}" for key, each in value.items())
                or "none"
            )
        return (
            (", ".join(self.format_field(each, "") for each in value) or "none")
            if isinstance(value, list)
            else str(value)
        )


_fill = _Words().vformat


def words(entry: Entry) -> str:
    """Tell an event in one line of printable text, without its time; digests by their first 8."""
    template = WORDS.get(entry.name)
    if template is None:
        facts = (f"{k}={v}" for k, v in entry.event.items() if k not in _COMMON)
        return printed(f"{entry.name} {' '.join(facts)}")
    return printed(_DIGEST.sub(r"\1", _fill(template, (), _told(entry.event))).rstrip())


def printed(text: str) -> str:
    """Put a text on one line, and spell out what a terminal obeys or may not show at all."""
    text = " ".join(text.splitlines())
    text = printable(text)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)


def _told(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the facts that the words of an event need into the form in which they are told."""
    told = dict(event)
    told |= {key: _one_line(event[key]) for key in _ERRORS & event.keys()}
    if event.get("input") == "none":
        told |= {"input": "noise", "input_digest": ""}
    if "kind" in event and "seeds" in event:
        sides = (event.get("width"), event.get("height"))
        told["size"] = (
            "at the model's size" if sides == (None, None) else _fill("{0}x{1}", sides, {})
        )
    if telling := _TELLING.get(event["event"]):
        told |= telling(event)
    return told


def _one_line(value: object) -> object:
    """Return a text without the line breaks that an error may quote; other values as they are."""
    return " ".join(value.split()) if isinstance(value, str) else value


def _opened(event: Mapping[str, Any]) -> Mapping[str, Any]:
    settings, machine = event.get("settings"), event.get("machine")
    told: dict[str, Any] = {"settings": "nothing told", "machine": event.get("platform")}
    if isinstance(settings, dict):
        own = ("model", "device", "log_file", "flight_recorder")
        told["settings"] = {
            k: v for k, v in settings.items() if v not in (None, [], {}, "") and k not in own
        }
    if isinstance(machine, dict):
        words = (
            "{processor}, {cores} cores, {threads} threads, {free_bytes:b} of {memory_bytes:b} free"
        )
        told["machine"] = _fill(words, (), machine)
    return told


def _changed(event: Mapping[str, Any]) -> Mapping[str, Any]:
    changes = event.get("changes")
    if not isinstance(changes, dict):
        return {}
    old_new = {k: v for k, v in changes.items() if isinstance(v, list) and len(v) == _OLD_AND_NEW}
    return {"changes": [_fill("{0} {1} -> {2}", (k, *(_or_none(e) for e in v)), {})
                        for k, v in old_new.items()]}  # fmt: skip


def _or_none(value: object) -> object:
    return "none" if value is None else value


def _found(event: Mapping[str, Any]) -> Mapping[str, Any]:
    driver = event.get("driver")
    return {"driver": "no driver of its own" if driver is None else f"driver {driver}"}


def _planned(event: Mapping[str, Any]) -> Mapping[str, Any]:
    imports = "import libraries ({import_seconds:s}), " if "import_seconds" in event else ""
    return {
        "imports": _fill(imports, (), event),
        "fits": "; does not fit into the memory budget" if event.get("fits") is False else "",
    }


def _began(event: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = event.get("settings")
    if not isinstance(settings, dict):
        return {"settings": _fill("{steps} steps", (), event)}
    told = {k: v for k, v in settings.items() if k not in ("width", "height") and v not in ([], {})}
    return {"settings": told}


def _asked(event: Mapping[str, Any]) -> Mapping[str, Any]:
    asked = event.get("asked")
    return {"asked": asked or ""}


def _denoising(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say all that shapes the picture, as a person would: what is off is left out."""
    lora = event.get("lora")
    how = [
        "region {region}" if event.get("region") else "",
        "model {model}" if event.get("model") else "",
        "" if event.get("strength") is None else "strength {strength}",
        "guidance {guidance}",
        "the model's own scheduler" if event.get("scheduler") is None else "{scheduler}",
        "{steps} steps",
        "seeds {seeds}",
        "LoRA {lora}" if lora else "",
    ]
    return {"how": _fill(", ".join(filter(None, how)), (), event)}


def _evaluated(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"saved": _fill(", {cheap} of them cheap", (), event) if event.get("cheap") else ""}


def _answered(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"why": _fill(": {error}", (), event) if event.get("error") else ""}


def _stepped(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"how": " (cheap)" if event.get("evaluation") == "cheap" else ""}


def _imported(event: Mapping[str, Any]) -> Mapping[str, Any]:
    libraries = event.get("libraries")
    if not isinstance(libraries, dict):
        return {}
    return {"libraries": {k: _fill("{0:s}", (v,), {}) for k, v in libraries.items()}}


def _timed(event: Mapping[str, Any]) -> Mapping[str, Any]:
    timings = event.get("timings")
    if not isinstance(timings, dict):
        return {}
    lasted = {k: _fill("{0:s}", (v,), {}) for k, v in timings.items() if k != "total"}
    return {"timings": lasted}


_TELLING: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    "engine.opened": _opened,
    "settings.changed": _changed,
    "imports.completed": _imported,
    "device.found": _found,
    "plan.made": _planned,
    "request.started": _began,
    "request.completed": _timed,
    "job.started": _asked,
    "job.refused": _asked,
    "pass.started": _denoising,
    "pass.completed": _evaluated,
    "step.completed": _stepped,
    "http.answered": _answered,
}


class Story:
    """
    Tells the events of a log in their order.

    A request's events stand under it, those of a pass under the pass. The engine is named in a
    column of its own from where a second one appears. An error that goes up through several events
    is told in full by the first of them.
    """

    def __init__(self) -> None:
        self._engines: set[str] = set()
        self._day: dt.date | None = None
        self._requests: dict[tuple[str, str], bool] = {}  # whether each has begun
        self._errors: dict[tuple[str, str], list[str]] = {}

    def is_told(self, entry: Entry) -> bool:
        """Say whether an event adds anything: the job that a request is begins and ends with it."""
        job, name = _job_of(entry), entry.name
        if name in ("request.queued", "request.started"):
            self._requests[job] = name == "request.started"
        if name == "job.started":
            return job not in self._requests
        return name not in _JOB_ENDINGS or not self._requests.pop(job, False)

    def day(self, entry: Entry) -> str:
        """Return the day of an event where it is another one than before, otherwise nothing."""
        before, self._day = self._day, entry.at.date()
        return "" if before == self._day else f"{self._day}, times in UTC"

    def tell(self, entry: Entry) -> tuple[Text, Text]:
        """Return where the log's next event stands (when, whose), and what it tells: one line."""
        self._engines.add(entry.engine_id)
        engine = f"{printed(entry.engine_id)[:8]:8} " if len(self._engines) > 1 else ""
        style = _STYLES.get(str(entry.event.get("level")), _STYLES_OF.get(entry.name, ""))
        request = printed(str(entry.event.get("request_id") or ""))
        where = Text.assemble(
            (f"{entry.at:%H:%M:%S}.{entry.at.microsecond // 1000:03} ", "dim"),
            (engine, "dim"),
            (f"{request:10} ", "magenta"),
            _STEP * _depth(entry),
        )
        return where, Text(words(self._shortened(entry)), style, overflow="fold")

    def _shortened(self, entry: Entry) -> Entry:
        """Leave out of an event's error what an event before it has told of the same one."""
        told = self._errors.setdefault(_job_of(entry), [])
        shortened = dict(entry.event)
        for key in _ERRORS & shortened.keys():
            text = str(_one_line(shortened[key]))
            for before in sorted(told, key=len, reverse=True):
                if before in text:
                    shortened[key] = text.replace(before, _AS_ABOVE, 1)
                    break
            core = re.sub(r"^\w+: ", "", text).rstrip(".")
            if key == "error" and len(core) >= _SHORTEST_ERROR:
                told.append(core)
        if entry.name in _JOB_ENDINGS or not told:
            del self._errors[_job_of(entry)]
        return entry._replace(event=shortened)


def _job_of(entry: Entry) -> tuple[str, str]:
    return entry.engine_id, str(entry.event.get("request_id"))


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
