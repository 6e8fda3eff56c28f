"""The processes that are measured, from the outside."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from tests.benchmarks.workload import Answer, Command, Workload

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).parents[2]


def say(line: str) -> None:
    """Tell whoever waits how far it is."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Worker:
    """
    A system in a process of its own.

    Args:
        system: ``module:class``.
        workload: What it will be asked for.
        log: What it prints goes there.
    """

    def __init__(self, system: str, workload: Workload, log: Path) -> None:
        self._began = time.perf_counter()
        self._log = log.open("ab")
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [
                sys.executable,
                "-m",
                "tests.benchmarks.worker",
                f"tests.benchmarks.{system}",
                msgspec.json.encode(workload).decode(),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill() if error else self._process.communicate()
        self._process.wait()
        self._log.close()

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._began

    def ask(self, do: str, **arguments: int | str) -> Answer:
        """
        Have something done and wait for it.

        Raises:
            RuntimeError: The process has died; its log tells more.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(Command(do, arguments)) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            msg = f"{self._process.args} died with {self._process.wait()}; see {self._log.name}"
            raise RuntimeError(msg)
        return msgspec.json.decode(line, type=Answer)
