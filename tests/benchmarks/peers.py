"""Holdfast beside its peers: each in a process of its own, taking turns."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tests.benchmarks.fleet import Worker, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.benchmarks.workload import Answer, Workload

# Those in one group are alive together and take turns; memory decides who can be.
NEAR = (("Holdfast", "GenAI", "Floor"),)
FAR = (("Optimum",), ("Reload",), ("Diffusers",))
"""So much slower or larger that one run beside the first one tells."""
INT8_GROUP = ("HoldfastInt8", "GenAI", "HoldfastInt8Static", "HoldfastInt8Weights")
PROMPT = "a large red circle on a blue background, {}"


@dataclass
class Measured:
    """
    What one system took; all lists in the order of measuring.

    Attributes:
        start: Seconds from the start of the process to the first image on disk, by process.
        start_cpu: The same in CPU seconds.
        warm: Wall seconds of each later hires run.
        warm_cpu: The same in CPU seconds.
        peak: Largest resident set over load and all runs in bytes, by process.
    """

    start: list[float] = field(default_factory=list)
    start_cpu: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    warm_cpu: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Return the median of one of the lists."""
        return median(getattr(self, name))


def measure_peers(
    workload: Workload, groups: Sequence[Sequence[str]], folder: Path, *, rounds: int, warm: int
) -> dict[str, Measured]:
    """
    Let every system load and make images.

    Args:
        workload: What they make.
        groups: Names of systems; those of one group take turns.
        folder: For images and logs.
        rounds: How often each system's process is started.
        warm: Runs in each process after its first one.
    """
    measured: dict[str, Measured] = {name: Measured() for group in groups for name in group}
    for round_ in range(rounds):
        for group in groups:
            order = group if round_ % 2 == 0 else tuple(reversed(group))
            _measure_group(workload, order, folder, measured, warm)
    return measured


def _measure_group(
    workload: Workload, group: Sequence[str], folder: Path, measured: dict[str, Measured], warm: int
) -> None:
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in group:
            worker = Worker(f"systems:{name}", workload, folder / f"{name}.log")
            workers[name] = stack.enter_context(worker)
            worker.ask("load")
            first = _hires(worker, name, 0, folder)
            measured[name].start.append(worker.age)
            measured[name].start_cpu.append(first.cpu_total)
            say(f"{name}: first image after {worker.age:.1f} s")
        for run in range(1, warm + 1):
            for name in group if run % 2 else reversed(group):
                answer = _hires(workers[name], name, run, folder)
                measured[name].warm.append(answer.wall)
                measured[name].warm_cpu.append(answer.cpu)
                say(f"{name}: {answer.wall:.2f} s, {answer.cpu:.2f} CPU s")
                if run == warm:
                    measured[name].peak.append(answer.peak)


def _hires(worker: Worker, name: str, run: int, folder: Path) -> Answer:
    path = folder / f"{name}-{run}.png"
    return worker.ask("hires", prompt=PROMPT.format(run), seed=run, save=str(path))


@dataclass(frozen=True)
class Difference:
    """
    How far two images are apart, in 1/255.

    Attributes:
        mean: Of all channels of all pixels.
        largest: The same.
        psnr: In dB; infinite where they are equal.
    """

    mean: float
    largest: float
    psnr: float


def draw_alike(workload: Workload, folder: Path, *, int8: bool) -> dict[str, Path]:
    """Have every way draw one image from the same noise."""
    names = {"Holdfast": "hires", "Optimum": "hires", "GenAI": "alike", "Diffusers": "hires"}
    if int8:
        names |= {"HoldfastInt8": "hires", "HoldfastInt8Weights": "hires"}
    paths = {}
    for name, method in names.items():
        paths[name] = folder / f"{name}-alike.png"
        with Worker(f"systems:{name}", workload, folder / f"{name}.log") as worker:
            worker.ask("load")
            worker.ask(method, prompt=PROMPT.format("alike"), seed=1, save=str(paths[name]))
    return paths


def compare(paths: Mapping[str, Path], to: str) -> dict[str, Difference]:
    """Return how far each image is from that of one way."""
    images = {
        name: np.asarray(Image.open(path).convert("RGB"), float) for name, path in paths.items()
    }
    return {name: difference(images[to], image) for name, image in images.items()}


def difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """Compare two images with values of 0 to 255."""
    apart = np.abs(one - other)
    squared = float((apart**2).mean())
    psnr = float("inf") if squared == 0 else 10 * np.log10(255**2 / squared)
    return Difference(float(apart.mean()), float(apart.max()), float(psnr))
