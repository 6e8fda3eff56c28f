"""What 8 bits do to the picture: held-out prompts of the demo model, drawn in each precision."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.fleet import say
from tests.benchmarks.peers import difference

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from PIL import Image

    from holdfast.engine.demo.scenes import Description

PRECISIONS = ("f32", "auto", "int8", "int8-weights")
"""The first one is what the others are held against."""

ONE_FIGURE, TWO_FIGURES = 45, 15


@dataclass(frozen=True)
class Quality:
    """
    What pictures of one kind are like, as means over all prompts.

    Attributes:
        right: Share of pictures that show everything their prompt says.
        psnr: Against the exact ones, in dB; infinite for those themselves.
        features: Their distance in features of the demo's VAE, 0 for equal pictures; see `_apart`.
    """

    right: float
    psnr: float
    features: float


def measure_quality(cache: Path) -> dict[str, Quality]:
    """Draw both passes of every prompt in every precision, and compare the final pictures."""
    prompts = _prompts()
    drawn = {precision: _draw(precision, prompts, cache) for precision in PRECISIONS}
    exact = drawn[PRECISIONS[0]]
    return {precision: judged(prompts, images, exact) for precision, images in drawn.items()}


def judged(
    prompts: list[tuple[Description, str]], images: list[Image.Image], exact: list[Image.Image]
) -> Quality:
    """Return what pictures are like, one for each prompt, beside the exact ones."""
    from holdfast.engine.demo.checker import judge, read

    encoder = _encoder()
    return Quality(
        _mean(
            all(judge(description, read(image)).values())
            for (description, _), image in zip(prompts, images, strict=True)
        ),
        _mean(map(_psnr, exact, images)),
        _mean(_apart(encoder, *pair) for pair in zip(exact, images, strict=True)),
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _prompts() -> list[tuple[Description, str]]:
    from holdfast.engine.demo.scenes import describe, phrase

    random = np.random.default_rng(2024)
    figures = [1] * ONE_FIGURE + [2] * TWO_FIGURES
    described = [describe(random, figures=count, held_out=True) for count in figures]
    return [(description, phrase(description, random)) for description in described]


def _draw(precision: str, prompts: list[tuple[Description, str]], cache: Path) -> list[Image.Image]:
    from holdfast.engine import Engine, Hires
    from holdfast.engine.demo import GUIDANCE

    say(f"{precision}: {len(prompts)} pictures")
    with Engine(model="demo", device="CPU", precision=precision, cache_dir=cache) as engine:
        return [
            engine.run(
                Hires(prompt=prompt, steps=20, guidance=GUIDANCE, seed=seed, strength=0.5)
            ).images[0]
            for seed, (_, prompt) in enumerate(prompts)
        ]


def _psnr(one: Image.Image, other: Image.Image) -> float:
    return difference(np.asarray(one, float), np.asarray(other, float)).psnr


@functools.cache
def _encoder() -> Any:
    from holdfast.engine.demo import model_folder
    from holdfast.engine.imports import heavy, quiet

    heavy()
    with quiet():
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(model_folder() / "vae").encoder.eval()


def _apart(encoder: Any, one: Image.Image, other: Image.Image) -> float:
    """
    Return how far two pictures are apart in the features of each level of a VAE's encoder.

    As R. Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (2018), equation 1, with all weights 1 and the mean over levels.
    """
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(one), np.asarray(other)]).astype(np.float32))
    distances = []
    with torch.no_grad():
        maps = encoder.conv_in(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
        for block in encoder.down_blocks:
            maps = block(maps)
            ours, theirs = torch.nn.functional.normalize(maps, dim=1)
            distances.append(float(((ours - theirs) ** 2).sum(0).mean()))
    return float(np.mean(distances))
