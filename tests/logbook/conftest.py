"""Logs to read: written by the real emitter and the real lifecycle, doctored by the tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdfast.engine.logbook.write import JsonLines

if TYPE_CHECKING:
    from types import ModuleType


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


acting = _sibling("acting")


@pytest.fixture(scope="session")
def hires_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "hires.jsonl"
    with JsonLines(path) as sink:
        acting.hires_with_lora(acting.Actor(sink))
    return path


@pytest.fixture(scope="session")
def rolled_back_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "rolled-back.jsonl"
    with JsonLines(path) as sink:
        acting.failed_recompile(acting.Actor(sink))
    return path


@pytest.fixture(scope="session")
def crowd_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "crowd.jsonl"
    with JsonLines(path) as sink:
        acting.ten_at_once(acting.Actor(sink))
    return path
