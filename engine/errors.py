"""Every error that reaches a host. Each says what was asked, what is the case, and what to do."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from holdfast.states.errors import HoldfastError, IllegalTransition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

__all__ = [
    "Cancelled",
    "CompileError",
    "EngineClosed",
    "GenerationError",
    "HoldfastError",
    "IllegalTransition",
    "InvalidRequest",
    "LoraError",
    "ModelSourceError",
    "QueueFull",
]


class InvalidRequest(HoldfastError, ValueError):  # noqa: N818 - the name is part of the public contract
    """A request or setting cannot be served as asked. Nothing was run and nothing has changed."""


class ModelSourceError(HoldfastError):
    """A model could not be found, read, downloaded or exported."""


class LoraError(ModelSourceError):
    """A LoRA file was refused before anything was compiled."""


class CompileError(HoldfastError):
    """
    A component could not be put in service; the old ones are, unless the text says otherwise.

    Attributes:
        component: Name of the component that failed, for example ``"unet"``.
        key: Digest of its key, as the log shows it.
    """

    def __init__(
        self, message: str, *, component: str, key: str, state_after: str | None = None
    ) -> None:
        super().__init__(message, state_after=state_after)
        self.component = component
        self.key = key


class GenerationError(HoldfastError):
    """A pass failed while it ran. The engine is ready for the next job."""


class Cancelled(HoldfastError):  # noqa: N818 - the name is part of the public contract
    """
    A job was stopped because its holder asked for it, its deadline passed, or the engine closed.

    Attributes:
        phase: What was going on when the request to stop was noticed, for example ``"step"``.
        seconds_to_stop: Time from the request to stop until it was noticed.
        first_pass: Images of the first pass, if they were to be kept and it was complete.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        seconds_to_stop: float,
        first_pass: Sequence[Image] = (),
        state_after: str | None = None,
    ) -> None:
        super().__init__(message, state_after=state_after)
        self.phase = phase
        self.seconds_to_stop = seconds_to_stop
        self.first_pass = tuple(first_pass)


class QueueFull(HoldfastError):  # noqa: N818 - the name is part of the public contract
    """The engine's queue is full. Wait until a job ends, or cancel one."""


class EngineClosed(HoldfastError):  # noqa: N818 - the name is part of the public contract
    """The engine was closed. Open another one."""


def let_go(error: BaseException) -> None:
    """Empty the frames behind an error: they would keep compiled models alive with it."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            pending += (one.__cause__, one.__context__)
