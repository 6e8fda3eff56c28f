"""One small, documented change to a log for each rule, which the audit then has to find alone."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Events = list[dict[str, Any]]


class Doctoring(NamedTuple):
    rule: str
    change: str
    apply: Callable[[Events], None]
    log: str = "hires_log"


def one(events: Events, name: str, **facts: object) -> dict[str, Any]:
    """The first event of this name with these facts; ``number`` stands for the key ``pass``."""
    if "number" in facts:
        facts["pass"] = facts.pop("number")
    return next(
        event
        for event in events
        if event["event"] == name and all(event.get(key) == facts[key] for key in facts)
    )


def renumber(events: Events) -> None:
    for seq, event in enumerate(events, start=1):
        event["seq"] = seq


def of_many_requests(events: Events, request_id: str, count: int) -> Events:
    """A log in which one of its requests, and what was done for it, comes so many times more."""
    own = [event for event in events if event.get("request_id") == request_id]
    end = events.index(own[-1]) + 1
    times = [
        dt.datetime.fromisoformat(event["timestamp"]) for event in own if "job" in event["event"]
    ]
    lasted = max(times) - min(times)
    repeated = [
        {**event, "request_id": f"again-{number}", "timestamp": _later(event, lasted * number)}
        for number in range(1, count + 1)
        for event in own
    ]
    after = [{**event, "timestamp": _later(event, lasted * count)} for event in events[end:]]
    whole = [dict(event) for event in (*events[:end], *repeated, *after)]
    renumber(whole)
    return whole


def _later(event: dict[str, Any], by: dt.timedelta) -> str:
    return (dt.datetime.fromisoformat(event["timestamp"]) + by).isoformat()


def compile_of(events: Events, component: str) -> Events:
    """The first compile of a component, from its start to its end."""
    return [
        one(events, f"component.compile.{what}", component=component)
        for what in ("started", "completed")
    ]


def _lose_one(events: Events) -> None:
    events.remove(one(events, "prompt.encoded"))


def _tell_twice(events: Events) -> None:
    event = one(events, "prompt.encoded")
    events.insert(events.index(event), event)


def _switch_and_stay(events: Events) -> None:
    """A switch to img2img ends in txt2img: no row of the chart leads there."""
    one(events, "state.changed", trigger="switch-img2img")["dest"] = "compiled-txt2img"


def _start_elsewhere(events: Events) -> None:
    """The unload at the end is told of an engine that recompiles."""
    one(events, "state.changed", trigger="unload")["source"] = "recompiling.img2img"


def _forget_the_mode(events: Events) -> None:
    """SD.Next's LoRA reload: after the recompile for pass two, the pipeline is txt2img."""
    one(events, "state.changed", trigger="recompiled")["dest"] = "compiled-txt2img"


def _second_pass_as_txt2img(events: Events) -> None:
    """The original bug: pass two is served by the text-to-image pipeline."""
    for name in ("pass.started", "pass.completed"):
        one(events, name, number=2)["pipeline"] = "OVStableDiffusionPipeline"


def _enlarge_another_image(events: Events) -> None:
    one(events, "upscale.completed")["input_digest"] = "0" * 16


def _second_pass_on_another_image(events: Events) -> None:
    for name in ("pass.started", "pass.completed"):
        one(events, name, number=2)["input_digest"] = "0" * 16


def _return_the_compiled_size(events: Events) -> None:
    """A pipeline shaped for the first pass returns its own size when asked for the second's."""
    done = one(events, "pass.completed", number=2)
    first = one(events, "pass.completed", number=1)
    done["width"], done["height"] = first["width"], first["height"]
    request = one(events, "request.completed")
    request["width"], request["height"] = first["width"], first["height"]


def _steps_times_strength(events: Events) -> None:
    """Diffusers' img2img runs int(steps * strength) steps."""
    done = one(events, "pass.completed", number=2)
    done["evaluations"] = done["steps"] // 2
    begin, end = events.index(one(events, "pass.started", number=2)), events.index(done)
    steps = [event for event in events[begin:end] if event["event"] == "step.completed"]
    for event in steps[done["evaluations"] :]:
        events.remove(event)
    renumber(events)


def _compile_in_the_first_step(events: Events) -> None:
    """Optimum compiles lazily, inside the first step of the first pass."""
    compiling = compile_of(events, "vae_encoder")
    for event in compiling:
        events.remove(event)
    at = events.index(one(events, "pass.started", number=1)) + 1
    events[at:at] = compiling
    renumber(events)


def _compile_again(events: Events) -> None:
    """The VAE decoder, which is held, is compiled again before the second request."""
    compiling = [dict(event) for event in compile_of(events, "vae_decoder")]
    at = events.index(one(events, "request.completed")) + 1
    events[at:at] = compiling
    renumber(events)


