"""What becomes of a picture whose size, or aspect, is not the one asked for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import Hires, Img2Img, InvalidRequest
from holdfast.engine.requests.sizes import Fit, scaled
from holdfast.engine.requests.upscalers import UPSCALERS, upscale_image, upscale_latents

LATENT = [name for name, each in UPSCALERS.items() if each.space == "latent"]
PIXEL = [name for name, each in UPSCALERS.items() if each.space == "image"]


def rings(width: int, height: int) -> Image.Image:
    """A picture in which each column and each row has its own grey."""
    across = np.linspace(0, 120, width)[None, :] + np.linspace(0, 120, height)[:, None]
    return Image.fromarray(across.astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"width": 192}, (192, 128)),
        ({"height": 128}, (192, 128)),
        ({}, (96, 64)),
        ({"width": 64, "height": 64}, (64, 64)),
    ],
)
def test_one_side_keeps_the_aspect(given: dict[str, int], size: tuple[int, int]) -> None:
    """The other side follows, in img2img as in hires."""
    assert Img2Img(image=rings(96, 64), **given).size == size  # type: ignore[arg-type]
    if given:
        target = {f"hires_{name}": side for name, side in given.items()}
        assert Hires(**target).target(96, 64) == size


def test_a_picture_of_more_than_the_longest_side_needs_a_size() -> None:
    """A picture is not let past the limit that holds for sizes which are asked for."""
    long = Image.new("RGB", (20_000, 64))
    with pytest.raises(InvalidRequest, match="give a width and height up to 16384"):
        Img2Img(image=long)
    assert Img2Img(image=long, width=640, height=64).size == (640, 64)


@pytest.mark.parametrize(
    ("fit", "inner"),
    [("crop", (192, 192)), ("fill", (64, 64)), ("stretch", (192, 64))],
)
def test_another_aspect_goes_by_the_rule(fit: Fit, inner: tuple[int, int]) -> None:
    """What is scaled covers the target, lies within it, or is it."""
    assert scaled((64, 64), (192, 64), fit) == inner
    assert scaled((64, 64), (128, 128), fit) == (128, 128)


@pytest.mark.parametrize("name", PIXEL)
def test_pixels_are_cropped_filled_or_stretched(name: str) -> None:
    """Crop shows the middle at scale, fill the whole with its edges drawn out, stretch bends."""
    image, target = rings(64, 64), (192, 64)
    options = UPSCALERS[name].options
    large = np.asarray(image.resize((192, 192), **options))
    crop = np.asarray(upscale_image(image, name, target, "crop"))
    assert np.array_equal(crop, large[64:128])
    fill = np.asarray(upscale_image(image, name, target, "fill"))
    assert np.array_equal(fill[:, 64:128], np.asarray(image))
    assert np.array_equal(fill[:, :64], np.repeat(np.asarray(image)[:, :1], 64, 1))
    stretch = upscale_image(image, name, target, "stretch")
    assert stretch.tobytes() == image.resize(target, **options).tobytes()
    tall = np.asarray(upscale_image(image, name, (64, 192), "fill"))
    assert np.array_equal(tall[64:128], np.asarray(image))


@pytest.mark.parametrize("name", LATENT)
def test_latents_are_cropped_filled_or_stretched(name: str) -> None:
    """The same in latent space, whatever the interpolation."""
    import torch

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = upscale_latents(latents, name, (24, 24), "stretch")
    assert torch.equal(upscale_latents(latents, name, (24, 8), "crop"), whole[..., 8:16, :])
    fill = upscale_latents(latents, name, (24, 8), "fill")
    same = upscale_latents(latents, name, (8, 8), "stretch")
    assert torch.equal(fill[..., 8:16], same)
    assert torch.equal(fill[..., :8], same[..., :1].expand(-1, -1, -1, 8))
    for fit in ("crop", "fill", "stretch"):
        assert upscale_latents(latents, name, (24, 8), fit).shape == (1, 4, 8, 24)


def test_the_same_aspect_is_the_same_by_every_rule() -> None:
    """Where nothing sticks out, no rule changes a pixel."""
    image = rings(96, 64)
    pictures = {
        upscale_image(image, "lanczos", (144, 96), fit).tobytes()
        for fit in ("crop", "fill", "stretch")
    }
    assert len(pictures) == 1
