"""Inpainting against diffusers in PyTorch float32, and what it never touches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from holdfast.engine import (
    CompileError,
    Detail,
    Engine,
    Hires,
    Img2Img,
    Inpaint,
    InvalidRequest,
    Lora,
    State,
    Txt2Img,
)
from holdfast.engine.imports import heavy, quiet
from tests.support.engines import compiler_of, opened, record
from tests.support.families import inpaint_model, xl_inpaint_model, xl_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPT, NEGATIVE = "a large red circle on a blue background", "bad blurry"
STEPS = 4
WIDTH, HEIGHT = 96, 64
GRADIENT = Image.fromarray(
    np.linspace(0, 255, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
)
MASK = Image.new("L", (WIDTH, HEIGHT))
MASK.paste(255, (19, 10, 70, 50))
ASKED = Inpaint(
    image=GRADIENT, mask=MASK, mask_blur=0, prompt=PROMPT, negative_prompt=NEGATIVE, steps=STEPS,
    strength=0.5, guidance=5.0, scheduler="euler", seed=11,
)  # fmt: skip
KEPT = np.asarray(MASK) == 0


def array(image: Image.Image) -> Any:
    return np.asarray(image, np.int16)


def generators(batch: int) -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(11 + index) for index in range(batch)]


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (None, "StableDiffusionInpaintPipeline"),
        (inpaint_model, "StableDiffusionInpaintPipeline"),
        pytest.param(xl_model, "StableDiffusionXLInpaintPipeline", marks=pytest.mark.slow),
        pytest.param(xl_inpaint_model, "StableDiffusionXLInpaintPipeline", marks=pytest.mark.slow),
    ],
    ids=["sd, 4 channels", "sd, 9 channels", "sdxl, 4 channels", "sdxl, 9 channels"],
)
def test_it_is_what_diffusers_draws(
    settings: dict[str, Any],
    tiny_sd: Path,
    tmp_path: Path,
    build: Callable[[Path, Path], Path] | None,
    name: str,
) -> None:
    """Inside of the mask stands what diffusers makes, outside the very image that was given."""
    heavy()
    import diffusers

    with quiet():
        folder = tiny_sd if build is None else build(tmp_path / "model", tiny_sd)
        reference = getattr(diffusers, name).from_pretrained(folder, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(reference.scheduler.config)
    with opened({**settings, "model": folder}, tmp_path) as engine:
        for strength, guidance, batch in ((0.5, 5.0, 2), (1.0, 1.0, 1)):
            theirs = reference(
                prompt=[PROMPT] * batch, negative_prompt=[NEGATIVE] * batch,
                image=[GRADIENT] * batch, mask_image=[MASK] * batch, strength=strength,
                width=WIDTH, height=HEIGHT, num_inference_steps=int(STEPS / strength),
                guidance_scale=guidance, generator=generators(batch),
            ).images  # fmt: skip
            ours = engine.run(ASKED.but(strength=strength, guidance=guidance, batch=batch)).images
            for mine, other in zip(ours, theirs, strict=True):
                assert np.array_equal(array(mine)[KEPT], array(GRADIENT)[KEPT])
                inside = np.abs(array(mine) - array(other))[~KEPT]
                assert inside.mean() <= 1
                assert inside.max() <= 8
                assert array(other)[~KEPT].std() > 8, "a flat picture would prove nothing"
        assert engine.state is State.COMPILED_INPAINT


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with opened(settings, tmp_path_factory.mktemp("log")) as running:
        yield running


def test_what_the_mask_leaves_out_is_the_input_to_the_bit(engine: Engine) -> None:
    """Whatever the area, what stood there before and the mask's kind, only its blur is touched."""
    clear = GRADIENT.convert("RGBA")
    clear.putalpha(Image.eval(MASK, lambda value: 255 - value))
    variants = [
        ASKED.but(mask_blur=3),
        ASKED.but(area="masked", padding=8, fill="fill"),
        ASKED.but(area="masked", width=64, height=96, fill="noise", strength=1.0),
        ASKED.but(fill="nothing", mask_invert=True),
        Inpaint(image=clear, mask_blur=0, prompt=PROMPT, steps=2, strength=0.5, seed=1),
        ASKED.but(image=GRADIENT.crop((0, 0, 90, 61)), mask=MASK.crop((0, 0, 90, 61))),
    ]
    for asked in variants:
        image = engine.run(asked.but(steps=2)).images[0]
        assert image.size == asked.size
        blurred = np.asarray(asked.selection.filter(ImageFilter.GaussianBlur(asked.mask_blur)))
        before = array(asked.image.convert("RGB")) if asked.image is not clear else array(GRADIENT)
        kept = blurred == 0
        assert kept.any()
        assert np.array_equal(array(image)[kept], before[kept])
        assert np.abs(array(image) - before)[asked_for(asked)].mean() > 4


