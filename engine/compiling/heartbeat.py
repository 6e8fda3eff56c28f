"""A sign of life every second while one native call says nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from holdfast.engine.compiling.memory import beside, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.engine.logbook.events import Emitter

INTERVAL = 1.0
"""Seconds from one sign of life to the next."""

SLOW_FACTOR = 3.0
SLOW_MARGIN = 5.0
"""A compile is slow that takes over `SLOW_FACTOR` times what it ever took, plus so many seconds."""


@contextlib.contextmanager
def heartbeat(
    emit: Emitter, *, component: str, key: str, expected_seconds: float | None
) -> Iterator[None]:
    """
    Emit ``compile.heartbeat`` every second inside, and ``compile.slow`` once if it takes too long.

    Args:
        emit: Called in a thread of the heartbeat's own, in the scope that holds here.
        component: What is being compiled.
        key: Digest of its key.
        expected_seconds: As learned from earlier compiles; None or 0 where there were none.
    """
    began = time.monotonic()
    over = threading.Event()

    def beat() -> None:
        warned = not expected_seconds
        while not over.wait(INTERVAL):
            seconds = round(time.monotonic() - began, 3)
            what: dict[str, Any] = {
                "component": component,
                "key": key,
                "elapsed_seconds": seconds,
                "expected_seconds": expected_seconds,
            }
            emit("compile.heartbeat", **what, rss_bytes=resident_bytes())
            if not warned and seconds > (expected_seconds or 0) * SLOW_FACTOR + SLOW_MARGIN:
                emit("compile.slow", **what)
                warned = True

    context = copy_context()
    with beside(lambda: context.run(beat), f"holdfast-heartbeat-{component}", over):
        yield
