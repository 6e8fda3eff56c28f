"""Stable Diffusion XL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.engine.models.families.family import Family
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.engine.models.configs import Denoiser, Vae


class StableDiffusionXL(Family):
    """Tells base models from refiners by their text encoders."""

    def refusal(self, index: Mapping[str, Any]) -> str:
        """Return why its parts cannot run: a refiner lacks the first text encoder."""
        why = super().refusal(index)
        if index.get("text_encoder", [""])[0] is None:
            return "a refiner (it has no first text_encoder), which goes over another's latents"
        return why

    def vae_overflows(self, denoiser: Denoiser, vae: Vae) -> bool:
        """Tell whether the VAE is the original one, and not one that was trained for float16."""
        return vae.force_upcast


STABLE_DIFFUSION_XL = StableDiffusionXL(
    name="sdxl",
    denoiser="unet",
    text_encoders=("text_encoder", "text_encoder_2"),
    pipelines={
        Mode.TXT2IMG: "OVStableDiffusionXLPipeline",
        Mode.IMG2IMG: "OVStableDiffusionXLImg2ImgPipeline",
        Mode.INPAINT: "OVStableDiffusionXLInpaintPipeline",
    },
    default_side=128,
    text_layer=2,
    prompt_outputs=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    vae_statistics=("latents_mean", "latents_std"),
)
