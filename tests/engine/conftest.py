"""Owners of jobs that are closed when their test ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def benches() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.gate.set()
        assert bench.owner.close(timeout=PATIENCE)


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches()
