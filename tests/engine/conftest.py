"""What the engine's tests share: engines whose logs are audited, and owners of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Engine

from ..logbook.audited import assert_clean
from .workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def open_engine(
    request: pytest.FixtureRequest, tiny_ir: Path, tiny_cache: Path, tmp_path: Path
) -> Iterator[Callable[..., Engine]]:
    """
    Opens engines on the tiny model; afterwards each log must stand the audit.

    A test that breaks the rules on purpose carries ``@pytest.mark.unaudited(reason)``.
    """
    opened: list[Engine] = []

    def open_one(**settings: Any) -> Engine:
        log = tmp_path / f"engine-{len(opened)}.jsonl"
        defaults = {"model": tiny_ir, "cache_dir": tiny_cache, "log_file": log}
        opened.append(Engine(**{**defaults, **settings}))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()
    if request.node.get_closest_marker("unaudited") is None:
        for engine in opened:
            assert_clean(engine.config.log_file)


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
