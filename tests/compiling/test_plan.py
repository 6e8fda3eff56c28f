from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.compiling.keys import ComponentKey
from holdfast.engine.compiling.plan import Cost, Plan, Stage, Standing, plan, plan_again
from holdfast.engine.lora import LoraUse
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from holdfast.engine.compiling.plan import Action
    from holdfast.engine.requests.config import Policy

TXT, IMG = Mode.TXT2IMG, Mode.IMG2IMG
BYTES = {"text_encoder": 5, "unet": 100, "vae_decoder": 20, "vae_encoder": 10}
"""What each component takes; one of everything that img2img needs is 135."""
INK = LoraUse("ink", "d1", 0.8, frozenset({"unet"}))
UNLOADED = Standing()


def key(component: str, variant: str = "") -> ComponentKey:
    """Return a key; ``ink`` stands for a LoRA, other variants for a shape."""
    if variant == "ink":
        return ComponentKey(component, f"s-{component}", lora=(INK,))
    return ComponentKey(component, f"s-{component}", shape=variant or "dynamic")


def keys(mode: Mode, **variants: str) -> dict[str, ComponentKey]:
    names = ("text_encoder", "unet", "vae_decoder", *(["vae_encoder"] if mode is IMG else []))
    return {name: key(name, variants.get(name, "")) for name in names}


def stage(mode: Mode, **variants: str) -> Stage:
    return Stage(mode, keys(mode, **variants))


def price(action: Action, of: ComponentKey) -> Cost:
    size = BYTES[of.component] if action == "compile" else 0
    return Cost(None if of.shape == "new" else 2.0, size)


def standing(
    mode: Mode,
    idle: Iterable[ComponentKey] = (),
    *,
    budget: int | None = None,
    policy: Policy = "auto",
    **variants: str,
) -> Standing:
    """Return an engine that serves `mode` and holds `idle` besides, least recently used first."""
    service = keys(mode, **variants)
    held = [*idle, *service.values()]
    return Standing(
        mode=mode,
        service=service,
        held={each: BYTES[each.component] for each in held},
        graphs=frozenset(each.graph for each in held),
        budget=budget,
        policy=policy,
    )


def words(made: Plan) -> list[str]:
    """Write each step as its action, its subject, and the variant that it is about."""
    variants = {
        key(name, variant).digest: f":{variant}" if variant else ""
        for name in BYTES
        for variant in ("", "a", "b", "c", "new", "ink")
    }
    return [f"{s.action} {s.subject}{variants.get(s.key, '')}" for s in made.steps]


# Which steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "stages", "steps"),
    [
        pytest.param(
            UNLOADED,
            [stage(TXT)],
            [
                "read text_encoder", "read unet", "read vae_decoder",
                "compile text_encoder", "compile unet", "compile vae_decoder", "load txt2img",
            ],
            id="nothing is loaded",
        ),
        pytest.param(standing(TXT), [stage(TXT)], [], id="all is in service"),
        pytest.param(
            standing(TXT), [stage(IMG)],
            ["read vae_encoder", "compile vae_encoder", "switch img2img"],
            id="another mode, for the first time",
        ),
        pytest.param(
            standing(TXT, [key("vae_encoder")]), [stage(IMG)],
            ["reuse vae_encoder", "switch img2img"],
            id="another mode, again",
        ),
        pytest.param(standing(IMG), [stage(TXT)], ["switch txt2img"], id="back"),
        pytest.param(
            standing(TXT), [stage(TXT, unet="ink")],
            ["recompile txt2img", "fuse unet:ink", "compile unet:ink"],
            id="a LoRA",
        ),
        pytest.param(
            standing(TXT, [key("unet")], unet="ink"), [stage(TXT)], ["reuse unet"],
            id="a LoRA away again: no change of state",
        ),
        pytest.param(
            standing(TXT), [stage(TXT, unet="a", vae_decoder="a")],
            ["recompile txt2img", "compile unet:a", "compile vae_decoder:a"],
            id="a size",
        ),
        pytest.param(
            standing(TXT, [key("vae_decoder", "a")]), [stage(TXT, unet="a", vae_decoder="a")],
            ["recompile txt2img", "compile unet:a", "reuse vae_decoder:a"],
            id="a size of which one part is held",
        ),
        pytest.param(
            standing(TXT, unet="a", vae_decoder="a"),
            [
                stage(TXT, unet="a", vae_decoder="a"),
                stage(IMG, unet="b", vae_decoder="b", vae_encoder="b"),
            ],
            [
                "read vae_encoder:b", "compile vae_encoder:b", "switch img2img",
                "recompile img2img", "compile unet:b", "compile vae_decoder:b",
            ],
            id="hires, static, first time",
        ),
        pytest.param(
            standing(
                IMG, [key("unet", "a"), key("vae_decoder", "a")],
                unet="b", vae_decoder="b", vae_encoder="b",
            ),
            [
                stage(TXT, unet="a", vae_decoder="a"),
                stage(IMG, unet="b", vae_decoder="b", vae_encoder="b"),
            ],
            [
                "switch txt2img", "reuse unet:a", "reuse vae_decoder:a",
                "reuse vae_encoder:b", "switch img2img", "reuse unet:b", "reuse vae_decoder:b",
            ],
            id="hires, static, second time",
        ),
        pytest.param(
            standing(IMG), [stage(TXT), stage(IMG, unet="ink")],
            [
                "switch txt2img", "reuse vae_encoder", "switch img2img",
                "recompile img2img", "fuse unet:ink", "compile unet:ink",
            ],
            id="hires with a LoRA of its own",
        ),
    ],
)  # fmt: skip
def test_a_plan_is_what_is_missing_and_nothing_else(
    now: Standing, stages: list[Stage], steps: list[str]
) -> None:
    """From where an engine stands and what is asked follow the steps, in their order."""
    made = plan(now, stages, price)
    assert words(made) == steps
    assert made.fits


