"""Images against diffusers in PyTorch float32 on the same weights, written out as plain calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import Engine, Hires, Img2Img, Txt2Img
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.imports import heavy, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "a large red circle on a blue background"
NEGATIVE = "bad blurry"
STEPS = 4
LEVEL = 1 / 255
SCHEDULERS = {"euler": "EulerDiscreteScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}


@pytest.fixture(scope="module")
def engine(tiny_sd: Path, tiny_cache: Path) -> Iterator[Engine]:
    with Engine(tiny_sd, cache_dir=tiny_cache, precision="f32") as opened:
        yield opened


@pytest.fixture(scope="module")
def torch_pipelines(tiny_sd: Path) -> tuple[Any, Any]:
    """The txt2img and img2img pipelines of diffusers on the same weights."""
    heavy()
    import diffusers

    with quiet():
        txt2img = diffusers.StableDiffusionPipeline.from_pretrained(
            tiny_sd, safety_checker=None, requires_safety_checker=False
        )
        img2img = diffusers.StableDiffusionImg2ImgPipeline(
            **txt2img.components, requires_safety_checker=False
        )
        for pipeline in (txt2img, img2img):
            pipeline.set_progress_bar_config(disable=True)
    return txt2img, img2img


def generators(seed: int, batch: int) -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(seed + index) for index in range(batch)]


def with_scheduler(pipeline: Any, name: str) -> Any:
    import diffusers

    cls = getattr(diffusers, SCHEDULERS[name])
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    return pipeline


def assert_same(images: tuple[Image.Image, ...], reference: list[Image.Image]) -> None:
    assert len(images) == len(reference)
    for ours, theirs in zip(images, reference, strict=True):
        assert ours.size == theirs.size
        difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) / 255
        assert difference.mean() <= LEVEL
        assert difference.max() <= 8 * LEVEL
        assert np.asarray(theirs).std() > 8, "a flat picture would prove nothing"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_txt2img(
    engine: Engine, torch_pipelines: Any, scheduler: str, guidance: float, batch: int
) -> None:
    """A txt2img image is the one that diffusers makes."""
    request = Txt2Img(
        prompt=PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guidance=guidance,
        scheduler=scheduler, seed=11, batch=batch,
    )  # fmt: skip
    reference = with_scheduler(torch_pipelines[0], scheduler)(
        prompt=[PROMPT] * batch, negative_prompt=[NEGATIVE] * batch, width=64, height=64,
        num_inference_steps=STEPS, guidance_scale=guidance, generator=generators(11, batch),
    ).images  # fmt: skip
    assert_same(engine.run(request).images, reference)


STOCHASTIC = {
    "ddim as it is": ("ddim", None, "DDIMScheduler", 0.0),
    "ddim with noise": ("ddim", 0.7, "DDIMScheduler", 0.7),
    "tcd as it is": ("tcd", None, "TCDScheduler", 0.3),
    "tcd without noise": ("tcd", 0.0, "TCDScheduler", 0.0),
}


@pytest.mark.parametrize(
    ("scheduler", "eta", "class_name", "share"), STOCHASTIC.values(), ids=STOCHASTIC
)
def test_fresh_noise_in_each_step(
    engine: Engine,
    torch_pipelines: Any,
    scheduler: str,
    eta: float | None,
    class_name: str,
    share: float,
) -> None:
    """Both passes take the share of fresh noise that is asked for, or the sampler's usual one."""
    import diffusers

    request = Hires(
        prompt=PROMPT, steps=STEPS, hires_steps=2, strength=0.5, guidance=3.0, seed=11, batch=2,
        scheduler=scheduler, eta=eta, scale=1.5, upscaler="lanczos",
    )  # fmt: skip
    cls = getattr(diffusers, class_name)
    for pipeline in torch_pipelines:
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, clip_sample=False)
    told = {"prompt": [PROMPT] * 2, "guidance_scale": 3.0, "eta": share}
    first = torch_pipelines[0](
        **told, width=64, height=64, num_inference_steps=STEPS, generator=generators(11, 2),
    ).images  # fmt: skip
    enlarged = [image.resize((96, 96), Image.Resampling.LANCZOS) for image in first]
    second = torch_pipelines[1](
        **told, image=enlarged, strength=0.5, num_inference_steps=STEPS,
        generator=generators(11, 2),
    ).images  # fmt: skip
    result = engine.run(request)
    assert_same(result.first_pass, first)
    assert_same(result.images, second)
    assert ("Eta: " in result.infotext) == (eta is not None)


