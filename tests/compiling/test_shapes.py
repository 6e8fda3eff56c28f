from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import Hires, Img2Img, Txt2Img
from holdfast.states import State
from tests.support.engines import PROMPT, opened, pipeline_of, pixels, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from holdfast.engine import Engine
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.results.result import Result
    from tests.support.engines import Record

TXT2IMG = Txt2Img(prompt=PROMPT, width=64, height=64, steps=2, seed=7)
HIRES = Hires(prompt=PROMPT, width=64, height=64, steps=2, seed=7, strength=0.5)
PICTURE = Image.linear_gradient("L").convert("RGB")
IMG2IMG = Img2Img(prompt=PROMPT, image=PICTURE, width=64, height=64, steps=2, seed=7)


@pytest.fixture(scope="module")
def engines(
    settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    """One engine for each kind of shapes, that puts three images at once through the denoiser."""
    folder, more = tmp_path_factory.mktemp("log"), {"images_per_inference": 3}
    with (
        opened(settings | more | {"shapes": "dynamic"}, folder) as dynamic,
        opened(settings | more | {"shapes": "static"}, folder) as static,
    ):
        yield {"dynamic": dynamic, "static": static}


def values(result: Result) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in result.images])


def compiles(log: Record) -> list[dict[str, Any]]:
    return log.events("component.compile.completed")


# The same images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(TXT2IMG, id="txt2img"),
        pytest.param(TXT2IMG.but(width=96, height=80), id="another size"),
        pytest.param(TXT2IMG.but(guidance=1.0), id="guidance off"),
        pytest.param(TXT2IMG.but(batch=2), id="a batch of two"),
        pytest.param(TXT2IMG.but(batch=3, guidance=1.0), id="a batch of three, guidance off"),
        pytest.param(TXT2IMG.but(batch=4), id="a batch that does not divide"),
        pytest.param(IMG2IMG, id="img2img"),
        pytest.param(IMG2IMG.but(batch=2, guidance=0.0), id="a batch of img2img, guidance off"),
        pytest.param(HIRES, id="hires"),
        pytest.param(HIRES.but(batch=2, hires_guidance=1.0), id="hires, pass two unguided"),
        pytest.param(HIRES.but(upscaler="latent", strength=0.7), id="hires through latents"),
    ],
)
def test_static_and_dynamic_make_the_same_images(
    engines: dict[str, Engine], request_: Request
) -> None:
    """Whatever the size, the guidance and the batch, in f32 both agree to a level or two."""
    dynamic, static = (values(engine.run(request_)) for engine in engines.values())
    assert dynamic.shape == static.shape
    assert np.abs(dynamic - static).max() <= 2
    assert len({image.tobytes() for image in static}) == len(static)


def test_a_batch_is_its_images_one_by_one(engines: dict[str, Engine]) -> None:
    """An image of a static batch is the one that its seed gives alone, to a level or two."""
    together = values(engines["static"].run(TXT2IMG.but(batch=3)))
    alone = [values(engines["static"].run(TXT2IMG.but(seed=7 + i)))[0] for i in range(3)]
    assert np.abs(together - np.stack(alone)).max() <= 2


# What is compiled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_a_second_hires_run_compiles_nothing(
    open_engine: Callable[..., Engine], shapes: str
) -> None:
    """The first hires run compiles what it needs; a second one of the same sizes nothing at all."""
    engine = open_engine(precision="f32", shapes=shapes)
    first = record(engine)
    image = pixels(engine.run(HIRES))
    twice = ["unet", "vae_decoder"] if shapes == "static" else []
    assert first.compiled == ["text_encoder", "unet", "vae_decoder", "vae_encoder", *twice]
    second = record(engine)
    assert engine.plan(HIRES).compiles == ()
    assert pixels(engine.run(HIRES)) == image
    assert second.compiled == []
    assert second.states == ["compiled-img2img", "compiled-txt2img", "compiled-img2img"]
    assert second.events("request.completed")[0]["compiled"] == []


@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_what_was_prepared_compiles_nothing(
    open_engine: Callable[..., Engine], shapes: str
) -> None:
    """`prepare` compiles both passes ahead and stops in txt2img; the run then compiles nothing."""
    engine = open_engine(precision="f32", shapes=shapes)
    made = engine.prepare(HIRES)
    assert engine.state is State.COMPILED_TXT2IMG
    assert set(made.compiles) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    log = record(engine)
    engine.run(HIRES)
    assert log.compiled == []


def test_static_keeps_a_denoiser_and_a_decoder_for_each_size(
    open_engine: Callable[..., Engine],
) -> None:
    """Two sizes in turn compile once each; the text encoder is that of both."""
    engine = open_engine(precision="f32", shapes="static")
    small, large = TXT2IMG, TXT2IMG.but(width=96)
    log = record(engine)
    for each in (small, large, small, large):
        engine.run(each)
    assert log.compiled == ["text_encoder", "unet", "vae_decoder", "unet", "vae_decoder"]
    assert log.reused == ["unet", "vae_decoder"] * 2
    shapes = {key.shape for key in pipeline_of(engine).store.held if key.component == "unet"}
    assert shapes == {"2x4x8x8", "2x4x8x12"}


def test_guidance_and_batch_compile_a_denoiser_alone(open_engine: Callable[..., Engine]) -> None:
    """In static, guidance off and another batch are another UNet, and nothing else."""
    engine = open_engine(precision="f32", shapes="static", images_per_inference=4)
    engine.run(TXT2IMG)
    log = record(engine)
    engine.run(TXT2IMG.but(guidance=1.0))
    engine.run(TXT2IMG.but(batch=2))
    engine.run(TXT2IMG.but(batch=4, guidance=1.0))  # four rows, as two with guidance are
    assert [(event["component"], event["shape"]) for event in compiles(log)] == [
        ("unet", "1x4x8x8"),
        ("unet", "4x4x8x8"),
    ]
    assert log.reused == []
    log = record(engine)
    engine.run(TXT2IMG)
    assert log.compiled == log.states == []


def test_the_least_recently_used_size_goes_first(open_engine: Callable[..., Engine]) -> None:
    """Where the budget holds three sizes a fourth takes the place of the one used longest ago."""
    engine = open_engine(precision="f32", shapes="static")
    engine.run(TXT2IMG)
    held = pipeline_of(engine).store.held
    size = {key.component: count for key, count in held.items()}
    engine.configure(memory_budget=sum(size.values()) + 2 * (size["unet"] + size["vae_decoder"]))
    for width in (80, 96, 64, 112):
        engine.run(TXT2IMG.but(width=width))
    unets = [key.shape for key in pipeline_of(engine).store.held if key.component == "unet"]
    assert unets == ["2x4x8x12", "2x4x8x8", "2x4x8x14"]
    assert sum(pipeline_of(engine).store.held.values()) <= (engine.config.memory_budget or 0)
