"""
Slow, large and loud work in a process of its own.

There it holds no lock of the host's interpreter, and prints and warns where nobody sees it. Its
memory comes back whole, and its crash is an error with a text.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, TypeVar

import msgspec

from holdfast.engine.jobs.job import breakable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_SILENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_UNWRITTEN = ("iostream error", "No space left", "File too large", "Disk quota exceeded")
_T = TypeVar("_T", bound=msgspec.Struct)


class Progress(msgspec.Struct, frozen=True, tag=True):
    """
    How far the child is.

    Attributes:
        phase: What it does.
        done: Of `total` in this phase.
        total: At least 1.
    """

    phase: str
    done: int
    total: int


class Failure(msgspec.Struct, frozen=True, tag=True):
    """
    What was raised in the child.

    Attributes:
        kind: Name of the error's class.
        text: Its message.
    """

    kind: str
    text: str


class ChildError(Exception):
    """
    The child did not finish; the text says how it ended, and of what.

    Attributes:
        failure: What was raised in it; None where it was stopped, or died without a word.
        frozen: There is no Python interpreter to start it with: the application is frozen.
    """

    def __init__(
        self, message: str, *, failure: Failure | None = None, frozen: bool = False
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.frozen = frozen

    @property
    def lacked_memory(self) -> bool:
        """Whether it was stopped, or failed, for want of memory, as far as can be told."""
        if self.failure is None:
            return not self.frozen
        text = self.failure.text.lower()
        return self.failure.kind == "MemoryError" or "can't allocate memory" in text


def run_child(
    module: str,
    order: msgspec.Struct,
    target: Path,
    *,
    offline: bool,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """
    Run a module as a program, and wait for it. It ends with this process, however that ends, and
    with the job that it is run for, where that is asked to stop.

    Args:
        module: Its ``__main__`` part calls `receive` first.
        order: What it is to do.
        target: What it is to write, its only argument.
        offline: Keep huggingface_hub from the network.
        on_progress: Called with each `Progress` that it tells.

    Raises:
        ChildError: It failed, or could not be started.
        Cancelled: The job that this is done for was asked to stop.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        msg = "a frozen application has no Python interpreter to start"
        raise ChildError(msg, frozen=True)
    environment = {
        **os.environ,
        **_SILENT,
        **(_OFFLINE if offline else {}),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-P", "-m", module, str(target)]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(  # noqa: S603 - our own interpreter, on our own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
        )
        assert child.stdin is not None  # noqa: S101 - tells the type checker what PIPE means
        assert child.stdout is not None  # noqa: S101 - the same
        try:
            with breakable(module.rpartition(".")[2], child.kill):
                # The pipe stays open: its end tells the child that nobody waits any more.
                with contextlib.suppress(BrokenPipeError):  # It has died already and left a text.
                    child.stdin.write(msgspec.json.encode(order) + b"\n")
                    child.stdin.flush()
                failure = None
                for line in child.stdout:
                    told = msgspec.json.decode(line, type=Progress | Failure)
                    if isinstance(told, Failure):
                        failure = told
                    else:
                        on_progress(told)
                if child.wait() != 0:
                    said.seek(0)
                    text = _explain(child.returncode, failure, said.read(), target)
                    raise ChildError(text, failure=failure)
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):  # The order that it died before taking.
                child.stdin.close()
            child.stdout.close()
            child.wait()


def receive(kind: type[_T]) -> tuple[_T, Callable[[Progress], None]]:
    """
    Take the order, in the child.

    Whatever is printed from now on goes to the error stream; standard output is for progress, and
    for the class and message of an error that nothing in the child catches.

    Returns:
        The order, and what tells the parent how far the child is.
    """
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def tell(what: Progress | Failure) -> None:
        channel.write(msgspec.json.encode(what) + b"\n")

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = str(error).encode(errors="replace").decode()
        with contextlib.suppress(BrokenPipeError):  # The parent has gone, and nobody is told.
            tell(Failure(kind.__name__, text))
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = fail
    return order, tell


def _die_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def _explain(code: int, failure: Failure | None, said: bytes, target: Path) -> str:
    if failure is not None:
        text = " ".join(failure.text.split())[:_LONGEST].rstrip(".")
        told = f"failed with {failure.kind}: {text}" if text else f"failed with {failure.kind}"
        unwritten = any(sign in text for sign in _UNWRITTEN)
        return f"{told}. {_room(text, target)}" if unwritten else told
    ended = (
        f"was stopped by signal {-code} (out of memory?)"
        if code < 0
        else f"failed (exit code {code})"
    )
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].rstrip(".") if lines else "nothing"
    return f"{ended}. It said last: {last}. {_room(last, target)}"


def _room(last: str, target: Path) -> str:
    """Tell what room there is where the child wrote: what it says of a full disk is a riddle."""
    free = shutil.disk_usage(target).free
    told = f"{free / 2**20:.0f} MiB are free on the disk of {target.parent}"
    if any(sign in last for sign in _UNWRITTEN):
        return (
            f"That means that a file could not be written, for want of space or by a limit: {told}"
        )
    return f"Of disk space, {told}"


_LONGEST = 600
"""Characters of a message that are told; some list every weight of a model."""
