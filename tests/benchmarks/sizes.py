"""Many sizes on one dynamic engine: what OpenVINO keeps of each, and what keeping less costs."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from tests.benchmarks.fleet import Worker, say

if TYPE_CHECKING:
    from pathlib import Path

    from tests.benchmarks.workload import Workload

PROPERTY = "CPU_RUNTIME_CACHE_CAPACITY"
DEFAULT = 5000
"""OpenVINO's own."""
TURNS = 4
"""As many times a hires request's two sizes follow one another."""


class Sides(msgspec.Struct, frozen=True):
    """
    Which sizes a model is asked for.

    Attributes:
        widths: In pixels, ascending.
        heights: In pixels, ascending.
        most: So many of their pairs, shuffled, always the same ones.
        block: So many by one engine before the next engine takes its turn.
    """

    widths: tuple[int, ...]
    heights: tuple[int, ...]
    most: int
    block: int

    def shuffled(self) -> list[tuple[int, int]]:
        """Return the sizes, without the largest of all."""
        sizes = list(itertools.product(self.widths, self.heights))[:-1]
        random.Random(7).shuffle(sizes)  # noqa: S311 - no secret
        return sizes[: self.most]


DEMO = Sides(tuple(range(64, 512, 16)), tuple(range(64, 256, 16)), 300, 50)
SD15 = Sides(tuple(range(64, 384, 64)), (64, 128, 192), 12, 3)


class Sizes:
    """An engine whose compiled graphs keep what `open` is told."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.engine: Any = None

    def open(self, model: str, capacity: int) -> dict[str, float]:
        """Open it, and draw the largest size, which decides what the others' activations take."""
        from holdfast.engine.engine import Engine

        self.engine = Engine(
            model,
            shapes="dynamic",
            cache_dir=self.workload.cache,
            properties={PROPERTY: capacity},
        )
        self.engine.load("txt2img")
        return {}

    def draw(self, width: int, height: int) -> dict[str, float]:
        """Draw an image in one step, and tell what the process holds then."""
        from holdfast.engine.requests.txt2img import Txt2Img

        self.engine.run(
            Txt2Img(prompt="a tree", seed=1, width=width, height=height, steps=1, guidance=1.0)
        )
        return {"resident": psutil.Process().memory_info().rss}


def measure_sizes(
    model: str, workload: Workload, sides: Sides, capacities: tuple[int, ...], folder: Path
) -> dict[int, dict[str, float]]:
    """
    Ask engines that keep so much each, in turns, for the same sizes in the same order.

    Returns:
        For each capacity the resident bytes before and after, the CPU seconds of all sizes, and
        those of one image where two sizes follow one another again and again.
    """
    largest = (sides.widths[-1], sides.heights[-1])
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        taken: dict[int, dict[str, float]] = {}
        for capacity in capacities:
            log = folder / "sizes.log"
            worker = stack.enter_context(Worker("sizes:Sizes", workload, log))
            worker.ask("load")
            worker.ask("open", model=model, capacity=capacity)
            workers[capacity] = worker
            taken[capacity] = {"before": _draw(worker, *largest)[1], "cpu": 0.0, "turns": 0.0}
        sizes = sides.shuffled()
        for start in range(0, len(sizes), sides.block):
            for capacity, worker in workers.items():
                for width, height in sizes[start : start + sides.block]:
                    cpu, resident = _draw(worker, width, height)
                    taken[capacity]["cpu"] += cpu
                    taken[capacity]["after"] = resident
            say(f"{start + sides.block} of {len(sizes)} sizes of {model}: {taken}")
        for _ in range(TURNS):
            for capacity, worker in workers.items():
                for width, height in (sizes[0], largest):
                    taken[capacity]["turns"] += _draw(worker, width, height)[0] / TURNS / 2
    return {capacity: {**each, "sizes": len(sizes)} for capacity, each in taken.items()}


def _draw(worker: Worker, width: int, height: int) -> tuple[float, float]:
    answer = worker.ask("draw", width=width, height=height)
    return answer.cpu, answer.result["resident"]
