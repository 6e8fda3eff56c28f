from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import CompileError, Img2Img, InvalidRequest, Lora, ModelSourceError, Txt2Img
from holdfast.states import State
from tests.support.engines import (
    CAPABILITIES,
    NEEDS_BF16,
    PRECISIONS,
    PROMPT,
    change_weights,
    opened,
    pipeline_of,
    pixels,
    record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from holdfast.engine import Engine

OPENED = ["text_encoder", "unet", "vae_decoder"]
ALL = [*OPENED, "vae_encoder"]
TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=7)
IMG2IMG = Img2Img(prompt=PROMPT, image=Image.new("RGB", (64, 64), "teal"), steps=2, seed=7)


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine in img2img, where all four components serve; each test sets it back."""
    with opened(settings, tmp_path_factory.mktemp("log")) as engine:
        engine.run(IMG2IMG)
        yield engine


@pytest.fixture(scope="module")
def other(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights in each component."""
    folder = tmp_path_factory.mktemp("other") / "other-ir"
    shutil.copytree(tiny_ir, folder)
    for graph in folder.glob("*/openvino_model.xml"):
        change_weights(graph)
    return folder


def precisions(engine: Engine) -> dict[str, str]:
    return {name: part.precision for name, part in pipeline_of(engine).store.service.items()}


# What is recompiled -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "compiled"),
    [
        pytest.param({"device": "AUTO:CPU"}, ALL, id="device AUTO"),
        pytest.param({"device": {"unet": "HETERO:CPU"}}, ["unet"], id="one device"),
        pytest.param(
            {"device": {"text_encoder": "MULTI:CPU", "vae_decoder": "HETERO:CPU"}},
            ["text_encoder", "vae_decoder"],
            id="two devices",
        ),
        pytest.param({"precision": "bf16"}, ALL, id="precision", marks=NEEDS_BF16),
        pytest.param({"properties": {"INFERENCE_NUM_THREADS": 1}}, ALL, id="an OpenVINO property"),
        pytest.param({"lora": "ink"}, ["unet"], id="a LoRA of the UNet"),
        pytest.param({"lora": "chalk"}, ["text_encoder", "unet"], id="a LoRA of both"),
        pytest.param({"shapes": "static"}, ALL[1:], id="shapes"),
        pytest.param({"model": "other"}, ALL, id="model"),
        pytest.param({"vae": "other"}, ["vae_decoder", "vae_encoder"], id="VAE"),
        pytest.param({"scheduler": "euler-a"}, [], id="scheduler"),
        pytest.param({"strict": False, "log_prompts": True}, [], id="nothing that is compiled"),
    ],
)
def test_a_change_compiles_what_it_touches_and_returns(
    engine: Engine,
    changes: dict[str, Any],
    compiled: list[str],
    request: pytest.FixtureRequest,
) -> None:
    """
    A change of settings compiles the components that it touches, and the state is as before.

    Put back, nothing is compiled but what a change of the model had given up.
    """
    if {"vae", "model"} & changes.keys():
        changes = {name: str(request.getfixturevalue(value)) for name, value in changes.items()}
    if "lora" in changes:
        changes = {"lora": (Lora(request.getfixturevalue(changes["lora"]), 0.8),)}
    before = {name: getattr(engine.config, name) for name in changes}
    image, log = pixels(engine.run(IMG2IMG)), record(engine)

    made = engine.configure(**changes)
    assert sorted(log.compiled) == sorted(made.compiles) == compiled
    assert engine.state is State.COMPILED_IMG2IMG
    went = ["compiled-img2img", "recompiling.img2img", "compiled-img2img"]
    assert log.states == (went if compiled else [])
    engine.run(IMG2IMG)

    log = record(engine)
    engine.configure(**before)
    assert log.compiled == (ALL if "model" in changes else [])
    assert sorted(log.reused) == ([] if "model" in changes else compiled)
    assert pixels(engine.run(IMG2IMG)) == image


def test_a_model_that_shares_parts_keeps_them(
    engine: Engine, tiny_ir: Path, other: Path, tmp_path: Path
) -> None:
    """What identifies a component is its content: of a model with the same VAE only the rest is."""
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_ir, mixed)
    shutil.rmtree(mixed / "unet")
    shutil.copytree(other / "unet", mixed / "unet")
    log = record(engine)
    engine.configure(model=str(mixed))
    assert log.compiled == ["unet"]
    assert "unet" in log.evicted
    held = [key.component for key in pipeline_of(engine).store.held]
    assert held.count("unet") == 1
    assert set(held) == set(ALL)
    engine.configure(model=str(tiny_ir))
    assert log.compiled == ["unet", "unet"]


