from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import (
    Cancelled,
    CompileError,
    Hires,
    Img2Img,
    Inpaint,
    Lora,
    LoraError,
    Txt2Img,
)
from holdfast.states import Mode, State
from tests.support.engines import (
    PROMPT,
    compiler_of,
    live_components,
    opened,
    pipeline_of,
    pixels,
    record,
    write_lora,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import openvino as ov

    from holdfast.engine import Engine

REQUESTS = {
    Mode.TXT2IMG: Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7),
    Mode.IMG2IMG: Img2Img(prompt=PROMPT, image=Image.new("RGB", (64, 64)), steps=1, seed=7),
    Mode.INPAINT: Inpaint(
        prompt=PROMPT, image=Image.new("RGB", (64, 64)), mask=Image.new("L", (64, 64), "white"),
        steps=1, seed=7,
    ),
}  # fmt: skip
NO_MEMORY = "12 GiB were asked for, and 3 are there"


@pytest.fixture(scope="module")
def storm(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with weights so large that the UNet computes infinities."""
    path = tmp_path_factory.mktemp("storm") / "storm.safetensors"
    return write_lora(tiny_ir, path, strength=1e25)


# Faults -------------------------------------------------------------------------------------------


class Broken:
    """OpenVINO's core, of which one method fails at one of its calls, counted from 1."""

    def __init__(self, core: ov.Core, name: str, error: Exception, at: int) -> None:
        self._core, self._name, self._error, self._left = core, name, error, at

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._core, name)
        self._left -= 1
        if self._left == 0:
            raise self._error
        return getattr(self._core, name)


@contextmanager
def failing_core(engine: Engine, name: str, error: Exception, at: int = 1) -> Iterator[None]:
    compiler = compiler_of(engine)
    core, compiler.core = compiler.core, Broken(compiler.core, name, error, at)
    try:
        yield
    finally:
        compiler.core = core


@contextmanager
def failing_once(owner: Any, name: str, error: Exception, at: int = 1) -> Iterator[None]:
    """Let one call of a function raise, counted from 1."""
    function = getattr(owner, name)
    calls = itertools.count(1)

    def fail(*arguments: Any) -> Any:
        if next(calls) == at:
            raise error
        return function(*arguments)

    setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, function)


@contextmanager
def cancelling(engine: Engine, event: str, at: int = 1) -> Iterator[None]:
    """Ask the running job to stop when the engine logs an event the given time."""
    seen: list[str] = []

    def stop(record: Any) -> None:
        if record["event"] == event:
            seen.append(event)
            if len(seen) == at:
                engine._worker.running.cancel()

    engine._emit.add_sink(stop)
    try:
        yield
    finally:
        engine._emit.remove_sink(stop)
    assert len(seen) >= at


def forget_graphs(engine: Engine) -> None:
    """Have the next plan read everything again."""
    compiler_of(engine).forget()


@dataclass(frozen=True)
class Fault:
    """
    What goes wrong in a change of the LoRA set.

    Attributes:
        name: Where, and what.
        inject: Makes it so.
        component: Of the `CompileError` that comes of it; empty: the job is cancelled.
        cause: Words of its text.
        lora: The LoRA that is asked for.
        before: Called before it.
    """

    name: str
    inject: Callable[[Engine], AbstractContextManager[None]]
    component: str
    cause: str = ""
    lora: str = "chalk"
    before: Callable[[Engine], None] = lambda _: None

    def __str__(self) -> str:
        return self.name


@contextmanager
def nothing(_: Engine) -> Iterator[None]:
    yield


def luck() -> RuntimeError:
    return RuntimeError("Exception from somewhere:\nout of luck.\n\n")


def fuse_module() -> Any:
    from holdfast.engine.compiling import compiler

    return compiler


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "an error": (luck, "out of luck"),
    "no memory": (lambda: MemoryError(NO_MEMORY), NO_MEMORY),
}
"""What is raised, and what the text tells of it."""

