"""Latent consistency models on Stable Diffusion's layout."""

from __future__ import annotations

from holdfast.engine.models.families.family import EMBEDDED, Family
from holdfast.states import Mode

LATENT_CONSISTENCY = Family(
    name="sd",
    denoiser="unet",
    text_encoders=("text_encoder",),
    pipelines={
        Mode.TXT2IMG: "OVLatentConsistencyModelPipeline",
        Mode.IMG2IMG: "OVLatentConsistencyModelImg2ImgPipeline",
        # It tells a denoiser the guidance where that asks for it, as this family's does.
        Mode.INPAINT: "OVStableDiffusionInpaintPipeline",
    },
    guidance=EMBEDDED,
    runs_whole_schedule=frozenset({Mode.IMG2IMG}),
)