def test_a_copied_model_is_the_same_model(engine: Engine, tiny_ir: Path, tmp_path: Path) -> None:
    """A model at another place, with the same content, compiles nothing."""
    shutil.copytree(tiny_ir, tmp_path / "copy")
    log = record(engine)
    engine.configure(model=str(tmp_path / "copy"))
    assert log.states == log.compiled == log.evicted == []
    engine.configure(model=str(tiny_ir))


def test_a_renamed_lora_is_the_same_lora(engine: Engine, ink: Path, tmp_path: Path) -> None:
    """A LoRA of the same content under another name compiles nothing."""
    shutil.copy(ink, tmp_path / "copy.safetensors")
    engine.configure(lora=(Lora(ink),))
    log = record(engine)
    engine.configure(lora=(Lora(tmp_path / "copy.safetensors"),))
    assert log.states == log.compiled == log.reused == []
    engine.configure(lora=())


@pytest.mark.parametrize("step", ["steps", "seed", "scheduler", "prompt", "guidance", "size"])
def test_a_request_in_dynamic_compiles_nothing(engine: Engine, step: str) -> None:
    """Steps, seed, scheduler, prompt, guidance and size of a request compile nothing in dynamic."""
    changes: dict[str, Any] = {
        "steps": 3, "seed": 8, "scheduler": "euler", "prompt": "a house", "guidance": 1.0,
    }  # fmt: skip
    log = record(engine)
    chosen = {"width": 96, "height": 80} if step == "size" else {step: changes[step]}
    engine.run(IMG2IMG.but(**chosen))
    assert log.states == log.compiled == []


def test_a_recompile_makes_everything_in_service_anew(engine: Engine, ink: Path) -> None:
    """A recompile that is asked for compiles all that serves, LoRAs included, and returns."""
    engine.configure(lora=(Lora(ink),))
    image, log = pixels(engine.run(IMG2IMG)), record(engine)
    engine.recompile()
    assert log.compiled == ALL
    assert [event["lora"] for event in log.events("component.fuse.completed")] == [["ink@1"]]
    assert log.states == ["compiled-img2img", "recompiling.img2img", "compiled-img2img"]
    assert pixels(engine.run(IMG2IMG)) == image
    engine.configure(lora=())


def test_a_plan_of_a_change_changes_nothing(engine: Engine, ink: Path, other: Path) -> None:
    """What `plan` foresees is what `configure` does, and planning alone leaves all as it was."""
    before, log = engine.snapshot(), record(engine)
    foreseen = engine.plan(lora=(Lora(ink, 0.3),))
    engine.plan(model=str(other))
    assert engine.snapshot() == before
    assert log.events("state.changed", "component.read.started", "plan.made") == []
    assert engine.configure(lora=(Lora(ink, 0.3),)).steps == foreseen.steps
    engine.configure(lora=())


# What is in force ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_and_device_in_force_are_read_back(
    open_engine: Callable[..., Engine], precision: str
) -> None:
    """The log tells what the compiled model says of itself, also beneath a virtual device."""
    devices = {"text_encoder": "MULTI:CPU", "unet": "AUTO:CPU", "vae_decoder": "HETERO:CPU"}
    engine = open_engine(device=devices, precision=precision)
    log = record(engine)
    engine.load()
    compiles = log.events("component.compile.completed")
    assert {event["component"]: event["device_asked"] for event in compiles} == devices
    assert {event["precision"] for event in compiles} == {precision}
    assert {event["device"] for event in compiles} == {"CPU"}