Inject = Callable[["Engine", Exception], "AbstractContextManager[None]"]
POINTS: dict[str, tuple[str, Inject, tuple[str, int] | None]] = {
    "the second read": (
        "unet",
        lambda engine, error: failing_core(engine, "read_model", error, at=2),
        ("component.read.started", 2),
    ),
    "the first fuse": (
        "text_encoder",
        lambda _, error: failing_once(fuse_module(), "fuse", error),
        ("component.fuse.started", 1),
    ),
    "the second fuse": (
        "unet",
        lambda _, error: failing_once(fuse_module(), "fuse", error, at=2),
        ("component.fuse.started", 2),
    ),
    "the first compile": (
        "text_encoder",
        lambda engine, error: failing_core(engine, "compile_model", error),
        ("component.compile.started", 1),
    ),
    "the second compile": (
        "unet",
        lambda engine, error: failing_core(engine, "compile_model", error, at=2),
        ("component.compile.started", 2),
    ),
    "the first check": (
        "text_encoder",
        lambda engine, error: failing_once(compiler_of(engine), "_try", error),
        ("component.compile.completed", 1),
    ),
    "the second check": (
        "unet",
        lambda engine, error: failing_once(compiler_of(engine), "_try", error, at=2),
        None,
    ),
    "the eviction": (
        "text_encoder, unet",
        lambda engine, error: failing_once(pipeline_of(engine).store, "evict", error),
        None,
    ),
    "the swap": (
        "text_encoder, unet",
        lambda engine, error: failing_once(pipeline_of(engine).store, "serve", error),
        None,
    ),
}
"""Each point: the component that fails there, what makes it fail, and the event to cancel at."""


def faults() -> Iterator[Fault]:
    """Yield the table: every point, with every kind of failure that can be there."""
    for point, (component, inject, event) in POINTS.items():
        before = forget_graphs if point == "the second read" else lambda _: None
        for kind, (error, cause) in ERRORS.items():
            yield Fault(
                f"{point}: {kind}",
                lambda engine, inject=inject, error=error: inject(engine, error()),
                component,
                cause,
                before=before,
            )
        if event is not None:
            yield Fault(
                f"{point}: a cancel",
                lambda engine, event=event: cancelling(engine, *event),
                "",
                before=before,
            )
    yield Fault("values that are not finite", nothing, "unet", "not finite", lora="storm")


# The table ----------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((mode, policy), id=f"{mode} {policy}", marks=marks)
        for mode, policy, *marks in (
            (Mode.TXT2IMG, "stage_first"),
            (Mode.IMG2IMG, "evict_first"),
            (Mode.TXT2IMG, "evict_first", pytest.mark.sweep),
            (Mode.IMG2IMG, "stage_first", pytest.mark.sweep),
            (Mode.INPAINT, "stage_first", pytest.mark.sweep),
        )
    ],
)
def engine(
    request: pytest.FixtureRequest,
    settings: dict[str, Any],
    ink: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    """An engine with a LoRA, a scheduler and a policy of its own, in each mode."""
    mode, policy = request.param
    more = {"policy": policy, "lora": (Lora(ink, 0.5),), "scheduler": "euler"}
    with opened(settings | more, tmp_path_factory.mktemp("log")) as engine:
        engine.run(REQUESTS[mode])
        yield engine


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(faults()), ids=str)
def test_a_failure_at_any_point_leaves_everything_as_it_was(
    engine: Engine, fault: Fault, request: pytest.FixtureRequest
) -> None:
    """
    Wherever a change fails, state, mode, scheduler, LoRA set and the next image are as before.

    The caller gets an error that names component, key and cause and says what is in service, the
    log tells that it was rolled back, and no compiled component is left over.
    """
    mode = engine.mode
    assert mode is not None
    image, before = pixels(engine.run(REQUESTS[mode])), engine.snapshot()
    components, log = live_components(), record(engine)
    lora = Lora(request.getfixturevalue(fault.lora), 0.25)
    fault.before(engine)

    with fault.inject(engine), pytest.raises((CompileError, Cancelled)) as failed:
        engine.configure(lora=(lora,))

    error = failed.value
    assert engine.snapshot() == before
    assert error.state_after == before.state
    assert log.states == [before.state, State.recompiling(mode), before.state]
    assert log.events("state.changed")[-1]["trigger"] == "recompile-rolled-back"
    if isinstance(error, CompileError):
        assert error.component == fault.component
        assert fault.cause in str(error)
        assert re.search("(still|compiled again, and are) in service", str(error))
        assert ("compiled again" in str(error)) == bool(log.evicted)
        (made,) = log.events("plan.made")
        for component, key in zip(error.component.split(", "), error.key.split(", "), strict=True):
            assert f"compile {component} {key}" in made["steps"]
    else:
        assert fault.component == ""
    assert pixels(engine.run(REQUESTS[mode])) == image
    del error, failed
    assert live_components() == components


