"""Measures the demo model on prompts that training never saw and writes its model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.demo import GUIDANCE, scenes
from holdfast.engine.demo.checker import judge, overlap, read

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

STEPS = 20
_SEED = 2024
_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Holdfast's demo model

A Stable Diffusion of {millions:.1f} million parameters that draws one or two coloured figures: a
CLIP text encoder, a UNet on v-prediction with zero terminal SNR, and a KL VAE of factor 4. It was
trained from nothing on scenes that Holdfast draws itself, by `python -m holdfast.engine.demo.train`
({steps} steps of the UNet, seed {seed}), so that an engine can be tried and tested without a
download. It knows nothing else.

- Prompts: `a small red star left of a large blue ring on a white background`,
  `blue circle, yellow background`. Colours: {colours}. Shapes: {shapes}. Sizes: {sizes}. Where:
  left, right, top, bottom, the corners, the centre; of two figures left of, right of, above, below.
- Sizes: 64 x 64; 128 x 128 as the second pass of a hires run, which adds a thin outline to figures.
- Scheduler: DDIM with trailing timesteps, {sampling} steps, guidance {guidance}.
- `stripes.safetensors`, beside the model's folder, is a LoRA that lays stripes behind the figures.

## Measured

{prompts} prompts whose combinations of shape, colour and background training never saw, {sampling}
steps, guidance {guidance}, by a checker that reads pixels. In float32 on diffusers.

| right, share of pictures | first pass, 64 pixels | hires pass, 128 pixels |
|---|---|---|
{rows}

Median overlap (IoU) of the figures in both passes: {overlap:.3f}. Pictures read as striped: with
the LoRA {styled:.1%}, without it {unstyled:.1%}.
"""


def draw_all(pipe: Any, prompts: list[str], size: int, seed: int = _SEED) -> list[Image.Image]:
    """Draw prompts with a diffusers pipeline, twenty at a time."""
    import torch

    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 20):
        pictures += pipe(
            prompts[start : start + 20],
            width=size,
            height=size,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed + start),
        ).images
    return pictures


def _enlarge(pipe: Any, prompts: list[str], pictures: list[Image.Image]) -> list[Image.Image]:
    """Run the second pass of a hires run: img2img over the pictures at twice their size."""
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline
    from PIL import Image

    second = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    larger: list[Image.Image] = []
    for start in range(0, len(prompts), 20):
        larger += second(
            prompts[start : start + 20],
            image=[
                each.resize((2 * each.width, 2 * each.height), Image.Resampling.LANCZOS)
                for each in pictures[start : start + 20]
            ],
            strength=0.5,
            num_inference_steps=2 * STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(_SEED - 1 - start),
        ).images
    return larger


def striped_share(pictures: list[Image.Image]) -> float:
    """Tell the share of pictures whose background has stripes."""
    return float(np.mean([read(picture).striped for picture in pictures]))


def measure(pipe: Any, ones: int = 140, twos: int = 60) -> dict[str, Any]:
    """
    Measure a pipeline on held-out prompts.

    Args:
        pipe: A StableDiffusionPipeline.
        ones: How many prompts of one figure.
        twos: How many of two.

    Returns:
        Shares by fact, of one figure and of two, for both passes; the median overlap of the passes;
        the share of striped pictures.
    """
    rng = np.random.default_rng(_SEED)
    figures = [1] * ones + [2] * twos
    asked = [scenes.describe(rng, figures=count, held_out=True) for count in figures]
    prompts = [scenes.phrase(each, rng) for each in asked]
    first = draw_all(pipe, prompts, 64)
    final = _enlarge(pipe, prompts, first)
    before, after = [read(each) for each in first], [read(each) for each in final]
    shares: dict[str, tuple[float, float]] = {}
    for name, chosen in (("one figure", slice(ones)), ("two figures", slice(ones, None))):
        verdicts = [
            [judge(a, r) for a, r in zip(asked[chosen], readings[chosen], strict=True)]
            for readings in (before, after)
        ]
        for fact in ("background", "colour", "shape", "position"):
            old, new = (float(np.mean([v[fact] for v in each])) for each in verdicts)
            shares[f"{name}: {fact}"] = (old, new)
        old, new = (float(np.mean([all(v.values()) for v in each])) for each in verdicts)
        shares[f"{name}: all of them"] = (old, new)
    overlaps = [
        overlap(read(small.resize(large.size)).mask, seen.mask)
        for small, large, seen in zip(first, final, after, strict=True)
        if seen.figures and read(small).figures
    ]
    return {
        "shares": shares,
        "overlap": float(np.median(overlaps)),
        "unstyled": striped_share(first),
        "prompts": prompts,
    }


def write(pipe: Any, folder: Path, *, steps: int, seed: int) -> None:
    """
    Measure a pipeline, with and without its LoRA, and write its model card.

    Args:
        pipe: A StableDiffusionPipeline in float32; without a LoRA.
        folder: Holds stripes.safetensors; the card goes to model/README.md in it.
        steps: How long the UNet was trained.
        seed: Of the recipe.
    """
    pipe.set_progress_bar_config(disable=True)
    found = measure(pipe)
    trained = (pipe.unet, pipe.vae, pipe.text_encoder)
    millions = sum(each.numel() for part in trained for each in part.parameters()) / 1e6
    pipe.load_lora_weights(folder, weight_name="stripes.safetensors")
    styled = striped_share(draw_all(pipe, found["prompts"], 64))
    pipe.unload_lora_weights()
    text = _CARD.format(
        millions=millions,
        steps=steps,
        seed=seed,
        styled=styled,
        rows="\n".join(
            f"| {name} | {before:.1%} | {after:.1%} |"
            for name, (before, after) in found["shares"].items()
        ),
        overlap=found["overlap"],
        unstyled=found["unstyled"],
        prompts=len(found["prompts"]),
        colours=", ".join(scenes.COLOURS),
        shapes=", ".join(scenes.SHAPES),
        sizes=", ".join(scenes.SIZES),
        sampling=STEPS,
        guidance=GUIDANCE,
    )
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "README.md").write_text(text)
