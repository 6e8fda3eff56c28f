"""
What faster requests cost, and what they do to the picture: fresh prompts of the demo model.

``python -m tests.benchmarks.speeds --prompts 200`` prints the table of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.fleet import say
from tests.benchmarks.quality import judged
from tests.benchmarks.worker import cpu_seconds

if TYPE_CHECKING:
    from PIL import Image

    from holdfast.engine import Engine
    from holdfast.engine.demo.scenes import Description
    from tests.benchmarks.quality import Quality

SPEEDS = ("exact", "balanced", "fast")
SAMPLERS = ("ddim", "euler", "dpm++2m", "euler-a")
GUIDANCES = (3.0, 7.5)
PROMPTS, SEED = 200, 77


@dataclass
class Drawn:
    """
    The pictures of one speed.

    Attributes:
        first: Of the first passes.
        final: Of the second ones.
        cpu: Seconds of all.
    """

    first: list[Image.Image] = field(default_factory=list)
    final: list[Image.Image] = field(default_factory=list)
    cpu: float = 0.0


def measure(
    engine: Engine, prompts: list[tuple[Description, str]], sampler: str, guidance: float
) -> dict[str, tuple[float, Quality, Quality]]:
    """
    Draw every prompt at every speed, which take turns.

    Returns:
        By speed its CPU seconds against exact, and the first and the final pictures' quality.
    """
    from holdfast.engine import Hires

    drawn = {speed: Drawn() for speed in SPEEDS}
    for seed, (_, prompt) in enumerate(prompts):
        for speed, pictures in drawn.items():
            request = Hires(
                prompt=prompt, seed=seed, steps=20, hires_steps=10, guidance=guidance,
                scheduler=sampler, speed=speed,
            )  # fmt: skip
            before = cpu_seconds()
            made = engine.run(request)
            pictures.cpu += cpu_seconds() - before
            pictures.first += made.first_pass
            pictures.final += made.images

    exact = drawn["exact"]
    return {
        speed: (
            each.cpu / exact.cpu,
            judged(prompts, each.first, exact.first),
            judged(prompts, each.final, exact.final),
        )
        for speed, each in drawn.items()
    }


def fresh_prompts(count: int) -> list[tuple[Description, str]]:
    """Return prompts of scenes that were held out of the training, three of one figure in four."""
    from holdfast.engine.demo.scenes import describe, phrase

    lot = np.random.default_rng(SEED)
    scenes = [describe(lot, figures=2 if n % 4 == 3 else 1, held_out=True) for n in range(count)]
    return [(scene, phrase(scene, lot)) for scene in scenes]


def main() -> None:
    """Print a row for each sampler, guidance and speed."""
    from holdfast.engine import Engine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--guidance", nargs="+", type=float, default=GUIDANCES)
    parser.add_argument("--precision", default="auto")
    asked = parser.parse_args()
    prompts = fresh_prompts(asked.prompts)
    settings: dict[str, Any] = {"model": "demo", "precision": asked.precision}
    with tempfile.TemporaryDirectory() as cache:
        settings["cache_dir"] = Path(cache)
        with Engine(**settings) as engine:
            engine.load("txt2img")
            for sampler in asked.samplers:
                for guidance in asked.guidance:
                    for speed, row in measure(engine, prompts, sampler, guidance).items():
                        say(f"| {sampler} | {guidance:g} | {speed} | {_told(*row)} |")


def _told(cpu: float, *pictures: Quality) -> str:
    said = [f"{each.right:.3f} | {each.psnr:.1f} | {each.features:.4f}" for each in pictures]
    return " | ".join([f"{cpu:.2f}", *said])


if __name__ == "__main__":
    main()