def test_the_change_works_once_the_cause_is_gone(engine: Engine, chalk: Path) -> None:
    """What failed a moment ago succeeds when nothing stands in its way, and can be undone."""
    mode, before = engine.mode, engine.config.lora
    assert mode is not None
    image = pixels(engine.run(REQUESTS[mode]))
    wanted = (Lora(chalk, 0.75),)
    with failing_core(engine, "compile_model", luck()), pytest.raises(CompileError):
        engine.configure(lora=wanted)
    engine.configure(lora=wanted)
    assert engine.snapshot().lora == ("chalk@0.75",)
    assert pixels(engine.run(REQUESTS[mode])) != image
    engine.configure(lora=before)
    assert pixels(engine.run(REQUESTS[mode])) == image


def test_a_lora_that_does_not_fit_is_refused_before_anything_goes(
    engine: Engine, tiny_ir: Path, tmp_path: Path
) -> None:
    """A LoRA for weights that the model has not is refused; nothing was evicted or compiled."""
    from safetensors.numpy import load_file, save_file

    good = load_file(write_lora(tiny_ir, tmp_path / "good.safetensors"))
    bad = {key.replace("mid_block", "mid_clock"): value for key, value in good.items()}
    save_file(bad, tmp_path / "bad.safetensors")
    before, log = engine.snapshot(), record(engine)
    with pytest.raises(LoraError):
        engine.configure(lora=(Lora(tmp_path / "bad.safetensors"),))
    assert engine.snapshot() == before
    assert log.evicted == log.compiled == []


# Where nothing could be kept ----------------------------------------------------------------------


def test_where_nothing_can_be_compiled_again_the_engine_is_unloaded_and_says_so(
    open_engine: Callable[..., Engine], chalk: Path
) -> None:
    """With evict_first and no way back nothing is held; once the cause is gone a load works."""
    engine = open_engine(precision="f32", policy="evict_first", scheduler="euler")
    before = live_components()
    request = REQUESTS[Mode.TXT2IMG]
    image, config = pixels(engine.run(request)), engine.config
    compiler, log = compiler_of(engine), record(engine)
    core = compiler.core

    class Dead:
        def __getattr__(self, name: str) -> Any:
            if name == "compile_model":
                raise MemoryError(NO_MEMORY)
            return getattr(core, name)

    compiler.core = Dead()
    with pytest.raises(CompileError) as failed:
        engine.configure(lora=(Lora(chalk),))
    compiler.core = core

    assert (engine.state, engine.mode) == (State.UNLOADED, None)
    assert failed.value.state_after == "unloaded"
    assert failed.value.component == "text_encoder"
    assert str(failed.value).count(NO_MEMORY) == 2
    assert "the engine is unloaded. Load it again" in str(failed.value)
    assert isinstance(failed.value.__cause__, CompileError)
    assert log.states == ["compiled-txt2img", "recompiling.txt2img", "unloaded"]
    assert engine.snapshot().held == ()
    assert engine.config == config
    assert live_components() == before

    engine.load()
    assert engine.state is State.COMPILED_TXT2IMG
    assert pixels(engine.run(request)) == image


# Moves without a recompile ------------------------------------------------------------------------


