"""
Which of a pass's evaluations are whole, and which are cheap.

A whole one runs all of the denoiser, for the prompt and the negative prompt. A cheap one runs the
prompt's half alone, and takes from the last whole one what guidance adds (compress guidance,
arXiv:2408.11194; FasterCache, arXiv:2410.19355) and what a UNet's deep part gave (DeepCache,
arXiv:2312.00858). While the composition comes about none is cheap: to reuse anything there moves
it, afterwards it hardly shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from holdfast.engine.requests.values import Speed

COMPOSED = 0.4
"""Share of a schedule from noise alone after which a picture is composed."""

FEWEST = 6
"""Evaluations of a pass below which each of them counts too much for any to be cheap."""

_PERIODS: Mapping[Speed, int] = MappingProxyType({"exact": 1, "balanced": 2, "fast": 3})


@dataclass(frozen=True, slots=True)
class Evaluations:
    """
    How often a pass evaluates its denoiser, for each image.

    Attributes:
        whole: For the prompt and the negative prompt, where there is guidance.
        cheap: For the prompt alone, with what the last whole one gave beside it.
    """

    whole: int
    cheap: int = 0

    def __str__(self) -> str:
        return f"{self.whole} whole" + (f", {self.cheap} cheap" if self.cheap else "")


def counted(whole: Iterable[bool]) -> Evaluations:
    """Return how many evaluations of a cadence are of each kind."""
    flags = tuple(whole)
    return Evaluations(sum(flags), len(flags) - sum(flags))


def cadence(
    speed: Speed, evaluations: int, strength: float = 1.0, changes: Collection[int] = ()
) -> tuple[bool, ...]:
    """
    Return for each evaluation of a pass whether it is whole.

    All are until the picture is composed, then every second (balanced) or every third (fast).

    Args:
        speed: That is asked for.
        evaluations: Of the pass; some schedulers evaluate more often than they step.
        strength: Share of the schedule that the pass runs, its last part; 1: from noise alone.
        changes: Evaluations that are told other prompts than the one before: these are whole.
    """
    period = _PERIODS[speed]
    if period == 1 or evaluations < FEWEST:
        return (True,) * evaluations
    left = max(0.0, COMPOSED - (1 - strength)) / strength
    first = math.ceil(round(left * evaluations, 6))
    last_whole = first - period  # so that the first one after the composition is whole
    found = []
    for index in range(evaluations):
        whole = index < first or index in changes or index - last_whole >= period
        if whole and index >= first:
            last_whole = index
        found.append(whole)
    return tuple(found)
