"""What an engine plans while its model, or its denoiser in 8 bits, has still to be made."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Engine, Hires, Lora, Txt2Img
from holdfast.engine.errors import LoraError, ModelSourceError
from holdfast.states import State
from tests.support.engines import PROMPT, opened, pixels, record, write_lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from holdfast.engine.compiling.plan import Plan

TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7)
HIRES = Hires(prompt=PROMPT, width=64, height=64, steps=1, seed=7)


def words(made: Plan) -> list[str]:
    return [f"{step.action} {step.subject}" for step in made.steps]


# Models that are not here -------------------------------------------------------------------------


def test_a_plan_of_a_model_that_is_not_exported_exports_nothing(
    open_engine: Callable[..., Engine], tiny_sd: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """
    The export is the plan's first step, with the seconds that one took before, if any did.

    What follows is told as far as it is known: which components, but neither keys nor bytes.
    """
    engine = open_engine(model=tiny_sd, cache_dir=tmp_path / "cache")
    log = record(engine)
    made = engine.plan(HIRES)
    assert words(made) == [
        f"export {tiny_sd}",
        "read text_encoder", "read unet", "read vae_decoder",
        "compile text_encoder", "compile unet", "compile vae_decoder", "load txt2img",
        "read vae_encoder", "compile vae_encoder", "switch img2img",
    ]  # fmt: skip
    assert made.expected_seconds is None
    assert {step.key for step in made.steps} == {""}
    assert "peak unknown" in str(made)
    assert {event["event"] for event in log.events()} <= {"job.started", "job.completed"}
    assert not (tmp_path / "cache" / "exports").exists()
    assert engine.state is State.UNLOADED

    shutil.copy(tiny_cache / "costs.json", tmp_path / "cache")
    assert engine.plan(HIRES).steps[0].cost.seconds > 0


def test_a_plan_of_a_model_on_the_hub_downloads_nothing(
    open_engine: Callable[..., Engine],
) -> None:
    """Of a model that was never downloaded nothing is known but that it must be."""
    engine = open_engine(model="nobody/nothing-of-this-name")
    log = record(engine)
    made = engine.plan(TXT2IMG)
    assert words(made) == ["download nobody/nothing-of-this-name", "load txt2img"]
    assert {event["event"] for event in log.events()} <= {"job.started", "job.completed"}


def test_a_plan_of_a_vae_that_is_not_exported_is_of_the_vae_alone(
    open_engine: Callable[..., Engine], tiny_sd: Path, tmp_path: Path
) -> None:
    """Of a swap to a VAE in diffusers' format the export and the VAE's parts are foreseen."""
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    (other / "vae" / "config.json").write_text(
        (other / "vae" / "config.json").read_text().replace("0.18215", "0.2")
    )
    engine = open_engine(precision="f32")
    engine.load("img2img")
    before = engine.snapshot()
    made = engine.plan(vae=str(other))
    assert words(made) == [
        f"export {other}", "recompile img2img", "read vae_decoder", "read vae_encoder",
        "compile vae_decoder", "compile vae_encoder",
    ]  # fmt: skip
    assert engine.snapshot() == before


def test_a_model_that_is_not_there_cannot_be_planned_for(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    """A plan for a model that does not exist is refused, as its load would be."""
    engine = open_engine(model=str(tmp_path / "nowhere"))
    with pytest.raises(ModelSourceError, match="there is no such folder or file"):
        engine.plan(TXT2IMG)


# 8 bits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with a denoiser of 8-bit weights, and a cache of its own."""
    own = {"precision": "int8-weights", "cache_dir": tmp_path_factory.mktemp("cache")}
    with opened(settings | own, tmp_path_factory.mktemp("log")) as engine:
        yield engine


@pytest.mark.slow
def test_a_quantization_is_a_step_of_the_plan_and_is_done_once(engine: Engine) -> None:
    """Planning does not quantize; the load does, as planned, and no later one has to again."""
    log = record(engine)
    made = engine.plan(TXT2IMG)
    assert words(made)[:4] == [
        "read text_encoder", "quantize unet", "read unet", "read vae_decoder",
    ]  # fmt: skip
    assert made.expected_seconds is None
    assert log.events("export.started", "plan.missed") == []
    engine.load()
    assert len(log.events("export.completed")) == 1
    assert engine.plan(TXT2IMG).steps == ()
    engine.unload()
    assert "quantize unet" not in words(engine.plan(TXT2IMG))


@pytest.mark.slow
def test_a_lora_is_fused_before_the_denoiser_is_quantized(engine: Engine, ink: Path) -> None:
    """A LoRA on an 8-bit denoiser changes the image, and toggling it is free from then on."""
    plain = pixels(engine.run(TXT2IMG))
    log = record(engine)
    made = engine.configure(lora=(Lora(ink),))
    assert words(made) == [
        "recompile txt2img", "quantize unet", "read unet", "compile unet",
    ]  # fmt: skip
    assert log.states == ["compiled-txt2img", "recompiling.txt2img", "compiled-txt2img"]
    styled = pixels(engine.run(TXT2IMG))
    assert styled != plain
    engine.configure(lora=())
    assert pixels(engine.run(TXT2IMG)) == plain
    engine.configure(lora=(Lora(ink),))
    assert pixels(engine.run(TXT2IMG)) == styled
    assert log.compiled == ["unet"]


@pytest.mark.slow
def test_a_quantization_that_cannot_be_done_leaves_what_serves(
    engine: Engine, tiny_ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a LoRA that does not fit nor a quantizer that dies costs the engine anything."""
    from safetensors.numpy import load_file, save_file

    engine.configure(lora=())
    before, log = engine.snapshot(), record(engine)
    bad = write_lora(tiny_ir, tmp_path / "bad.safetensors", seed=9)
    layers = load_file(bad)
    save_file({key.replace("mid_b", "mid_c"): each for key, each in layers.items()}, bad)
    with pytest.raises(LoraError, match="does not fit"):
        engine.configure(lora=(Lora(bad),))
    assert log.events("export.started") == []

    good = write_lora(tiny_ir, tmp_path / "good.safetensors", seed=9)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ModelSourceError, match="quantizing the denoiser"):
        engine.configure(lora=(Lora(good),))
    assert engine.snapshot() == before
    assert log.states == [State.COMPILED_TXT2IMG, "recompiling.txt2img"] * 2 + [
        State.COMPILED_TXT2IMG
    ]
    assert log.compiled == []
