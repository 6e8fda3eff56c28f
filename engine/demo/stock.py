"""What the demo model trains on: pictures for the VAE, encoded scenes and batches for the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.demo import parts, scenes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

SMALL, LARGE = 64, 128
_TWO_FIGURES = 0.4
_SILENT = 0.1  # prompts that say nothing, for classifier-free guidance
_SECOND_PASS = 0.7  # of large batches, those that see only the noise that a second pass sees
_LATEST, _LATEST_SECOND = 1000, 650
_LATE = 1.5  # over 1: more of the noisy times, at which composition and shapes are decided


@dataclass(frozen=True)
class Stock:
    """
    Encoded scenes of one size.

    Attributes:
        descriptions: What the scenes show.
        latents: Scaled, float16, shape (count, 4, size / 4, size / 4).
    """

    descriptions: list[scenes.Description]
    latents: torch.Tensor

    def batch(self, tokens: Any, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Choose scenes and say them anew: prompt tokens, latents, noise and times."""
        import torch

        chosen = rng.integers(len(self.descriptions), size=size)
        said = [_say(self.descriptions[index], rng) for index in chosen]
        latents = self.latents[chosen].float()
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        large = latents.shape[-1] > parts.LATENT_SIDE
        second = large and rng.random() < _SECOND_PASS
        latest = _LATEST_SECOND if second else _LATEST
        times = torch.from_numpy((latest * (1 - rng.random(size) ** _LATE)).astype(np.int64))
        return _spell(tokens, said), latents, noise, times


def _spell(tokens: Any, prompts: list[str]) -> torch.Tensor:
    spelled = tokens(prompts, padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = spelled.input_ids
    return ids


def _say(description: scenes.Description, rng: np.random.Generator) -> str:
    return "" if rng.random() < _SILENT else scenes.phrase(description, rng)


def _describe(rng: np.random.Generator, outlined: float) -> scenes.Description:
    chosen = scenes.describe(rng, figures=1 + int(rng.random() < _TWO_FIGURES))
    return replace(chosen, outlined=bool(rng.random() < outlined))


_OF_SCENE = {"background": tuple(scenes.COLOURS), "relation": scenes.RELATIONS}
_OF_ITEM = {
    "shape": tuple(scenes.SHAPES),
    "colour": tuple(scenes.COLOURS),
    "size": tuple(scenes.SIZES),
    "position": tuple(scenes.POSITIONS),
}
_NOBODY = scenes.Item("", "")


def meanings() -> list[int]:
    """Tell how many answers each fact of a description has, `unsaid` included."""
    return [
        *(1 + len(each) for facts in (_OF_SCENE, _OF_ITEM, _OF_ITEM) for each in facts.values()),
        2,
    ]


def _mean(description: scenes.Description) -> list[int]:
    """Number the facts of a description, in the order of `meanings`; 0 is unsaid."""
    first, second, *_ = (*description.items, _NOBODY)
    asked = ((description, _OF_SCENE), (first, _OF_ITEM), (second, _OF_ITEM))
    said = [(answers, getattr(of, fact)) for of, facts in asked for fact, answers in facts.items()]
    numbers = [1 + answers.index(answer) if answer else 0 for answers, answer in said]
    return [*numbers, int(description.outlined)]


def sentences(
    tokens: Any, size: int, rng: np.random.Generator, *, outlined: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make prompts and what they mean: tokens and numbered facts, shape (size, facts)."""
    import torch

    described = [_describe(rng, outlined) for _ in range(size)]
    said = [scenes.phrase(each, rng) for each in described]
    return _spell(tokens, said), torch.tensor([_mean(each) for each in described])


def to_pixels(pictures: Sequence[Any]) -> torch.Tensor:
    """Stack PIL pictures of one size as float32 in -1..1, shape (count, 3, height, width)."""
    import torch

    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(count: int, seed: int, *, outlined: float) -> Iterator[Any]:
    """Draw whole small scenes and, in turn, cut-outs of large ones at the same size."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        scene = scenes.place(_describe(rng, outlined), rng)
        if index % 2:
            left, top = (4 * int(n) for n in rng.integers(0, 17, size=2))
            picture = scenes.draw(scene, LARGE)
            yield picture.crop((left, top, left + SMALL, top + SMALL))
        else:
            yield scenes.draw(scene, SMALL)


def encode(
    vae: Any, size: int, count: int, *, seed: int, outlined: float, striped: bool, file: Path
) -> Stock:
    """
    Draw scenes and encode them once: the latents are kept in a file.

    Args:
        vae: The frozen VAE.
        size: Width and height in pixels.
        count: How many scenes.
        seed: Of the scenes.
        outlined: Share of scenes in outlines, whose prompts say so.
        striped: Whether they have stripes, of which no prompt says a word.
        file: Where the latents are kept.
    """
    import torch

    rng = np.random.default_rng(seed)
    descriptions = [_describe(rng, outlined) for _ in range(count)]
    placed = [replace(scenes.place(each, rng), striped=striped) for each in descriptions]

    def encoded(start: int) -> torch.Tensor:
        pixels = to_pixels([scenes.draw(scene, size) for scene in placed[start : start + 50]])
        with torch.no_grad():
            mean = vae.encode(pixels).latent_dist.mean
        latents: torch.Tensor = (mean * vae.config.scaling_factor).half()
        return latents

    if not file.exists():
        with parts.two_threads() as pool:
            torch.save(torch.cat(list(pool.map(encoded, range(0, count, 50)))), file)
    return Stock(descriptions, torch.load(file))