def test_auto_is_the_devices_own_precision(open_engine: Callable[..., Engine]) -> None:
    """With precision "auto" the key holds what the device chooses, and so does the component."""
    engine = open_engine(precision="auto")
    engine.load()
    core = pipeline_of(engine).store.compiler.core
    default = core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    assert set(precisions(engine).values()) == {default}
    log = record(engine)
    engine.configure(precision=default)
    assert log.compiled == []


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "GPU"}, "OpenVINO sees no GPU here; it sees CPU"),
        ({"device": "AUTO:GPU,CPU"}, "OpenVINO sees no GPU here"),
        ({"device": {"unet": "NPU"}}, "OpenVINO sees no NPU here"),
        ({"device": ""}, "OpenVINO sees no"),
        ({"device": {"unett": "CPU"}}, "asked for unett, but this model has no such component"),
        pytest.param(
            {"precision": "f16"},
            "'f16' was asked for, but CPU computes in",
            marks=pytest.mark.skipif("FP16" in CAPABILITIES, reason="this CPU computes in f16"),
        ),
    ],
)
def test_what_this_machine_cannot_do_is_refused_first(
    engine: Engine, changes: dict[str, Any], words: str
) -> None:
    """A device or precision that is not there is an `InvalidRequest` before anything is done."""
    before, log = engine.snapshot(), record(engine)
    with pytest.raises(InvalidRequest) as refused:
        engine.configure(**changes)
    assert words in str(refused.value)
    assert refused.value.state_after == "compiled-img2img"
    assert engine.snapshot() == before
    assert log.events("state.changed", "component.read.started") == []


@pytest.mark.parametrize("field", ["model", "vae", "lora"])
def test_a_source_that_is_not_there_is_refused_first(
    engine: Engine, field: str, tmp_path: Path
) -> None:
    """A model, VAE or LoRA that does not exist is refused before anything is done."""
    before, log = engine.snapshot(), record(engine)
    value: Any = str(tmp_path / ("nothing.safetensors" if field == "lora" else "nothing"))
    with pytest.raises(ModelSourceError, match="nothing"):
        engine.configure(**{field: (Lora(value),) if field == "lora" else value})
    assert engine.snapshot() == before
    assert log.events("state.changed") == []


@pytest.mark.parametrize(
    ("properties", "cause"),
    [
        ({"NOT_A_PROPERTY": 1}, "Unsupported property NOT_A_PROPERTY by CPU plugin"),
        ({"INFERENCE_NUM_THREADS": "many"}, "Expected only non negative integer numbers"),
    ],
)
def test_a_property_that_openvino_refuses_is_rolled_back(
    engine: Engine, properties: dict[str, Any], cause: str
) -> None:
    """The error names component, key and OpenVINO's own words, and what served before does."""
    before, log, image = engine.snapshot(), record(engine), pixels(engine.run(IMG2IMG))
    with pytest.raises(CompileError) as failed:
        engine.configure(properties=properties)
    error = failed.value
    (started,) = log.events("component.compile.started")
    assert (error.component, error.key) == ("text_encoder", started["key"])
    assert cause in str(error)
    assert "The components from before are still in service." in str(error)
    assert cause in str(error.__cause__)
    assert error.state_after == "compiled-img2img"
    assert engine.snapshot() == before
    assert pixels(engine.run(IMG2IMG)) == image


def test_a_vae_of_other_latents_is_refused(engine: Engine, tiny_ir: Path, tmp_path: Path) -> None:
    """A VAE whose latents are of another shape is refused before anything is done."""
    folder = tmp_path / "vae"
    shutil.copytree(tiny_ir, folder)
    config = folder / "vae_decoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 16}))
    before = engine.snapshot()
    with pytest.raises(ModelSourceError, match="has 16 latent channels"):
        engine.configure(vae=str(folder))
    assert engine.snapshot() == before


# Where nothing is loaded --------------------------------------------------------------------------


def test_a_change_of_an_unloaded_engine_compiles_nothing(
    open_engine: Callable[..., Engine], ink: Path
) -> None:
    """Where nothing is loaded a change is checked and kept; the next load has it."""
    engine = open_engine()
    log = record(engine)
    assert engine.configure(lora=(Lora(ink),)).steps == ()
    with pytest.raises(InvalidRequest):
        engine.configure(device="GPU")
    assert log.states == []
    engine.load()
    assert log.compiled == OPENED
    assert engine.snapshot().lora == ("ink@1",)


def test_unload_keeps_nothing(open_engine: Callable[..., Engine]) -> None:
    """After an unload no component and no graph is held: the next load reads and compiles all."""
    engine = open_engine()
    engine.load()
    engine.unload()
    store = pipeline_of(engine).store
    assert not store.held
    assert not store.compiler.graphs
    log = record(engine)
    engine.load()
    assert log.compiled == OPENED
    assert [event["component"] for event in log.events("component.read.completed")] == OPENED
