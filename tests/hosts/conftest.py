"""The host examples of ``docs/embedding``, on a tiny model."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "docs" / "embedding"


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
