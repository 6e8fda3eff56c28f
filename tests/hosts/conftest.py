"""The host examples of ``docs/embedding``, on a tiny model."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Engine
from holdfast.engine.jobs.job import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "docs" / "embedding"
PATIENCE = 600.0


class Halt:
    """
    Holds every job after five steps of each pass, until the test has seen it or it is to stop.

    Else a fast machine is through before a host has looked once.
    """

    def __init__(self) -> None:
        self._seen = {1: threading.Event(), 2: threading.Event()}

    def hold(self, job: Job[Any], pass_number: int | None, step: int | None) -> None:
        if pass_number is None or step != 5:
            return
        while job.status != "cancelling" and not self._seen[pass_number].wait(0.01):
            pass

    def go_on(self, pass_number: int) -> None:
        """Let jobs run through a pass from now on."""
        self._seen[pass_number].set()


@pytest.fixture
def halt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Halt]:
    """Holds jobs on the way."""
    halt, advance = Halt(), Job.advance

    def advance_and_halt(job: Job[Any], *phase: Any, **facts: Any) -> None:
        advance(job, *phase, **facts)
        halt.hold(job, facts.get("pass_number"), facts.get("step"))

    monkeypatch.setattr(Job, "advance", advance_and_halt)
    yield halt
    for pass_number in (1, 2):
        halt.go_on(pass_number)


@pytest.fixture
def engine(tiny_ir: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine on a tiny model, where the examples open one on the demo model."""
    with Engine(tiny_ir, cache_dir=tmp_path, log_file=tmp_path / "log.jsonl") as engine:
        yield engine


@pytest.fixture
def example() -> Callable[..., ModuleType]:
    """Loads an example by its name; skips where a package that it needs is not installed."""

    def load(name: str, *packages: str) -> ModuleType:
        missing = [each for each in packages if importlib.util.find_spec(each) is None]
        if missing:
            absent(f"{', '.join(missing)} not installed: pip install 'holdfast[hosts]'")
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # FastAPI looks the annotations of its functions up there.
        spec.loader.exec_module(module)
        return module

    return load


def absent(what: str) -> None:
    """Skip a test that cannot run here; where everything must be there, fail it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)
