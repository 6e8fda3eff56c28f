"""Families beside Stable Diffusion 1.x run through the same engine, against diffusers again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import Hires
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.source import resolve
from holdfast.engine.timesteps import accept_fractional_timesteps, embed_timesteps_exactly

from ..conftest import ignore  # noqa: TID252 - tests are no installed package
from .lora_graphs import read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

PROMPT = "a large red circle on a blue background"
STEPS = 3


def consistency_model(folder: Path, tiny_sd: Path) -> Path:
    """Write the tiny model as a latent consistency model: its denoiser is told the guidance."""
    import diffusers

    tiny = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
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


def xl_model(folder: Path, tiny_sd: Path) -> Path:
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
        }
    )
    diffusers.StableDiffusionXLPipeline(
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "classes", "length"),
    [
        (
            consistency_model,
            ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
            STEPS,
        ),
        (xl_model, ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"), 2 * STEPS),
    ],
    ids=["lcm", "sdxl"],
)
def test_hires_equals_diffusers(
    open_engine: Callable[..., Engine],
    tiny_sd: Path,
    tmp_path: Path,
    build: Callable[[Path, Path], Path],
    classes: tuple[str, str],
    length: int,
) -> None:
    """Both passes are those of the family's own diffusers pipelines, with exactly their steps."""
    heavy()
    import diffusers
    import torch

    with quiet():
        folder = build(tmp_path / "model", tiny_sd)
        first = getattr(diffusers, classes[0]).from_pretrained(folder)
        second = getattr(diffusers, classes[1]).from_pretrained(folder)
        for pipeline in (first, second):
            pipeline.set_progress_bar_config(disable=True)

        def reference(pipeline: Any, **arguments: Any) -> Any:
            return pipeline(
                PROMPT, guidance_scale=4.0, generator=torch.Generator().manual_seed(3), **arguments
            ).images[0]

        composed = reference(first, width=64, height=64, num_inference_steps=STEPS)
        enlarged = composed.resize((96, 96), Image.Resampling.LANCZOS)
        painted = reference(second, image=enlarged, strength=0.5, num_inference_steps=length)

    engine = open_engine(model=folder, precision="f32")
    result = engine.run(Hires(
        prompt=PROMPT, width=64, height=64, scale=1.5, steps=STEPS, strength=0.5, guidance=4.0,
        seed=3,
    ))  # fmt: skip
    for ours, theirs in ((result.first_pass[0], composed), (result.images[0], painted)):
        difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
        assert difference.mean() <= 1
        assert difference.max() <= 8
    passes = [
        event
        for event in map(json.loads, engine.config.log_file.read_text().splitlines())
        if event["event"] == "pass.completed"
    ]
    assert [each["evaluations"] for each in passes] == [STEPS, STEPS]

    graph = read(resolve(folder, engine.config.cache_dir, ignore).path, "unet")
    accept_fractional_timesteps(graph)
    assert embed_timesteps_exactly(graph)