def test_each_step_has_the_fields_that_call_for_it() -> None:
    """A step's reason is the difference of the keys; that of the move is all of them together."""
    made = plan(standing(TXT), [stage(TXT, unet="a", vae_decoder="ink")], price)
    assert [(step.action, step.subject, step.reason) for step in made.steps] == [
        ("recompile", "txt2img", "shape: dynamic -> a, lora: none -> ink@0.8"),
        ("compile", "unet", "shape: dynamic -> a"),
        ("fuse", "vae_decoder", "lora: none -> ink@0.8"),
        ("compile", "vae_decoder", "lora: none -> ink@0.8"),
    ]


def test_a_mode_is_the_reason_of_what_it_needs() -> None:
    """A component that no mode in service has needed is compiled because this one does."""
    made = plan(standing(TXT), [stage(IMG)], price)
    assert [step.reason for step in made.steps] == [
        "not read yet", "img2img needs it", "mode: txt2img -> img2img",
    ]  # fmt: skip


def test_a_model_with_a_part_more_or_less_is_a_recompile() -> None:
    """What the model before had not, the mode needs; what the new one lacks serves no more."""
    more = Stage(TXT, keys(TXT) | {"text_encoder_2": key("vae_encoder", "a")})
    made = plan(standing(TXT), [more], price)
    assert words(made) == ["recompile txt2img", "read vae_encoder:a", "compile vae_encoder:a"]
    assert made.steps[0].reason == "txt2img needs it"
    now = Standing(TXT, more.keys, dict.fromkeys(more.keys.values(), 1))
    assert words(plan(now, [stage(TXT)], price)) == []


def test_planning_changes_nothing() -> None:
    """A plan is made from a standing that is left as it was, and made again it is the same."""
    now = standing(TXT, [key("unet", "b")], budget=150)
    before = deepcopy(now)
    stages = [stage(TXT, unet="a"), stage(IMG, unet="c")]
    assert plan(now, stages, price) == plan(now, stages, price)
    assert now == before


