"""Every family of models that Holdfast runs: one file for each, chosen by what its parts say."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models.families.family import (
    VAE_DECODER,
    VAE_ENCODER,
    Family,
    Geometry,
    Guidance,
    Scale,
    refuse,
)
from holdfast.engine.models.families.flux import FLUX
from holdfast.engine.models.families.flux_2_klein import FLUX_2_KLEIN
from holdfast.engine.models.families.latent_consistency import LATENT_CONSISTENCY
from holdfast.engine.models.families.qwen_image import QWEN_IMAGE
from holdfast.engine.models.families.sana import SANA
from holdfast.engine.models.families.stable_diffusion import STABLE_DIFFUSION
from holdfast.engine.models.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from holdfast.engine.models.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from holdfast.engine.models.families.z_image import Z_IMAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FAMILIES",
    "VAE_DECODER",
    "VAE_ENCODER",
    "Family",
    "Geometry",
    "Guidance",
    "Scale",
    "family_of",
    "refuse",
]

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "FluxPipeline": FLUX,
    "Flux2KleinPipeline": FLUX_2_KLEIN,
    "QwenImagePipeline": QWEN_IMAGE,
    "SanaPipeline": SANA,
    "ZImagePipeline": Z_IMAGE,
})  # fmt: skip


def family_of(class_name: str) -> Family:
    """
    Return the row that a pipeline class belongs to; its parts' configurations say the rest.

    Args:
        class_name: ``_class_name`` of ``model_index.json``; img2img and inpaint classes count too.

    Raises:
        ModelSourceError: No such family is supported; the text lists those that are.
    """
    plain = class_name.removeprefix("OV").replace("Img2Img", "").replace("Inpaint", "")
    if plain not in FAMILIES:
        known = ", ".join(FAMILIES)
        said = f"a {class_name}" if class_name else "of no class (its index has no _class_name)"
        msg = f"The model is {said}, which Holdfast cannot run; it runs {known}."
        raise ModelSourceError(msg)
    return FAMILIES[plain]