def test_a_load_that_fails_leaves_nothing(open_engine: Callable[..., Engine]) -> None:
    """A failed load holds nothing and says so, and the next one works."""
    engine = open_engine(precision="f32")
    components, log = live_components(), record(engine)
    with (
        failing_core(engine, "compile_model", luck(), at=2),
        pytest.raises(CompileError, match=r"out of luck\. Nothing is in service") as failed,
    ):
        engine.load()
    assert failed.value.component == "unet"
    assert failed.value.state_after == "unloaded"
    del failed
    assert engine.snapshot().held == ()
    assert live_components() == components
    assert log.states == []
    engine.load()
    assert engine.state is State.COMPILED_TXT2IMG


def test_a_switch_that_fails_leaves_the_mode_in_service(open_engine: Callable[..., Engine]) -> None:
    """Where the VAE encoder cannot be compiled txt2img still serves; later the switch works."""
    engine = open_engine(precision="f32")
    request = REQUESTS[Mode.TXT2IMG]
    image, before = pixels(engine.run(request)), engine.snapshot()
    with (
        failing_core(engine, "compile_model", luck()),
        pytest.raises(CompileError, match="components from before are still in service") as failed,
    ):
        engine.run(REQUESTS[Mode.IMG2IMG])
    assert failed.value.component == "vae_encoder"
    assert engine.snapshot() == before
    assert pixels(engine.run(request)) == image
    engine.switch("img2img")
    assert engine.state is State.COMPILED_IMG2IMG


def test_a_second_pass_that_cannot_be_compiled_leaves_the_first_in_service(
    open_engine: Callable[..., Engine], ink: Path
) -> None:
    """
    Where the second pass's recompile fails, img2img serves what pass one had.

    A change of settings then compiles what it touches for the size in service, and nothing else.
    """
    engine = open_engine(precision="f32", shapes="static")
    request = Hires(prompt=PROMPT, width=64, height=64, steps=1, seed=7)
    log = record(engine)
    with failing_core(engine, "compile_model", luck(), at=6), pytest.raises(CompileError) as failed:
        engine.run(request)
    assert failed.value.component == "vae_decoder"
    assert log.states[-3:] == ["compiled-img2img", "recompiling.img2img", "compiled-img2img"]
    log = record(engine)
    engine.configure(lora=(Lora(ink),))
    assert log.compiled == ["unet"]
    engine.configure(lora=())
    assert engine.run(request).images[0].size == (128, 128)


# Hosts that raise ---------------------------------------------------------------------------------


class Rude(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(f"I will not write {record.msg}")


def test_a_log_handler_that_raises_stops_nothing(
    open_engine: Callable[..., Engine], chalk: Path
) -> None:
    """A host's broken log handler fails neither a change nor its rolling back, and is told of."""
    engine = open_engine(precision="f32", policy="evict_first")
    image = pixels(engine.run(REQUESTS[Mode.TXT2IMG]))
    logger, rude, log = logging.getLogger("holdfast"), Rude(), record(engine)
    level = logger.level
    logger.addHandler(rude)
    logger.setLevel(logging.DEBUG)
    try:
        engine.configure(lora=(Lora(chalk),))
        with failing_core(engine, "compile_model", luck(), at=2), pytest.raises(CompileError):
            engine.configure(lora=())
        engine.configure(lora=())
    finally:
        logger.removeHandler(rude)
        logger.setLevel(level)
    assert engine.state is State.COMPILED_TXT2IMG
    assert "I will not write" in log.events("subscriber.failed")[0]["error"]
    assert pixels(engine.run(REQUESTS[Mode.TXT2IMG])) == image


def test_a_sink_or_subscriber_that_raises_stops_nothing(
    open_engine: Callable[..., Engine], chalk: Path
) -> None:
    """Neither a broken sink nor a broken subscriber fails a change; the log tells of both."""
    engine = open_engine(precision="f32")
    engine.load()
    log = record(engine)

    def raising(_: object) -> None:
        raise RuntimeError("I will not listen")

    engine._emit.add_sink(raising)
    engine.subscribe(raising)
    engine.configure(lora=(Lora(chalk),))
    assert log.compiled == ["text_encoder", "unet"]
    assert engine.state is State.COMPILED_TXT2IMG
    engine.close()
    assert len(log.events("subscriber.failed")) >= 2