def asked_for(asked: Inpaint) -> Any:
    return np.asarray(asked.selection) == 255


def test_outpainting_draws_around_what_it_leaves(engine: Engine) -> None:
    """The image stands unchanged in a larger one, on whose sides something was drawn."""
    asked = ASKED.but(mask=None, outpaint={"left": 32, "bottom": 16}, strength=1.0, steps=2)
    image = engine.run(asked).images[0]
    assert image.size == (WIDTH + 32, HEIGHT + 16)
    assert image.crop((32, 0, WIDTH + 32, HEIGHT)).tobytes() == GRADIENT.tobytes()
    assert array(image)[:, :32].std() > 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": Image.new("L", (32, 16), 255)}, "the mask is 32x16, but the image is 96x64"),
        ({"mask": Image.new("L", (WIDTH, HEIGHT))}, "the mask selects nothing"),
        ({"mask": Image.new("1", (WIDTH, HEIGHT), 1), "mask_invert": True}, "selects nothing"),
        ({"mask": None}, "give a mask, an image that is transparent there, or outpaint"),
        ({"outpaint": {"above": 3}}, "there is no side above; the sides are left, top, right"),
        ({"mask": None, "outpaint": (0, 20_000, 0, 0)}, "outpaint"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(changes: dict[str, Any], words: str) -> None:
    """An error says what the mask is, what the image is, and what to give."""
    with pytest.raises(InvalidRequest, match=words):
        ASKED.but(**changes)


def test_a_model_made_to_inpaint_does_nothing_else(
    settings: dict[str, Any], tiny_sd: Path, tmp_path: Path
) -> None:
    """Where a denoiser takes a mask, txt2img and img2img are refused before anything is done."""
    with quiet():
        folder = inpaint_model(tmp_path / "model", tiny_sd)
    with opened({**settings, "model": folder}, tmp_path) as running:
        with pytest.raises(InvalidRequest, match="made to inpaint"):
            running.run(Txt2Img(prompt=PROMPT))
        with pytest.raises(InvalidRequest, match="made to inpaint"):
            running.load()
        assert running.state is State.UNLOADED


def test_a_detail_is_an_inpaint_of_each_region_in_turn(engine: Engine) -> None:
    """Each region is redrawn over the one before, with its own prompt, and nothing else changes."""
    plain = Txt2Img(prompt=PROMPT, width=96, height=96, steps=2, seed=7)
    boxes = ((0, 0, 30, 30), (50, 40, 90, 90))
    detail = Detail(
        boxes=boxes, prompt="a star [SEP] a dog", dilation=0, mask_blur=2, padding=8, strength=0.5
    )
    whole = engine.run(plain)
    by_hand = whole.images[0]
    for number, (box, words) in enumerate(zip(boxes, ("a star", "a dog"), strict=True)):
        mask = Image.new("L", (96, 96))
        mask.paste(255, box)
        by_hand = engine.run(Inpaint(
            image=by_hand, mask=mask, mask_blur=2, area="masked", padding=8, width=64, height=64,
            prompt=words, strength=0.5, steps=2, seed=7 + number,
        )).images[0]  # fmt: skip
    log = record(engine)
    drawn = engine.run(plain.but(detail=detail))
    assert drawn.images[0].tobytes() == by_hand.tobytes()
    assert [each["pass"] for each in log.events("pass.completed")] == [1, 2, 3]
    alone = engine.run(detail.but(image=whole.images[0], seed=7, steps=2))
    assert alone.images[0].tobytes() == by_hand.tobytes()
    assert log.compiled == []
    assert "ADetailer prompt: a star [SEP] a dog" in drawn.infotext


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give the regions to redraw"),
        ({"boxes": [(10, 10, 10, 20)]}, r"the box \(10, 10, 10, 20\) is empty"),
        ({"masks": [Image.new("L", (96, 96))]}, "mask 1 selects nothing"),
    ],
)
def test_details_without_a_region_are_refused(changes: dict[str, Any], words: str) -> None:
    """A detail says where; what lies nowhere is refused when it is made."""
    with pytest.raises(InvalidRequest, match=words):
        Detail(**changes)


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        (Detail(boxes=[(200, 0, 300, 10)]), "lies outside of the picture, which is 64x64"),
        (Detail(masks=MASK), "mask 1 is 96x64, but the picture is 64x64"),
    ],
)
def test_details_that_do_not_fit_the_picture_are_refused(
    engine: Engine, detail: Detail, words: str
) -> None:
    """A region of a picture that is still to be made is held against its size beforehand."""
    with pytest.raises(InvalidRequest, match=words):
        engine.run(Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, detail=detail))