# Under a budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "stages", "evicted"),
    [
        pytest.param(
            standing(TXT, [key("unet", "b"), key("unet", "c")], budget=425),
            [stage(TXT, unet="a")],
            [],
            id="all of it fits, to the byte",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b"), key("unet", "c")], budget=424),
            [stage(TXT, unet="a")],
            [("unet:b", "memory budget")],
            id="the least recently used goes first",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b")], budget=224),
            [stage(TXT, unet="a")],
            [("unet:b", "memory budget"), ("unet", "the memory budget cannot hold old and new")],
            id="what serves goes last, where old and new do not fit",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b"), key("unet", "c")], budget=425, policy="evict_first"),
            [stage(TXT, unet="a")],
            [("unet", "evict_first was asked for")],
            id="evict_first, and then there is room for the rest",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b")], budget=225, policy="stage_first"),
            [stage(TXT, unet="a")],
            [("unet:b", "memory budget")],
            id="stage_first never gives up what serves",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b"), key("unet", "c")], budget=324),
            [stage(TXT, unet="a"), stage(IMG, unet="b")],
            [("unet:c", "memory budget"), ("unet", "the memory budget cannot hold old and new")],
            id="what a later pass needs stays as long as anything else can go",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b")], budget=224),
            [stage(TXT)],
            [("unet:b", "memory budget")],
            id="a budget that was lowered",
        ),
        pytest.param(
            standing(TXT, [key("unet", "b"), key("vae_encoder")], budget=234),
            [stage(IMG)],
            [("unet:b", "memory budget")],
            id="what is about to serve is not evicted",
        ),
    ],
)
def test_room_is_made_in_a_fixed_order(
    now: Standing, stages: list[Stage], evicted: list[tuple[str, str]]
) -> None:
    """What is idle goes before what serves, what is wanted later after both, and no more goes."""
    made = plan(now, stages, price)
    gone = [
        (word.removeprefix("evict "), step.reason)
        for word, step in zip(words(made), made.steps, strict=True)
        if step.action == "evict"
    ]
    assert gone == evicted
    assert made.fits
    assert made.peak_bytes <= (now.budget or 0)


@pytest.mark.parametrize(
    ("now", "stages", "peak"),
    [
        pytest.param(replace(UNLOADED, budget=124), [stage(TXT)], 125, id="one set"),
        pytest.param(standing(TXT, budget=134), [stage(IMG)], 135, id="the encoder beside it"),
        pytest.param(
            standing(TXT, budget=224, policy="stage_first"), [stage(TXT, unet="a")], 225,
            id="old and new, and old is not to go",
        ),
        pytest.param(standing(TXT, budget=124), [stage(TXT)], 125, id="what serves already"),
    ],
)  # fmt: skip
def test_what_can_never_fit_is_foreseen(now: Standing, stages: list[Stage], peak: int) -> None:
    """Where even after every eviction the budget is too small, the plan says so, with figures."""
    made = plan(now, stages, price)
    assert not made.fits
    assert made.peak_bytes == peak
    assert str(made).endswith("budget 0 MiB: does not fit") or not made.steps


def test_evicting_comes_before_compiling_and_after_reading() -> None:
    """A graph that cannot be read is known before anything is given up for it."""
    now = replace(standing(TXT, budget=130), graphs=frozenset())
    made = plan(now, [stage(TXT, unet="a")], price)
    assert [step.action for step in made.steps] == ["recompile", "read", "evict", "compile"]
    assert [move.evicts_first for (move,) in made.stages] == [True]


def test_prepare_never_evicts_what_it_has_just_compiled() -> None:
    """With evict_first a pass's components stay where the plan comes back to them."""
    now = standing(TXT, policy="evict_first", unet="c")
    made = plan(now, [stage(TXT, unet="a"), stage(IMG, unet="b"), stage(TXT, unet="a")], price)
    assert [word for word in words(made) if word.startswith(("evict", "compile unet"))] == [
        "evict unet:c", "compile unet:a", "compile unet:b",
    ]  # fmt: skip


# Once more, though nothing has changed ------------------------------------------------------------


def test_again_compiles_all_that_serves() -> None:
    """A recompile that is asked for makes everything in service anew, LoRAs included."""
    made = plan_again(standing(TXT, unet="ink"), price)
    assert words(made) == [
        "recompile txt2img", "compile text_encoder", "fuse unet:ink", "compile unet:ink",
        "compile vae_decoder",
    ]  # fmt: skip
    assert {step.reason for step in made.steps} == {"asked for"}
    assert made.peak_bytes == 250


@pytest.mark.parametrize(
    ("budget", "policy", "evicted", "peak"),
    [
        (250, "auto", [], 250),
        (249, "auto", ["evict text_encoder"], 245),
        (125, "auto", ["evict text_encoder", "evict unet", "evict vae_decoder"], 125),
        (None, "evict_first", ["evict text_encoder", "evict unet", "evict vae_decoder"], 125),
    ],
)
def test_again_keeps_to_the_budget(
    budget: int | None, policy: Policy, evicted: list[str], peak: int
) -> None:
    """Where the budget cannot hold everything twice, as much of the old goes first as must."""
    made = plan_again(standing(TXT, budget=budget, policy=policy), price)
    assert [word for word in words(made) if word.startswith("evict")] == evicted
    assert made.peak_bytes == peak
    assert made.fits


