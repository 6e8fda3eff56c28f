"""Python programs of a few lines in processes of their own, and what a cache tells its log."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import signal


class Log(list[dict[str, Any]]):
    """Takes the place of an engine's log, and keeps what it is told."""

    def __call__(self, event: str, /, **facts: Any) -> None:
        self.append({"event": event, **facts})

    @property
    def names(self) -> list[str]:
        """Names of the events, in order."""
        return [entry["event"] for entry in self]


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that can be talked to."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(  # noqa: S603 - this interpreter
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


def wait_for_line(child: subprocess.Popen[str]) -> str:
    """Wait until it prints a line, and return that."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def finish(child: subprocess.Popen[str], sign: signal.Signals | None = None) -> int:
    """Wait for its end, after a signal or the end of its input, and return its exit code."""
    if sign is not None:
        child.send_signal(sign)
    child.communicate()
    return child.returncode
