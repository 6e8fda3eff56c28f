"""Held-out prompts and what the demo model makes of them, drawn once for the whole folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from holdfast.engine import Engine, Hires
from holdfast.engine.demo import GUIDANCE
from holdfast.engine.demo.checker import Reading, read
from holdfast.engine.demo.scenes import Description, describe, phrase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

ONE_FIGURE, TWO_FIGURES = 140, 60


@dataclass(frozen=True)
class Drawn:
    """A prompt that training never saw, both passes of its hires run, and what they show."""

    description: Description
    prompt: str
    seed: int
    first: Image.Image
    final: Image.Image
    first_reading: Reading
    final_reading: Reading


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo model is exported to, once."""
    return tmp_path_factory.mktemp("demo-cache")


@pytest.fixture(scope="module")
def demo_engine(demo_cache: Path) -> Iterator[Engine]:
    """An engine on the demo model."""
    with Engine(model="demo", device="CPU", cache_dir=demo_cache) as engine:
        yield engine


@pytest.fixture(scope="session")
def held_out() -> list[tuple[Description, str]]:
    """200 held-out descriptions and prompts: 140 of one figure, 60 of two."""
    rng = np.random.default_rng(2024)
    figures = [1] * ONE_FIGURE + [2] * TWO_FIGURES
    described = [describe(rng, figures=count, held_out=True) for count in figures]
    return [(description, phrase(description, rng)) for description in described]


@pytest.fixture(scope="session")
def drawn(demo_cache: Path, held_out: list[tuple[Description, str]]) -> list[Drawn]:
    """Every held-out prompt drawn by the engine: 64 pixels, then 128, 20 steps each."""
    gallery = []
    with Engine(model="demo", device="CPU", cache_dir=demo_cache) as engine:
        for seed, (description, prompt) in enumerate(held_out):
            result = engine.run(
                Hires(prompt=prompt, steps=20, guidance=GUIDANCE, seed=seed, strength=0.5)
            )
            first, final = result.first_pass[0], result.images[0]
            gallery.append(Drawn(description, prompt, seed, first, final, read(first), read(final)))
    return gallery


@pytest.fixture(scope="session")
def kohya_lora() -> Path:
    """The style LoRA in kohya's format."""
    return Path(__file__).parent / "stripes_kohya.safetensors"