def _ignore_the_lora(events: Events) -> None:
    """The second pass runs without the LoRA that was fused for it."""
    one(events, "pass.started", number=2, lora=["ink@0.8"])["lora"] = []


def _compile_unplanned(events: Events) -> None:
    plan = one(events, "plan.made")
    plan["steps"] = [step for step in plan["steps"] if not step.startswith("compile unet")]


def _skip_the_plan(events: Events) -> None:
    plan = one(events, "plan.made")
    plan["steps"].append("compile controlnet 0123456789abcdef")


def _never_end(events: Events) -> None:
    """The ending of the first request is lost, as where an exception slips past it."""
    events.remove(one(events, "request.completed"))
    renumber(events)


def _go_on_without_room(events: Events) -> None:
    """A plan that is over the memory budget is carried out all the same."""
    one(events, "plan.made")["fits"] = False


def _fall_back_to_cpu(events: Events) -> None:
    """The device asked for is not there and the CPU serves without a word."""
    for name in ("component.compile.started", "component.compile.completed"):
        one(events, name, component="unet")["device_asked"] = "GPU"


def _detail_as_txt2img(events: Events) -> None:
    """The detail's first pass is served by the text-to-image pipeline."""
    for name in ("pass.started", "pass.completed"):
        one(events, name, number=3)["pipeline"] = "OVStableDiffusionPipeline"


def _paste_what_another_pass_made(events: Events) -> None:
    one(events, "region.pasted", number=4)["input_digest"] = one(
        events, "pass.completed", number=3
    )["output_digest"]


def _paste_into_the_picture_before(events: Events) -> None:
    """The second region is pasted into the picture that has not the first, which is lost."""
    one(events, "region.pasted", number=4)["picture_digest"] = one(events, "region.cut", number=3)[
        "picture_digest"
    ]


def _give_the_picture_without_details(events: Events) -> None:
    one(events, "request.completed")["output_digest"] = one(events, "region.cut", number=3)[
        "picture_digest"
    ]


def _paste_elsewhere(events: Events) -> None:
    one(events, "region.pasted", number=5)["region"] = [0, 0, 16, 16]


def _never_paste(events: Events) -> None:
    """The last region is redrawn, and never put in its place."""
    pasted = one(events, "region.pasted", number=5)
    one(events, "request.completed")["output_digest"] = pasted["picture_digest"]
    events.remove(pasted)
    renumber(events)


DOCTORED = (
    Doctoring("gap", "one event is lost", _lose_one),
    Doctoring("order", "one event stands twice", _tell_twice),
    Doctoring("edge", "a switch to img2img ends in txt2img", _switch_and_stay),
    Doctoring("source", "a move starts in a state that was never reached", _start_elsewhere),
    Doctoring("recompile", "a recompile begun in img2img ends in txt2img", _forget_the_mode),
    Doctoring("pipeline", "pass two runs as txt2img", _second_pass_as_txt2img),
    Doctoring("digests", "what is enlarged is not what pass one made", _enlarge_another_image),
    Doctoring("digests", "pass two takes another image", _second_pass_on_another_image),
    Doctoring("pipeline", "a detail pass runs as txt2img", _detail_as_txt2img, "detail_log"),
    Doctoring("digests", "a region is pasted from another pass", _paste_what_another_pass_made,
              "detail_log"),
    Doctoring("digests", "a region is pasted into an older picture",
              _paste_into_the_picture_before, "detail_log"),
    Doctoring("digests", "the picture given lacks its details", _give_the_picture_without_details,
              "detail_log"),
    Doctoring("region", "a region is pasted elsewhere", _paste_elsewhere, "detail_log"),
    Doctoring("region", "a region is never pasted", _never_paste, "detail_log"),
    Doctoring("size", "pass two makes the size of pass one", _return_the_compiled_size),
    Doctoring("steps", "pass two runs steps times strength", _steps_times_strength),
    Doctoring("compile-in-pass", "a component is compiled in a pass", _compile_in_the_first_step),
    Doctoring("compile-twice", "a held component is compiled again", _compile_again),
    Doctoring("lora", "a pass runs without its LoRA", _ignore_the_lora),
    Doctoring("plan", "a component is compiled unplanned", _compile_unplanned),
    Doctoring("plan", "a planned compile is not done", _skip_the_plan),
    Doctoring("fits", "a plan that does not fit is carried out", _go_on_without_room),
    Doctoring("endings", "a request has no ending", _never_end),
    Doctoring("device", "the CPU serves where the GPU was asked for", _fall_back_to_cpu),
)  # fmt: skip