def test_again_needs_something_in_service() -> None:
    """Nothing can be compiled again where nothing is loaded."""
    with pytest.raises(ValueError, match="nothing is in service"):
        plan_again(UNLOADED, price)


# What it costs, and how it reads ------------------------------------------------------------------


def test_seconds_are_unknown_where_one_step_is() -> None:
    """The sum over the steps is told where every step has been measured before, and else not."""
    assert plan(standing(TXT), [stage(TXT, unet="a")], price).expected_seconds == 2.0
    made = plan(standing(TXT), [stage(TXT, unet="a", vae_decoder="new")], price)
    assert made.expected_seconds is None
    assert plan(standing(TXT), [stage(TXT)], price).expected_seconds == 0


def test_bytes_are_what_more_is_held_afterwards() -> None:
    """What is compiled counts up and what is evicted down."""
    assert plan(standing(TXT), [stage(TXT, unet="a")], price).expected_bytes == 100
    made = plan(standing(TXT, budget=130), [stage(TXT, unet="a")], price)
    assert made.expected_bytes == 0


def test_a_plan_reads_as_a_table() -> None:
    """A plan's text has a row for each step: what, with which key, how long, how much, and why."""

    def big(action: Action, of: ComponentKey) -> Cost:
        return Cost(None if action == "fuse" else 1.25, price(action, of).bytes * 2**20)

    now = replace(standing(TXT, budget=300 * 2**20))
    made = plan(now, [stage(TXT, unet="ink")], big)
    ink = key("unet", "ink").digest
    assert str(made).splitlines() == [
        "recompile  txt2img                                      lora: none -> ink@0.8",
       f"fuse       unet     {ink}  unknown           lora: none -> ink@0.8",
       f"compile    unet     {ink}  1.2 s    100 MiB  lora: none -> ink@0.8",
        "in all unknown; peak 100 MiB, budget 300 MiB: fits",
    ]  # fmt: skip


def test_a_plan_without_steps_says_so() -> None:
    """Where everything needed is in service the plan's text is a sentence."""
    assert str(plan(standing(TXT), [stage(TXT)], price)) == (
        "nothing to do: everything needed is in service"
    )


# Any sequence -------------------------------------------------------------------------------------

VARIANTS = st.sampled_from(["", "a", "b", "ink"])
STAGES = st.builds(
    lambda mode, unet, size: stage(mode, unet=unet, vae_decoder=size),
    st.sampled_from(Mode),
    VARIANTS,
    st.sampled_from(["", "a", "b"]),
)


@given(
    st.lists(STAGES, min_size=1, max_size=3),
    STAGES,
    st.lists(st.builds(key, st.sampled_from(sorted(BYTES)), VARIANTS), max_size=4),
    st.none() | st.integers(125, 500),
    st.sampled_from(["auto", "stage_first", "evict_first"]),
)
def test_a_plan_that_is_followed_ends_where_it_was_asked_to(
    stages: list[Stage],
    now: Stage,
    idle: list[ComponentKey],
    budget: int | None,
    policy: Policy,
) -> None:
    """
    Followed step by step, any plan serves each stage and compiles nothing that is held.

    The peak is what is held at most, and where it fits the budget is never exceeded.
    """
    at = Standing(
        mode=now.mode,
        service=now.keys,
        held={each: BYTES[each.component] for each in (*idle, *now.keys.values())},
        budget=budget,
        policy=policy,
    )
    made = plan(at, stages, price)
    held, peak = dict(at.held), 0
    known: Mapping[str, ComponentKey] = {
        each.digest: each for one in (*stages, now) for each in one.keys.values()
    } | {each.digest: each for each in idle}
    for wanted, moves in zip(stages, made.stages, strict=True):
        service = at.service
        for move in moves:
            for step in move.steps:
                if step.action == "evict":
                    del held[known[step.key]]
                elif step.action == "reuse":
                    assert known[step.key] in held
                elif step.action == "compile":
                    assert known[step.key] not in held
                    held[known[step.key]] = BYTES[step.subject]
            service = move.service
            assert set(service.values()) <= held.keys()
            peak = max(peak, sum(held.values()))
        assert service == wanted.keys or not moves
    assert made.peak_bytes >= peak
    if made.fits and budget is not None:
        assert peak <= budget
