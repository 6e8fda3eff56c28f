"""
A process that exports one model after another, as the engine's own does with one.

The libraries take longer to load than a tiny model to convert, so many models share one loading.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec
import pytest

from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models import export as exporting
from holdfast.engine.models import source
from holdfast.engine.models.export import Order  # noqa: TC001 - msgspec looks it up
from tests.conftest import ignore

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.engine.models.child_process import Progress


class Task(msgspec.Struct, frozen=True):
    """An order, and the folder to write it into."""

    order: Order
    target: str


class Exporter:
    """The process, as the parent has it; it ends where its input does."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.exporter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()

    def resolve(self, folder: Path, cache: Path) -> None:
        """Put a model's export into a cache, where an engine finds it."""
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(source, "export", self._export)
            source.resolve(folder, cache, ignore)

    def _export(self, order: Order, target: Path, _: Callable[[Progress], None]) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(msgspec.json.encode(Task(order, str(target))) + b"\n")
        self._child.stdin.flush()
        assert self._child.stdout.readline() == b"written\n"


def _main() -> None:
    heavy()
    with quiet():
        exporting._refuse_gaps()
        for line in sys.stdin.buffer:
            task = msgspec.json.decode(line, type=Task)
            exporting._write(task.order, Path(task.target), ignore_progress)
            sys.stdout.buffer.write(b"written\n")
            sys.stdout.buffer.flush()


def ignore_progress(_: Progress) -> None:
    """Nobody waits for it."""


if __name__ == "__main__":
    _main()
