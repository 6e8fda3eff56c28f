"""A tiny model of every family that is run, beside the one that most tests share."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tests.support import models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


def second_generation(folder: Path, _: Path) -> Path:
    """Write a tiny Stable Diffusion 2.x: linear projections, and heads of one size."""
    shape = replace(
        models.TINY,
        unet={**models.TINY.unet, "use_linear_projection": True, "attention_head_dim": (2, 4)},
        text_encoder={**models.TINY.text_encoder, "hidden_act": "gelu"},
    )
    return models.build(folder, shape, seed=0)


def consistency_model(folder: Path, tiny_sd: Path) -> Path:
    """Write the tiny model as a latent consistency model: its denoiser is told the guidance."""
    import diffusers
    import torch

    tiny = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config({**tiny.unet.config, "time_cond_proj_dim": 8})
    unet.load_state_dict(tiny.unet.state_dict(), strict=False)
    diffusers.LatentConsistencyModelPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
        unet=unet,
        scheduler=diffusers.LCMScheduler.from_config(tiny.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def inpaint_model(folder: Path, tiny_sd: Path) -> Path:
    """Write the tiny model with a denoiser that sees the mask and the masked image, 9 channels."""
    import diffusers
    import torch

    tiny = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config({**tiny.unet.config, "in_channels": 9})
    diffusers.StableDiffusionInpaintPipeline(
        **{**tiny.components, "unet": unet.eval()}, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def xl_inpaint_model(folder: Path, tiny_sd: Path) -> Path:
    """Write the tiny SDXL with such a denoiser."""
    return xl_model(folder, tiny_sd, in_channels=9)


def xl_model(folder: Path, tiny_sd: Path, **unet_config: Any) -> Path:
    """Write a tiny SDXL: two text encoders, and a denoiser that is told sizes and pooled text."""
    import diffusers
    import torch
    import transformers

    tiny = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    torch.manual_seed(0)
    config = {**tiny.text_encoder.config.to_dict(), "projection_dim": 32}
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    unet = diffusers.UNet2DConditionModel.from_config(
        {
            **tiny.unet.config,
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            **unet_config,
        }
    )
    inpainting = unet.config.in_channels != tiny.unet.config.in_channels
    name = f"StableDiffusionXL{'Inpaint' if inpainting else ''}Pipeline"
    getattr(diffusers, name)(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        text_encoder_2=second.eval(),
        tokenizer=tiny.tokenizer,
        tokenizer_2=tiny.tokenizer,
        unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(tiny.scheduler.config),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def xl_consistency_model(folder: Path, tiny_sd: Path) -> Path:
    """Write a tiny SDXL whose denoiser is told the guidance, under SDXL's own class name."""
    return xl_model(folder, tiny_sd, time_cond_proj_dim=8)


BUILDERS: Mapping[str, Callable[[Path, Path], Path]] = MappingProxyType({
    "sd1": lambda _, tiny_sd: tiny_sd,
    "sd2": second_generation,
    "sdxl": xl_model,
    "sdxl-lcm": xl_consistency_model,
    "lcm": consistency_model,
})  # fmt: skip
"""What writes a family's tiny model into a folder, beside the one that most tests share."""
