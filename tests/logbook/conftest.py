"""Logs to read: written by the real emitter and the real lifecycle, doctored by the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from holdfast.engine.logbook.write import JsonLines

from . import acting

if TYPE_CHECKING:
    from pathlib import Path


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
