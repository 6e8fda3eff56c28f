from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.imports import heavy
from holdfast.engine.models.configs import Vae, read_vae
from holdfast.engine.passes.previews import PUBLISHED, LatentMap, fit, latent_map

if TYPE_CHECKING:
    from pathlib import Path

WIDTHS = (128, 256, 512, 512)
CONFIGS = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}


def never(_: object) -> Any:
    pytest.fail("a published map needs no decoding")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_common_vaes_need_no_fitting(family: str) -> None:
    """SD, SDXL, SD3 and Flux are known by their VAE's configuration."""
    found = latent_map(Vae(**CONFIGS[family], block_out_channels=WIDTHS), 64, never)
    assert found is PUBLISHED[family].map
    assert found.factors.shape == (CONFIGS[family]["latent_channels"], 3)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_brighter_image_gives_a_brighter_picture(family: str) -> None:
    """Moving latents along a map's own grey direction takes the picture from dark to light."""
    known = PUBLISHED[family].map
    grey = np.linalg.pinv(known.factors.T.astype(np.float64)) @ np.full(3, 0.6)
    means = [
        np.asarray(
            known.picture(
                np.broadcast_to(sign * grey[:, None, None], (len(grey), 8, 8)).astype(np.float32)
            )
        ).mean()
        for sign in (-1, 0, 1)
    ]  # fmt: skip
    assert means[0] < 90 < means[1] < 165 < means[2]


@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.sampled_from([3, 4, 16]),
    factor=st.sampled_from([1, 4, 8]),
)
def test_a_linear_vae_is_fitted_exactly(seed: int, channels: int, factor: int) -> None:
    """Where pixels are a linear map of latents, the fit finds that map from one decode."""
    random = np.random.default_rng(seed)
    factors = random.normal(size=(channels, 3)).astype(np.float32)
    bias = random.normal(size=3).astype(np.float32)

    def decode(latents: np.ndarray[Any, Any]) -> Any:
        pixels = np.einsum("ncyx,cr->nryx", latents, factors) + bias[:, None, None]
        return pixels.repeat(factor, 2).repeat(factor, 3)

    found = latent_map(Vae(latent_channels=channels), 24, decode)
    np.testing.assert_allclose(found.factors, factors, atol=1e-3)
    np.testing.assert_allclose(found.bias, bias, atol=1e-3)


def test_a_vae_of_another_width_is_not_taken_for_a_known_one(tiny_sd: Path) -> None:
    """A small VAE with Stable Diffusion's scale is fitted, by least squares, to what it decodes."""
    heavy()
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_sd / "vae").eval()
    config = read_vae(tiny_sd / "vae" / "config.json")
    seen = []

    def decode(latents: np.ndarray[Any, Any]) -> Any:
        with torch.no_grad():
            pixels = vae.decode(torch.from_numpy(latents) / config.scaling_factor).sample
        seen.append((latents, pixels.numpy()))
        return pixels.numpy()

    found = latent_map(config, 16, decode)
    assert len(seen) == 1
    latents, pixels = seen[0]
    means = pixels.reshape(3, 16, 8, 16, 8).mean((2, 4))
    guessed = np.tensordot(found.factors, latents[0], axes=(0, 0)) + found.bias[:, None, None]
    residue = guessed - means
    # Least squares: what is left over is orthogonal to every channel, and to a constant.
    assert abs(residue.mean()) < 1e-4
    assert np.abs(np.einsum("ryx,cyx->rc", residue, latents[0])).max() / residue[0].size < 1e-3


def test_a_fit_uses_several_images() -> None:
    """Latents of a batch are fitted together."""
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 6)).astype(np.float32)
    pixels = latents[:, :3].repeat(2, 2).repeat(2, 3) * 2 + 0.25
    found = fit(latents, pixels)
    np.testing.assert_allclose(found.factors, np.eye(4, 3) * 2, atol=1e-5)
    np.testing.assert_allclose(found.bias, 0.25, atol=1e-5)


COLOURS = LatentMap(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))


def test_a_picture_has_a_pixel_for_each_latent_pixel() -> None:
    """Rows and columns stand where they stood; -1 is black and 1 is full."""
    latents = np.full((3, 2, 5), -1, np.float32)
    latents[0, 0, 4] = 1.0
    picture = COLOURS.picture(latents)
    assert picture.size == (5, 2)
    assert picture.mode == "RGB"
    assert picture.getpixel((4, 0)) == (255, 0, 0)
    assert picture.getpixel((4, 1)) == (0, 0, 0)


def test_noise_of_any_scale_shows_as_noise() -> None:
    """Latents on a scheduler's larger scale of noise are not drawn as mere black and white."""
    noise = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
    usual, large = (np.asarray(COLOURS.picture(noise * scale)) for scale in (1, 14.6))
    assert np.abs(usual.astype(int) - large).max() <= 1
    assert ((large > 0) & (large < 255)).mean() > 0.3