def test_hires_begins_with_an_image_or_with_a_first_pass(engine: Engine) -> None:
    """Over an image the first pass is img2img; a first pass that is given is not run again."""
    over = Hires(
        prompt=PROMPT, image=GRADIENT, first_strength=0.6, steps=2, strength=0.5, seed=5, batch=2,
        scale=1.5, hires_steps=3,
    )  # fmt: skip
    result = engine.run(over)
    alone = engine.run(
        Img2Img(prompt=PROMPT, image=GRADIENT, strength=0.6, steps=2, seed=5, batch=2)
    )
    assert [each.tobytes() for each in result.first_pass] == [
        each.tobytes() for each in alone.images
    ]
    log = record(engine)
    again = engine.run(
        Hires(prompt=PROMPT, first_pass=result.first_pass, steps=3, seed=5, scale=1.5)
    )
    assert [each.tobytes() for each in again.images] == [each.tobytes() for each in result.images]
    assert [each["mode"] for each in log.events("pass.started")] == ["img2img"]
    assert log.compiled == []
    last = engine.run(again.request_of(1))
    assert last.images[0].tobytes() == result.images[1].tobytes()


def test_another_model_paints_the_second_pass(
    engine: Engine, settings: dict[str, Any], models: Any, tmp_path: Path
) -> None:
    """The second pass is img2img of the other model; a second request compiles nothing."""
    with quiet():
        other = models.build_tiny_sd(tmp_path / "other", seed=3)
    request = Hires(prompt=PROMPT, steps=2, seed=5, scale=1.5, hires_model=other)
    log = record(engine)
    result = engine.run(request)
    assert log.states[-3:] == ["compiled-img2img", "recompiling.img2img", "compiled-img2img"]
    assert "unet" in log.compiled
    enlarged = result.first_pass[0].resize((96, 96), Image.Resampling.LANCZOS)
    with opened({**settings, "model": other}, tmp_path) as second:
        painted = second.run(Img2Img(prompt=PROMPT, image=enlarged, strength=0.5, steps=2, seed=5))
    assert result.images[0].tobytes() == painted.images[0].tobytes()
    log = record(engine)
    assert engine.run(request).images[0].tobytes() == result.images[0].tobytes()
    assert log.compiled == []
    plain = engine.run(Txt2Img(prompt=PROMPT, steps=2, seed=5))
    assert plain.images[0].tobytes() == result.first_pass[0].tobytes()
    assert f"Hires checkpoint: {other.name}" in result.infotext


def test_a_recompile_between_passes_returns_to_inpaint(engine: Engine, ink: Path) -> None:
    """A LoRA for a detail alone recompiles in inpaint and ends there, also where that fails."""
    detail = Detail(boxes=[(0, 0, 40, 40)], lora=(Lora(ink, 0.7),))
    request = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7, detail=detail)
    compiler, log = compiler_of(engine), record(engine)
    core = compiler.core
    compiler.core = NoCompiling(core)
    try:
        with pytest.raises(CompileError):
            engine.run(request)
    finally:
        compiler.core = core
    assert log.states[-3:] == ["compiled-inpaint", "recompiling.inpaint", "compiled-inpaint"]
    log = record(engine)
    engine.run(request)
    assert log.states[-3:] == ["compiled-inpaint", "recompiling.inpaint", "compiled-inpaint"]


class NoCompiling:
    """OpenVINO that reads every graph and compiles none."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def compile_model(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")
