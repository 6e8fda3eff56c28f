"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.models.configs import UNet
from holdfast.engine.models.families.family import Family
from holdfast.states import Mode

if TYPE_CHECKING:
    from holdfast.engine.models.configs import Denoiser, Vae

_WIDTH_OF_2 = 1024
"""Of the prompt's embeddings in Stable Diffusion 2.x, whose VAE optimum runs scaled for float16."""


class StableDiffusion(Family):
    """Tells 2.x from 1.x by the width of the prompt's embeddings."""

    def vae_overflows(self, denoiser: Denoiser, vae: Vae) -> bool:
        """Tell whether this is Stable Diffusion 2.x."""
        width = denoiser.cross_attention_dim if isinstance(denoiser, UNet) else None
        return width == _WIDTH_OF_2 and vae.force_upcast


STABLE_DIFFUSION = StableDiffusion(
    name="sd",
    denoiser="unet",
    text_encoders=("text_encoder",),
    pipelines={
        Mode.TXT2IMG: "OVStableDiffusionPipeline",
        Mode.IMG2IMG: "OVStableDiffusionImg2ImgPipeline",
        Mode.INPAINT: "OVStableDiffusionInpaintPipeline",
    },
)
