"""How far a job has come and how long it will still take, by the seconds expected of it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_TRUST = 0.1
"""Share of the expected seconds that must have passed until the measured pace counts for half."""

_NEARLY = 0.99
"""Most that is told of a job that has not ended."""


@dataclass(frozen=True, slots=True)
class Progress:
    """
    How far one job has come, over the whole request.

    Attributes:
        fraction: 0 to 1, in expected time and not in steps; never falls. 1 only when it is done.
        phase: What is going on, for example ``"compile unet"`` or ``"pass 2"``.
        pass_number: 1 or 2 inside a denoising pass, else None.
        step: Steps that are done in this phase; None where it has no steps.
        steps: Steps of this phase.
        remaining_seconds: Expected, at the pace seen so far; None while nothing is known.
    """

    fraction: float
    phase: str
    pass_number: int | None = None
    step: int | None = None
    steps: int | None = None
    remaining_seconds: float | None = None


class Course:
    """Where one job stands among its phases. Written by one thread, read by any."""

    def __init__(self) -> None:
        self._expected: dict[str, float] = {}
        self._place = Progress(0.0, "queued")
        self._began = self._moved = time.monotonic()

    def begin(self) -> None:
        """Start the clock: what went before was waiting."""
        self._began = self._moved = time.monotonic()

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Take the expected seconds of each phase, in the order in which they will come."""
        self._expected = dict(seconds)

    def advance(
        self, phase: str, pass_number: int | None, step: int | None, steps: int | None
    ) -> None:
        """Enter a phase, or finish a step of it. Phases that stand before it count as done."""
        fraction = self.progress.fraction
        if phase != self._place.phase or steps is not None:
            self._moved = time.monotonic()
        self._place = Progress(fraction, phase, pass_number, step, steps)

    def finish(self) -> None:
        """Reach the end."""
        self._place = Progress(1.0, "done", remaining_seconds=0.0)

    @property
    def progress(self) -> Progress:
        """The present place. Between two calls of `advance` it moves with the clock."""
        place, total = self._place, sum(self._expected.values())
        if total <= 0 or place.phase not in self._expected:
            return place
        phases = list(self._expected)
        unit = self._expected[place.phase] / (place.steps or 1)
        done = sum(self._expected[name] for name in phases[: phases.index(place.phase)])
        done += unit * (place.step or 0)
        prior = total * _TRUST
        pace = (self._moved - self._began + prior) / (done + prior)
        waited = time.monotonic() - self._moved
        fraction = min((done + min(waited / pace, unit)) / total, _NEARLY)
        remaining = max(total - done - unit, 0.0) * pace + max(unit * pace - waited, 0.0)
        return dataclasses.replace(
            place, fraction=max(place.fraction, fraction), remaining_seconds=remaining
        )
