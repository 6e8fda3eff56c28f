"""Models that every test folder may use: built and exported once for each test session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType


def _models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models", Path(__file__).parent / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _models().build_tiny_sd(tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="session")
def tiny_ir(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from holdfast.engine.source import resolve

    return resolve(tiny_sd, tmp_path_factory.mktemp("cache"), lambda *_, **__: None).path
