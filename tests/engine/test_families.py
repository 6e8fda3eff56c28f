"""Every family whose denoiser is a transformer, through a whole engine, beside diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import (
    Detail,
    Engine,
    Evaluations,
    Hires,
    Img2Img,
    Inpaint,
    Lora,
    Preview,
    Txt2Img,
)
from holdfast.engine.errors import InvalidRequest, LoraError
from holdfast.engine.imports import heavy
from holdfast.engine.requests.upscalers import upscale_image
from tests.support import tiny_transformers
from tests.support.engines import Record, opened, record
from tests.support.parity import PROMPT, REFERENCES, Reference, as_array, assert_same

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIDES = {"width": 96, "height": 64}
GUIDED, UNGUIDED = 4.0, {"z-image": 0.0}
UNREUSED = ("flux-dev", "flux-schnell", "flux2-klein")
"""Those that know no negative prompt."""
READ = {
    "sd3": 255, "sd3-without-t5": 75, "flux-dev": 511, "flux-schnell": 511, "flux2-klein": 500,
    "flux2-klein-base": 500, "z-image": 504, "sana": 298, "qwen-image": 1019,
}  # fmt: skip
"""Words of a prompt that are read."""


@dataclass(frozen=True)
class Drawn:
    """
    One family's tiny model in an engine.

    Attributes:
        name: Of the model.
        folder: As diffusers has it.
        reference: Draws with PyTorch.
        engine: Open.
        settings: That it was opened with.
        planned: The components that a hires image was to compile when none was exported yet.
    """

    name: str
    folder: Path
    reference: Reference
    engine: Engine
    settings: dict[str, Any]
    planned: frozenset[str]

    def request(self, **facts: Any) -> dict[str, Any]:
        return {"prompt": PROMPT, "guidance": GUIDED, **self.reference.negative, **facts}


@pytest.fixture(scope="module", params=REFERENCES)
def drawn(
    request: pytest.FixtureRequest, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drawn]:
    work = tmp_path_factory.mktemp(request.param)
    folder = tiny_transformers.build(request.param, work / "model")
    settings = {"model": folder, "precision": "f32", "cache_dir": tiny_cache}
    with opened({**settings, "shapes": "dynamic"}, work) as engine:
        steps = engine.plan(Hires(prompt=PROMPT, width=64, height=64)).steps
        planned = frozenset(step.subject for step in steps if step.action == "compile")
        yield Drawn(request.param, folder, REFERENCES[request.param], engine, settings, planned)


@pytest.mark.parametrize("guidance", [GUIDED, 1.0], ids=["guided", "unguided"])
def test_a_batch_is_drawn_as_diffusers_draws_each(drawn: Drawn, guidance: float) -> None:
    """Two images at once are those that PyTorch makes one by one, with guidance and without."""
    if guidance != GUIDED:
        guidance = UNGUIDED.get(drawn.name, guidance)
    made = drawn.engine.run(
        Txt2Img(**drawn.request(guidance=guidance), **SIDES, steps=3, seed=3, batch=2)
    )
    for image, seed in zip(made.images, made.seeds, strict=True):
        theirs = drawn.reference.draw(drawn.folder, **SIDES, steps=3, guidance=guidance, seed=seed)
        assert theirs.std() > 20
        assert_same(image, theirs)


def test_cheap_evaluations_reuse_what_guidance_added(drawn: Drawn) -> None:
    """Where it is guided, with the prompt alone as PyTorch draws it so; else all are whole."""
    request = Txt2Img(**drawn.request(), **SIDES, steps=6, seed=3, batch=2)
    made = drawn.engine.run(request.but(speed="fast"))
    alone = drawn.engine.run(made.request_of(1)).images[0]
    assert alone.tobytes() == made.images[1].tobytes()
    if drawn.name in UNREUSED:
        assert made.evaluations == (Evaluations(6),)
        return
    assert made.evaluations == (Evaluations(4, 2),)
    theirs = drawn.reference.draw(
        drawn.folder, **SIDES, steps=6, guidance=GUIDED, seed=3, cheap=(4, 5)
    )
    assert_same(made.images[0], theirs)


def test_an_image_is_drawn_over_in_exactly_the_steps_asked_for(drawn: Drawn) -> None:
    """img2img runs as many steps as it was told, and makes what PyTorch makes of the image."""
    image = drawn.engine.run(Txt2Img(**drawn.request(), **SIDES, steps=2, seed=8)).images[0]
    log = record(drawn.engine)
    made = drawn.engine.run(Img2Img(**drawn.request(), image=image, steps=3, strength=0.6, seed=5))
    (ended,) = log.events("pass.completed")
    assert ended["evaluations"] == 3
    assert np.abs(as_array(made.images[0]) - as_array(image)).mean() > 2
    if drawn.reference.img2img:
        theirs = drawn.reference.redraw(
            drawn.folder, image, length=5, strength=0.6, guidance=GUIDED, seed=5
        )
        assert_same(made.images[0], theirs)


def test_a_single_step_makes_an_image(drawn: Drawn) -> None:
    """A schedule of one step goes all the way, and its picture is shown as it comes."""
    shown: SimpleQueue[Preview] = SimpleQueue()
    stop = drawn.engine.subscribe(shown.put, [Preview])
    made = drawn.engine.run(Txt2Img(**drawn.request(), **SIDES, steps=1, seed=3)).images[0]
    assert as_array(made).std() > 20
    picture = shown.get(timeout=60).image
    stop()
    factor = 32 if drawn.name == "sana" else 8
    assert picture.size == (SIDES["width"] // factor, SIDES["height"] // factor)
    assert as_array(picture).std() > 0


def test_what_is_packed_is_unpacked(drawn: Drawn) -> None:
    """Latents that its pipelines have in patches come back as they were, row by row."""
    heavy()
    import torch

    model = drawn.engine._service._model
    latents = torch.randn(model.latent_shape(**SIDES), generator=torch.Generator().manual_seed(0))
    packed = model.family.pack(latents)
    if drawn.name.startswith("flux2"):
        packed = packed.flatten(2).mT  # its pipelines lay patches out in rows themselves
    back = model.family.unpack(packed, SIDES["height"], SIDES["width"])
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-5)


def test_what_it_cannot_do_is_refused(drawn: Drawn) -> None:
    """To inpaint, to redraw regions and to take a LoRA is an error that says what is possible."""
    image = Image.new("RGB", (64, 64), "gray")
    parts = {"image": image, "steps": 1}
    with pytest.raises(InvalidRequest, match="makes images by txt2img, img2img alone"):
        drawn.engine.run(Inpaint(**parts, mask=Image.new("L", (64, 64), 255)))
    with pytest.raises(InvalidRequest, match="makes images by txt2img, img2img alone"):
        drawn.engine.run(Detail(**parts, boxes=[(0, 0, 32, 32)]))
    lora = (Lora("style.safetensors"),)
    with pytest.raises(LoraError, match=r"style\.safetensors was asked for, but the model is a"):
        drawn.engine.configure(lora=lora)
    with pytest.raises(LoraError, match=r"style\.safetensors was asked for, but the model is a"):
        drawn.engine.run(Txt2Img(**drawn.request(), **SIDES, steps=1, lora=lora))


def test_hires_goes_on_from_the_enlarged_image(drawn: Drawn) -> None:
    """Pass two makes of the enlarged first image what PyTorch makes of it."""
    made = drawn.engine.run(
        Hires(**drawn.request(), width=64, height=64, steps=3, seed=3, scale=1.5, strength=0.5)
    )
    first = drawn.reference.draw(
        drawn.folder, width=64, height=64, steps=3, guidance=GUIDED, seed=3
    )
    assert_same(made.first_pass[0], first)
    if drawn.reference.img2img:
        enlarged = upscale_image(made.first_pass[0], "lanczos", (96, 96), "crop")
        theirs = drawn.reference.redraw(
            drawn.folder, enlarged, length=6, strength=0.5, guidance=GUIDED, seed=3
        )
        assert_same(made.images[0], theirs)


def test_hires_goes_on_from_enlarged_latents(drawn: Drawn) -> None:
    """Latents are enlarged as such, for each image, whatever shape the denoiser takes."""
    sides = {"width": 64, "height": 64, "scale": 1.5}
    request = Hires(**drawn.request(), **sides, steps=2, seed=3, batch=2, upscaler="latent")
    made = drawn.engine.run(request)
    alone = drawn.engine.run(request.but(batch=1, seed=made.seeds[1]))
    assert [image.size for image in made.images] == [(96, 96)] * 2
    assert np.abs(as_array(made.images[1]) - as_array(alone.images[0])).max() <= 2
    small = np.asarray(made.first_pass[0].resize((6, 6)), np.float64)
    large = np.asarray(made.images[0].resize((6, 6)), np.float64)
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.3


def test_one_compiled_set_serves_all_modes(drawn: Drawn) -> None:
    """What was planned is compiled, and nothing for another mode, size, batch or guidance."""
    drawn.engine.run(Hires(**drawn.request(), width=64, height=64, steps=2, seed=3, scale=1.5))
    log = record(drawn.engine)
    assert set(Record(log.path, 0).compiled) == drawn.planned
    drawn.engine.run(Txt2Img(**drawn.request(guidance=0.0), **SIDES, steps=2, seed=3))
    drawn.engine.run(Hires(**drawn.request(), width=96, height=96, steps=2, seed=1, batch=2))
    assert not log.compiled


def test_a_size_that_it_cannot_make_is_refused(drawn: Drawn) -> None:
    """Sides that its pipeline would floor without a word are an error with the nearest sizes."""
    multiple = 32 if drawn.name == "sana" else 16
    with pytest.raises(InvalidRequest, match=f"multiples of {multiple}"):
        drawn.engine.run(Txt2Img(**drawn.request(), width=72, height=64, steps=1))


def test_the_end_of_a_prompt_that_is_not_read_is_told(drawn: Drawn) -> None:
    """A prompt is read to its limit, the template counted, and one word more is an error."""
    limit = READ[drawn.name]
    request = Txt2Img(**drawn.request(), width=64, height=64, steps=2, seed=1)
    drawn.engine.run(request.but(prompt=" ".join(["red"] * limit)))
    with pytest.raises(InvalidRequest, match="the end: 'blue'"):
        drawn.engine.run(request.but(prompt=" ".join(["red"] * limit + ["blue"])))


def test_a_static_graph_makes_the_same_image(drawn: Drawn, tmp_path: Path) -> None:
    """Compiled for one size, with guidance and a pass of its own for each mode, it is the same."""
    request = Hires(**drawn.request(), width=64, height=64, steps=2, seed=3, scale=1.5)
    dynamic = drawn.engine.run(request).images[0]
    with opened({**drawn.settings, "shapes": "static"}, tmp_path) as engine:
        static = engine.run(request).images[0]
    assert_same(static, as_array(dynamic))