def test_noise_that_a_sampler_does_not_take_is_refused(engine: Engine) -> None:
    """At once where the request names it, and before anything is drawn where the engine does."""
    with pytest.raises(InvalidRequest, match="'euler' takes none; 'ddim' and 'tcd' do"):
        Txt2Img(prompt=PROMPT, scheduler="euler", eta=0.5)
    engine.configure(scheduler="heun")
    try:
        with pytest.raises(InvalidRequest, match="eta: the scheduler 'heun' takes none"):
            engine.run(Txt2Img(prompt=PROMPT, eta=0.5))
    finally:
        engine.configure(scheduler=None)
    mixed = Hires(prompt=PROMPT, steps=2, scheduler="ddim", hires_scheduler="euler", eta=0.5)
    assert engine.run(mixed.but(seed=1, width=64, height=64)).images


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_img2img(
    engine: Engine, torch_pipelines: Any, scheduler: str, guidance: float, batch: int
) -> None:
    """An img2img image is the one that diffusers makes, with as many steps as were asked for."""
    gradient = np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8)
    image = Image.fromarray(gradient)
    request = Img2Img(
        prompt=PROMPT, image=image, steps=STEPS, strength=0.5, guidance=guidance,
        scheduler=scheduler, seed=11, batch=batch,
    )  # fmt: skip
    reference = with_scheduler(torch_pipelines[1], scheduler)(
        prompt=[PROMPT] * batch, image=[image] * batch, strength=0.5,
        num_inference_steps=2 * STEPS, guidance_scale=guidance, generator=generators(11, batch),
    ).images  # fmt: skip
    assert_same(engine.run(request).images, reference)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_hires_over_an_image(
    engine: Engine, torch_pipelines: Any, scheduler: str, guidance: float, batch: int
) -> None:
    """Hires fix is txt2img, Lanczos, and img2img with exactly the steps that were asked for."""
    request = Hires(
        prompt=PROMPT, steps=STEPS, hires_steps=3, strength=0.5, guidance=guidance,
        scheduler=scheduler, seed=11, batch=batch, scale=1.5, upscaler="lanczos",
    )  # fmt: skip
    first = with_scheduler(torch_pipelines[0], scheduler)(
        prompt=[PROMPT] * batch, width=64, height=64, num_inference_steps=STEPS,
        guidance_scale=guidance, generator=generators(11, batch),
    ).images  # fmt: skip
    enlarged = [image.resize((96, 96), Image.Resampling.LANCZOS) for image in first]
    second = with_scheduler(torch_pipelines[1], scheduler)(
        prompt=[PROMPT] * batch, image=enlarged, strength=0.5, num_inference_steps=6,
        guidance_scale=guidance, generator=generators(11, batch),
    ).images  # fmt: skip
    result = engine.run(request)
    assert_same(result.first_pass, first)
    assert_same(result.images, second)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_hires_over_latents(
    engine: Engine, torch_pipelines: Any, scheduler: str, guidance: float, batch: int
) -> None:
    """With a latent upscaler the second pass starts from enlarged latents, without the VAE."""
    import torch

    request = Hires(
        prompt=PROMPT, steps=STEPS, strength=0.7, guidance=guidance, scheduler=scheduler, seed=11,
        batch=batch, upscaler="latent",
    )  # fmt: skip
    txt2img, img2img = torch_pipelines
    latents = with_scheduler(txt2img, scheduler)(
        prompt=[PROMPT] * batch, width=64, height=64, num_inference_steps=STEPS,
        guidance_scale=guidance, generator=generators(11, batch), output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        decoded = txt2img.vae.decode(latents / txt2img.vae.config.scaling_factor).sample
    first = txt2img.image_processor.postprocess(decoded)
    enlarged = torch.nn.functional.interpolate(latents, size=(16, 16), mode="bilinear")
    second = with_scheduler(img2img, scheduler)(
        prompt=[PROMPT] * batch, image=enlarged, strength=0.7, num_inference_steps=6,
        guidance_scale=guidance, generator=generators(11, batch),
    ).images  # fmt: skip
    result = engine.run(request)
    assert_same(result.first_pass, first)
    assert_same(result.images, second)
