"""
The demo model's recipe: ``python -m holdfast.engine.demo.train``.

Draws its own scenes, trains the VAE, then the text encoder and the UNet together, then the style
LoRA, and writes all of it in diffusers' layout. Each stage goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.demo import parts, scenes
from holdfast.engine.imports import heavy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch


@dataclass(frozen=True)
class Recipe:
    """How long and on how much each stage trains; `seed` fixes every choice in it."""

    seed: int = 0
    vae_steps: int = 1_800
    vae_batch: int = 24
    base_scenes: int = 40_000
    hires_scenes: int = 6_000
    steps: int = 9_000
    batch: int = 32
    hires_batch: int = 6
    hires_every: int = 5
    lora_steps: int = 600
    lora_rank: int = 8


def _batch(pictures: list[Any]) -> torch.Tensor:
    import torch

    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _draw_for_vae(rng: np.random.Generator, count: int) -> Iterator[Any]:
    """64 x 64 pictures: whole small scenes and cut-outs of large ones, both fills and outlines."""
    for index in range(count):
        scene = scenes.place(scenes.describe(rng, figures=1 + index % 2), rng)
        if rng.random() < 0.2:
            scene = scenes.outlined(scene)
        if index % 2:
            left, top = (4 * int(n) for n in rng.integers(0, 17, size=2))
            yield scenes.draw(scene, 128).crop((left, top, left + 64, top + 64))
        else:
            yield scenes.draw(scene, 64)


def train_vae(recipe: Recipe, work: Path) -> Any:
    """
    Train the VAE on L1 and a little KL, then freeze it.

    Returns:
        The VAE, with the scaling factor that gives latents a standard deviation of `_LATENT_STD`.
    """
    import torch

    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    vae = parts.autoencoder()
    done = work / "vae"
    if done.exists():
        return vae.from_pretrained(done).eval()
    stock = _batch(list(_draw_for_vae(rng, 8_000)))
    print(f"vae: {len(stock)} pictures drawn", flush=True)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    started = time.monotonic()
    for step in range(recipe.vae_steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * _warm_cosine(step, recipe.vae_steps, warm=50)
        pixels = stock[rng.integers(len(stock), size=recipe.vae_batch)]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample()).sample
        error = (restored.float() - pixels).abs().mean()
        kl = posterior.kl().float().mean() / pixels[0].numel()
        optimiser.zero_grad()
        (error + 3e-3 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == recipe.vae_steps - 1:
            spent = time.monotonic() - started
            print(f"vae {step}: l1 {error:.4f} kl {kl:.3f}, {spent:.0f} s", flush=True)
    vae.eval()
    with torch.no_grad():
        spread = vae.encode(stock[:512]).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=_LATENT_STD / float(spread))
    vae.save_pretrained(done)
    return vae


_LATENT_STD = 1.5


def _warm_cosine(step: int, steps: int, *, warm: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


if __name__ == "__main__":
    heavy()
    import sys

    train_vae(Recipe(), Path(sys.argv[1]))
