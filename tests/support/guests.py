"""The process of ``guest.py`` as tests drive it: children that may be killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.results.result import Result

PATIENCE = 600.0


def pixels(result: Result) -> list[str]:
    """Name the exact pixels of a result's images, the first pass's last."""
    images = (*result.images, *result.first_pass)
    return [sha256(image.tobytes()).hexdigest() for image in images]


class Guest:
    """The process of ``guest.py``, and what it says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, on our own script
            [sys.executable, str(Path(__file__).with_name("guest.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.hear("ready")
        self.logs = 0

    def hear(self, word: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert word in line, line
        return json.loads(line)[word]

    def begin(self, model: Path, cache: Path, request: Request) -> tuple[int, Path]:
        """Have a child begin to make an image; return its process and its log."""
        self.logs += 1
        log = self._folder / f"{self._process.pid}-{self.logs}.jsonl"
        order = {
            "model": str(model),
            "cache": str(cache),
            "log": str(log),
            "request": request.to_json(),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self.hear("begun"), log

    def finish(self) -> list[str]:
        """Let the child end its work; return the pixels that it made."""
        made: list[str] = self.hear("pixels")
        assert self.hear("ended") == 0
        return made

    def kill(self, child: int) -> bool:
        """End the child where it stands; return whether it had not ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert self._process.stdout is not None
        while "ended" not in (line := self._process.stdout.readline()):
            assert "pixels" in line
        code = json.loads(line)["ended"]
        assert code in (0, -signal.SIGKILL)
        return bool(code)

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)
