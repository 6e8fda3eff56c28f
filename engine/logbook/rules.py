"""The rules that a log is held against, one function each; `RULES` is the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.engine.logbook.holdings import lora_set
from holdfast.engine.logbook.replay import step_of
from holdfast.engine.logbook.spans import STARTED
from holdfast.states import CHART, IllegalTransition, Mode, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from holdfast.engine.logbook.reading import Entry
    from holdfast.engine.logbook.replay import Course

_FIRST = 1
_ENDINGS_OF_RECOMPILE = (
    Trigger.RECOMPILED,
    Trigger.RECOMPILE_ROLLED_BACK,
    Trigger.RECOMPILE_ABANDONED,
)
# These run the denoiser more often than once a step: PNDM evaluates one timestep twice, Heun's
# method looks ahead in every step but the last (diffusers, `set_timesteps` of each).
EVALUATIONS: Mapping[str, Callable[[int], int]] = {
    "PNDMScheduler": lambda steps: steps + 1,
    "pndm": lambda steps: steps + 1,
    "HeunDiscreteScheduler": lambda steps: 2 * steps - 1,
    "heun": lambda steps: 2 * steps - 1,
}


class Rule(NamedTuple):
    """
    One rule.

    Attributes:
        id: Stable name.
        words: What holds, for a person.
        events: Names of the events that can break it; empty: any that does not follow the one
            before it by number.
        check: Given the engine's course before the event, and the event: what is wrong, or None.
    """

    id: str
    words: str
    events: tuple[str, ...]
    check: Callable[[Course, Entry], str | None]


def _gap(before: Course, entry: Entry) -> str | None:
    if not before.events or entry.seq <= before.seq + 1:
        return None
    first, last = before.seq + 1, entry.seq - 1
    return f"seq {first} is missing" if first == last else f"seq {first} to {last} are missing"


def _order(before: Course, entry: Entry) -> str | None:
    if entry.seq > before.seq:
        return None
    return f"seq {entry.seq} stands here after seq {before.seq}"


def _edge(_: Course, entry: Entry) -> str | None:
    trigger, source, dest = (str(entry.event.get(key)) for key in ("trigger", "source", "dest"))
    try:
        legal = CHART.dest(trigger, source)
    except IllegalTransition:
        return f"the chart has no {trigger!r} in state {source!r}"
    if dest != legal and trigger not in _ENDINGS_OF_RECOMPILE:
        return f"{trigger!r} leads from {source!r} to {legal.value!r}, not to {dest!r}"
    return None


def _source(before: Course, entry: Entry) -> str | None:
    source = entry.event.get("source")
    if before.state is None or source == before.state:
        return None
    return f"the log had reached {before.state!r}, but the move starts in {source!r}"


def _recompile(_: Course, entry: Entry) -> str | None:
    trigger, source, dest = (str(entry.event.get(key)) for key in ("trigger", "source", "dest"))
    if trigger not in _ENDINGS_OF_RECOMPILE or source not in set(State):
        return None
    began = State(source).mode
    if dest != State.UNLOADED and dest not in set(State):
        return f"the recompile that began in {began} ended in {dest!r}"
    if dest != State.UNLOADED and State(dest).mode is not began:
        return f"the recompile that began in {began} ended in {State(dest).mode}"
    if (dest == State.UNLOADED) != (trigger == Trigger.RECOMPILE_ABANDONED):
        return f"{trigger!r} ended in {dest!r}"
    return None


def _pipeline(before: Course, entry: Entry) -> str | None:
    event = entry.event
    mode, made_for = str(event.get("mode")), _mode_of_class(str(event.get("pipeline")))
    if event.get("pass") != _FIRST and Mode.TXT2IMG in (mode, made_for):
        return f"pass {event.get('pass')} ran as {mode} on {event.get('pipeline')}"
    if event.get("region") is not None and mode != Mode.INPAINT:
        return f"pass {event.get('pass')} redraws a region, but ran as {mode}"
    if made_for != mode:
        return f"pass {event.get('pass')} was to run as {mode} but ran on {event.get('pipeline')}"
    if before.state in set(State) and before.state != f"compiled-{mode}":
        return f"pass {event.get('pass')} runs as {mode} in state {before.state!r}"
    return None


def _mode_of_class(pipeline: str) -> str:
    return next((mode for mode in Mode if mode in pipeline.lower()), Mode.TXT2IMG)


def _digests(before: Course, entry: Entry) -> str | None:
    run, event = before.run_of(entry.event), entry.event
    if run is None:
        return None
    taken, what = event.get("input_digest"), f"pass {event.get('pass')} took"
    whole, made = event.get("picture_digest"), run.made
    if entry.name == "upscale.completed":
        what = "enlarged was"
    elif entry.name == "region.pasted":
        what = "pasted was"
    elif entry.name == "region.cut":
        taken, what, made = whole, "cut was", run.picture
    elif entry.name == "request.completed":
        taken, what, made = event.get("output_digest"), "given was", run.picture
    if made is not None and taken != made:
        return f"{what} {taken}, but made before was {made}"
    if entry.name == "region.pasted" and whole != run.picture:
        return f"pasted into was {whole}, but the pictures are {run.picture}"
    return None


def _region(before: Course, entry: Entry) -> str | None:
    run, event = before.run_of(entry.event), entry.event
    if run is None:
        return None
    if entry.name == "region.cut":
        return None if run.cut is None else f"cut before {_place(run.cut)} was pasted"
    here = _place(event) if event.get("region") is not None else None
    cut = None if run.cut is None else _place(run.cut)
    if here != cut:
        return f"{entry.name} is of {here or 'whole pictures'}, but cut was {cut or 'nothing'}"
    return None


def _place(event: Mapping[str, Any]) -> str:
    return f"{event.get('region')} with mask {event.get('mask_digest')} for pass {event['pass']}"


def _size(before: Course, entry: Entry) -> str | None:
    event, run = entry.event, before.run_of(entry.event)
    if run is None or event.get("region") is not None:
        return None
    if entry.name == "pass.started":
        asked = run.upscale or (run.started if event.get("pass") == _FIRST else None)
    elif entry.name == "pass.completed":
        asked = run.passes.get(event.get("pass", 0))
    else:
        whole = [each for each in run.passes.values() if each.get("region") is None]
        asked = whole[-1] if whole else None
    # A side that was left open may have any length.
    if not asked or all(asked.get(side) in (None, event.get(side)) for side in ("width", "height")):
        return None
    return f"{_area(asked)} was asked for, {_area(event)} was made"


def _area(event: Mapping[str, Any]) -> str:
    return f"{event.get('width')}x{event.get('height')}"


def _steps(before: Course, entry: Entry) -> str | None:
    event, run = entry.event, before.run_of(entry.event)
    asked, made = event.get("steps"), event.get("evaluations")
    if not isinstance(asked, int) or made is None:
        return None
    scheduler = event.get("scheduler")
    counts: tuple[Callable[[int], int], ...] = (EVALUATIONS.get(str(scheduler), int),)
    if scheduler is None:  # the model's own, which may be any
        counts = (int, *EVALUATIONS.values())
    expected = {count(asked) for count in counts}
    if not isinstance(made, int) or made not in expected:
        return f"{asked} steps are {min(expected)} evaluations, but {made} were made"
    told = set(run.steps.values()) if run and before.debug else {made}
    return None if told == {made} else f"{made} evaluations were made, the log tells of {told}"


def _compile_in_pass(before: Course, entry: Entry) -> str | None:
    for span in before.spans:
        if span.prefix == "pass":
            return f"{entry.event.get('component')} was compiled inside {span}"
    return None


def _compile_twice(before: Course, entry: Entry) -> str | None:
    component, key = entry.event.get("component"), str(entry.event.get("key"))
    if key in before.holdings.held and not before.again:
        return f"{component} {key} was compiled although it was held"
    return None


def _lora(before: Course, entry: Entry) -> str | None:
    fused, told = before.holdings.loras, lora_set(entry.event.get("lora") or ())
    if fused is None or fused == told:
        return None
    return f"the pass is to have {_words(told)}, in service is {_words(fused)}"


def _words(loras: frozenset[str]) -> str:
    return "+".join(sorted(loras)) or "none"


def _plan(before: Course, entry: Entry) -> str | None:
    if entry.name == "plan.missed":
        return f"planned {entry.event.get('planned')}, done {entry.event.get('done')}"
    if before.planned is None:
        return None
    if entry.name == "request.completed":
        left = ", ".join(step for step in before.planned.elements() if _is_checked(step))
        return f"planned, but not done: {left}" if left else None
    step = step_of(entry.event)
    if step is None or before.planned[step]:
        return None
    return f"done, but not planned: {step}"


def _fits(before: Course, _: Entry) -> str | None:
    if before.unfit is None:
        return None
    return f"the plan of {before.unfit} does not fit into the memory budget, but it went on"


def _is_checked(step: str) -> bool:
    return step.startswith(("compile ", "load ", "switch ", "recompile "))


def _endings(before: Course, entry: Entry) -> str | None:
    if entry.name == "engine.closed":
        left = ", ".join(str(span) for span in before.spans)
        return f"never ended: {left}" if left else None
    span = before.spans.begun(entry.event)
    return f"{span} began again before it ended" if span else None


def _device(before: Course, entry: Entry) -> str | None:
    asked, given = str(entry.event.get("device_asked")), entry.event.get("device")
    devices = str(given).split(",")
    if "device" in before.degraded or asked.startswith(("AUTO", "MULTI", "HETERO", "BATCH")):
        return None
    if all(each.split(".")[0] == asked.split(".", maxsplit=1)[0] for each in devices):
        return None
    return f"{asked} was asked for, {entry.event.get('component')} is on {', '.join(devices)}"


GAP = Rule("gap", "No event is missing.", (), _gap)
ORDER = Rule("order", "No event stands twice or out of its order.", (), _order)
RULES = (
    GAP,
    ORDER,
    Rule("edge", "Every move is one of the chart.", ("state.changed",), _edge),
    Rule("source", "Every move starts in the state that the log had reached.",
         ("state.changed",), _source),
    Rule("recompile", "Every recompile ends once, in the mode it began in.",
         ("state.changed",), _recompile),
    Rule("pipeline", "Every pass runs on the pipeline of its mode, with that mode in service; "
         "none after the first is txt2img.", ("pass.started",), _pipeline),
    Rule("digests", "Whatever is enlarged, cut, redrawn, pasted and given is what was made before.",
         ("upscale.completed", "pass.started", "region.cut", "region.pasted", "request.completed"),
         _digests),
    Rule("region", "A pass redraws the region that was cut for it, and that is pasted before the "
         "next one is cut.", ("region.cut", "pass.started", "region.pasted", "request.completed"),
         _region),
    Rule("size", "Images have the size that was asked for.",
         ("pass.started", "pass.completed", "request.completed"), _size),
    Rule("steps", "Exactly the steps that were asked for are run.", ("pass.completed",), _steps),
    Rule("compile-in-pass", "Nothing is compiled inside a pass.",
         ("component.compile.started",), _compile_in_pass),
    Rule("compile-twice", "A component that is held is not compiled again, unless that was asked "
         "for.", ("component.compile.started",), _compile_twice),
    Rule("lora", "The LoRA set of a pass is the one that is fused into the components in service.",
         ("pass.started",), _lora),
    Rule("plan", "Exactly what was planned is done.",
         ("plan.missed", "component.compile.completed", "state.changed", "request.completed"),
         _plan),
    Rule("fits", "A job that does not fit into the memory budget fails before any work.",
         ("component.compile.started", "pass.started", "job.completed"), _fits),
    Rule("endings", "Everything that is begun ends once.", ("engine.closed", *STARTED), _endings),
    Rule("device", "Every component is on the device that was asked for, unless the log has a "
         "`degradation` of it.", ("component.compile.completed",), _device),
)  # fmt: skip
