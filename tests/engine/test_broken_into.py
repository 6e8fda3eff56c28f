"""
Every change of an engine is made whole or not at all, wherever its thread is broken into.

A hook numbers the calls of Holdfast's own functions in that thread and raises at some of them in
turn.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import (
    Detail,
    Engine,
    Hires,
    HoldfastError,
    Img2Img,
    Inpaint,
    Lora,
    Txt2Img,
)
from holdfast.engine.logbook.writing import line
from holdfast.states import Mode, State
from tests.support.audited import assert_sound
from tests.support.breaking import Proof, Scenario
from tests.support.engines import PROMPT, change_weights, compiler_of
from tests.support.workbench import raise_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from holdfast.engine.compiling.components import Component
    from holdfast.engine.compiling.keys import ComponentKey

REQUEST = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7)
IMG2IMG = Img2Img(prompt=PROMPT, image=Image.new("RGB", (64, 64)), steps=1, seed=7)
INPAINT = Inpaint(
    prompt=PROMPT,
    image=Image.new("RGB", (64, 64)),
    mask=Image.linear_gradient("L").resize((64, 64)),
    lora=(),
    steps=1,
    seed=7,
)
KINDS = (MemoryError, SystemExit, KeyboardInterrupt)
COMPILED = tuple(State.compiled(mode) for mode in Mode)


def served(engine: Engine) -> None:
    engine.run(REQUEST)


def unloaded(engine: Engine) -> None:
    engine.unload()


def both_modes(engine: Engine) -> None:
    engine.run(IMG2IMG)
    engine.run(REQUEST)


def large(engine: Engine) -> None:
    """Serve an image whose VAE goes in tiles where the budget is small."""
    engine.run(REQUEST.but(width=1024, height=512))


def failing(lora: Lora) -> Scenario:
    """A change that fails by itself at its first compile, so that its undoing is broken into."""

    def ask(engine: Engine) -> None:
        compiler, left = compiler_of(engine), [MemoryError("a broken core")]
        make = compiler.make

        def fail(key: ComponentKey) -> Component:
            if left:
                raise left.pop()
            return make(key)

        compiler.make = fail  # type: ignore[method-assign]
        try:
            engine.configure(lora=(lora,))
        finally:
            del compiler.make

    return Scenario("rolled back", ask, served, ends=(State.UNLOADED, State.COMPILED_TXT2IMG))


def change(name: str, before: Callable[[Engine], object] = served, **changes: Any) -> Scenario:
    return Scenario(name, lambda engine: engine.configure(**changes), before, changes)


def scenarios(ir: Path, ink: Path, chalk: Path, other: Path) -> list[Scenario]:
    """Return everything that moves an engine; `other` is where another model is made."""
    if not other.exists():
        shutil.copytree(ir, other)
        change_weights(other / "unet" / "openvino_model.xml")
    hires = Hires(prompt=PROMPT, width=64, height=64, steps=1, hires_steps=1, seed=7)
    return [
        Scenario("load", lambda engine: engine.load(), unloaded),
        Scenario("switch", lambda engine: engine.switch("img2img"), both_modes),
        Scenario("recompile", lambda engine: engine.recompile(), served),
        Scenario("unload", unloaded, served, ends=(State.UNLOADED, *COMPILED)),
        change("lora", lora=(Lora(ink, 0.5),)),
        change("scheduler", scheduler="euler"),
        change("budget", memory_budget=2**30),
        change("properties", properties={"INFERENCE_NUM_THREADS": 1}),
        change("model", model=str(other)),
        change("int8", precision="int8-weights"),
        failing(Lora(ink, 0.5)),
        change("unloaded", before=unloaded, lora=(Lora(ink, 0.5),)),
        Scenario(
            "hires",
            lambda engine: engine.run(hires.but(hires_lora=(Lora(chalk, 0.5),))),
            served,
            ends=COMPILED,
        ),
        Scenario(
            "hires with another model",
            lambda engine: engine.run(hires.but(hires_model=str(other), speed="fast")),
            served,
            ends=COMPILED,
        ),
        Scenario(
            "hires with details",
            lambda engine: engine.run(
                hires.but(detail=Detail(boxes=((0, 0, 48, 48), (16, 16, 64, 64)), strength=1.0))
            ),
            served,
            ends=COMPILED,
        ),
        Scenario("inpaint", lambda engine: engine.run(INPAINT), both_modes, ends=COMPILED),
        change("tiles", before=large, memory_budget=150_000_000),
    ]


DISTURBED = ("switch", "lora", "unloaded", "int8", "tiles")
"""The scenarios that exceptions are set into at any instruction."""


@pytest.fixture(scope="module", params=["stage_first", "evict_first"])
def proof(
    request: pytest.FixtureRequest,
    settings: dict[str, Any],
) -> Iterator[Proof]:
    """An engine of each policy, whose log is audited when it is closed."""
    records: list[Mapping[str, Any]] = []
    with Engine(**settings, policy=request.param) as engine:
        engine.attach(records.append)  # in which there is no call to break into
        yield Proof(engine, REQUEST)
    assert_sound([line(record) for record in records], whole=False)
    assert records[-1]["event"] == "engine.closed"


@pytest.fixture(scope="module")
def asked(
    tiny_ir: Path, ink: Path, chalk: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Scenario]:
    return scenarios(tiny_ir, ink, chalk, tmp_path_factory.mktemp("other") / "model")


def break_into(proof: Proof, scenario: Scenario, times: int) -> None:
    """Break into a scenario at so many of its calls, always the same ones."""
    chance = random.Random(f"{scenario} {proof.engine.config.policy}")  # noqa: S311 - no secret
    calls = proof.count(scenario)
    for _ in range(times):
        at = chance.randint(1, calls)
        while (made := proof.break_into(scenario, at, chance.choice(KINDS))) < at:
            calls = made  # as it is warm now
            at = chance.randint(1, calls)


@pytest.mark.parametrize(
    "times", [1, pytest.param(100, marks=[pytest.mark.sweep, pytest.mark.timeout(7200)])]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_broken_into_happens_whole_or_not_at_all(
    proof: Proof, asked: list[Scenario], times: int
) -> None:
    """
    Wherever a change is broken into, it failed and nothing has changed, or it is made.

    State, settings, held components and the next image, to the bit, are those of the one or of the
    other; the engine goes on, and its log breaks no rule.
    """
    for scenario in asked:
        break_into(proof, scenario, times)


@pytest.mark.unaudited("what is set into the thread inside a sink costs that sink the event")
@pytest.mark.parametrize(
    "times", [2, pytest.param(40, marks=[pytest.mark.sweep, pytest.mark.timeout(7200)])]
)
def test_exceptions_from_outside_leave_a_true_state(
    settings: dict[str, Any], asked: list[Scenario], times: int
) -> None:
    """
    An exception that is set into the thread comes at any instruction, not only at calls.

    Then a change may be made although its caller got the error; yet state, settings, components
    and image always agree, and the next job is done.
    """
    with Engine(**settings) as engine:
        proof = Proof(engine, REQUEST)
        for scenario in [each for each in asked if each.name in DISTURBED]:
            proof.begin(scenario)
            began = time.perf_counter()
            scenario.ask(engine)
            seconds = time.perf_counter() - began
            for _ in range(times):
                disturb(proof, scenario, random.uniform(0, seconds))  # noqa: S311 - no secret


def disturb(proof: Proof, scenario: Scenario, seconds: float) -> None:
    """Set an exception into the thread so long after a scenario was asked for."""
    proof.begin(scenario)
    timer = threading.Timer(seconds, raise_in, (proof.engine._worker._thread, SystemExit))
    timer.start()
    with contextlib.suppress(SystemExit, HoldfastError):
        scenario.ask(proof.engine)
    timer.join()
    settled(proof.engine)
    assert not proof.engine.state.is_recompiling
    proof.check(proof.engine.config)


def settled(engine: Engine) -> None:
    """Wait until an exception that came too late for its job has come to nothing."""
    for _ in range(3):
        try:
            engine._worker.call("wait", lambda _: None)
        except (SystemExit, HoldfastError):
            continue
