"""
Small pictures of latents while they are denoised: one linear map from channels to colours.

A latent pixel shows, nearly linearly, the mean colour of the pixels that it stands for. For the
common VAEs such maps are published; for any other one the map is fitted to what it decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from holdfast.engine.models.configs import Vae

    Floats = NDArray[np.float32]

PATCH = 4
"""Side, in latent pixels, of the flat patches that an unknown VAE is probed with."""


@dataclass(frozen=True, eq=False)
class LatentMap:
    """
    A linear map from a VAE's latents to colours.

    Attributes:
        factors: Colour of one unit of each channel, in -1 to 1; shape (channels, 3).
        bias: Colour where all channels are 0; shape (3,).
        spread: Deviation of clean latents.
    """

    factors: Floats
    bias: Floats
    spread: float = 1.0

    def picture(self, latents: Floats) -> Image.Image:
        """
        Draw the latents of one image, noise and all.

        Args:
            latents: As the denoiser sees them; shape (channels, height, width).
        """
        # What spreads more than clean latents is noise on a scheduler's own scale.
        latents = latents / max(1.0, float(latents.std()) / self.spread)
        colours = np.tensordot(latents, self.factors, axes=(0, 0)) + self.bias
        return Image.fromarray(((colours + 1) * 127.5).clip(0, 255).astype(np.uint8))


def latent_map(vae: Vae, side: int, decode: Callable[[Floats], Floats]) -> LatentMap:
    """
    Return the map for a VAE: the published one, or one fitted to what it makes of a probe.

    Args:
        vae: Its configuration.
        side: Height and width of the probe in latent pixels, as `decode` can take them.
        decode: Makes pixels (1, 3, height, width) in -1 to 1 of latents (1, channels, side, side)
            as the denoiser sees them. Called once where no map is published, else never.
    """
    for known in PUBLISHED.values():
        if all(getattr(vae, fact) == value for fact, value in known.vae.items()):
            return known.map
    patches = -(-side // PATCH)
    shape = (1, vae.latent_channels, patches, patches)
    probe = np.random.default_rng(0).standard_normal(shape, np.float32)
    probe = probe.repeat(PATCH, axis=2).repeat(PATCH, axis=3)[:, :, :side, :side]
    return fit(probe, decode(probe))


def fit(latents: Floats, pixels: Floats) -> LatentMap:
    """
    Return the map that comes nearest, by least squares, to what a VAE made of some latents.

    Args:
        latents: Shape (images, channels, height, width).
        pixels: In -1 to 1; shape (images, 3, factor x height, factor x width).
    """
    images, channels, height, width = latents.shape
    factor = pixels.shape[2] // height
    means = pixels.reshape(images, 3, height, factor, width, factor).mean(axis=(3, 5))
    known = latents.transpose(0, 2, 3, 1).reshape(-1, channels)
    known = np.concatenate([known, np.ones_like(known[:, :1])], axis=1)
    wanted = means.transpose(0, 2, 3, 1).reshape(-1, 3)
    solved = np.linalg.lstsq(known, wanted, rcond=None)[0].astype(np.float32)
    return LatentMap(solved[:-1], solved[-1])


@dataclass(frozen=True)
class Published:
    """A map, and what the ``config.json`` of the VAEs that it holds for says."""

    vae: Mapping[str, Any]
    map: LatentMap


def _published(
    channels: int,
    scale: float,
    factors: str,
    bias: str = "0 0 0",
    *,
    widths: tuple[int, ...] = (128, 256, 512, 512),
    spread: float = 1.0,
) -> Published:
    return Published(
        {
            "latent_channels": channels,
            "scaling_factor": scale,
            "block_out_channels": widths,
        },
        LatentMap(
            np.array(factors.split(), np.float32).reshape(-1, 3),
            np.array(bias.split(), np.float32),
            spread,
        ),
    )


PUBLISHED: Mapping[str, Published] = MappingProxyType({
    # Fitted to the latents of 400 of the demo model's own scenes.
    "demo": _published(4, 1.0531431307101797, """
         0.5937  0.4286 -0.3616
         0.4330  0.8429  0.6952
         0.1404  0.2138  0.1192
        -0.2729 -0.4763 -0.4806
    """, "0.2691 -0.0332 -0.1381", widths=(16, 32, 64), spread=1.5),
    # keturn, https://discuss.huggingface.co/t/23204 (2022), for Stable Diffusion 1.4.
    "sd": _published(4, 0.18215, """
         0.298  0.207  0.208
         0.187  0.286  0.173
        -0.158  0.189  0.264
        -0.184 -0.271 -0.473
    """),
    # T. A. Vass, https://huggingface.co/blog/TimothyAlexisVass/explaining-the-sdxl-latent-space
    # (2024): 60 60 60, -60 -5 10, 25 15 -5, -70 -50 -35 and 150 140 130 on a scale of 0 to 255.
    "sdxl": _published(4, 0.13025, """
         0.4706  0.4706  0.4706
        -0.4706 -0.0392  0.0784
         0.1961  0.1176 -0.0392
        -0.5490 -0.3922 -0.2745
    """, "0.1765 0.0980 0.0196"),
    # Stability AI, https://github.com/Stability-AI/sd3.5, sd3_impls.py (2024).
    "sd3": _published(16, 1.5305, """
        -0.0645  0.0177  0.1052
         0.0028  0.0312  0.0650
         0.1848  0.0762  0.0360
         0.0944  0.0360  0.0889
         0.0897  0.0506 -0.0364
        -0.0020  0.1203  0.0284
         0.0855  0.0118  0.0283
        -0.0539  0.0658  0.1047
        -0.0057  0.0116  0.0700
        -0.0412  0.0281 -0.0039
         0.1106  0.1171  0.1220
        -0.0248  0.0682 -0.0481
         0.0815  0.0846  0.1207
        -0.0120 -0.0055 -0.0867
        -0.0749 -0.0634 -0.0456
        -0.1418 -0.1457 -0.1259
    """),
    # ComfyUI, https://github.com/comfyanonymous/ComfyUI, comfy/latent_formats.py (2024).
    "flux": _published(16, 0.3611, """
        -0.0346  0.0244  0.0681
         0.0034  0.0210  0.0687
         0.0275 -0.0668 -0.0433
        -0.0174  0.0160  0.0617
         0.0859  0.0721  0.0329
         0.0004  0.0383  0.0115
         0.0405  0.0861  0.0915
        -0.0236 -0.0185 -0.0259
        -0.0245  0.0250  0.1180
         0.1008  0.0755 -0.0421
        -0.0515  0.0201  0.0011
         0.0428 -0.0012 -0.0036
         0.0817  0.0765  0.0749
        -0.1264 -0.0522 -0.1103
        -0.0280 -0.0881 -0.0499
        -0.1262 -0.0982 -0.0778
    """, "-0.0329 -0.0718 -0.0851"),
})  # fmt: skip
