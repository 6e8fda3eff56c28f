"""From whatever was raised inside to the error that a host gets, with what serves now."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING

from holdfast.engine.errors import CompileError, GenerationError, HoldfastError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from holdfast.engine.keys import ComponentKey
    from holdfast.engine.plan import Move


def generation_errors(doing: str) -> AbstractContextManager[None]:
    """Turn what diffusers, optimum or OpenVINO raise inside into a `GenerationError`."""

    def told(error: Exception) -> GenerationError:
        return GenerationError(
            f"The pipeline failed while it was to {doing}: {type(error).__name__}: "
            f"{str(error).strip()[:300]}. The components stay in service; the engine can be used "
            "on. Try a smaller size, or see `holdfast doctor`."
        )

    return _turned(told)


def compile_errors(key: ComponentKey) -> AbstractContextManager[None]:
    """Turn whatever is raised inside into a `CompileError` that names component, key and cause."""

    def told(error: Exception) -> CompileError:
        msg = (
            f"{key.component} (key {key.digest}) was to be put in service on {key.device}, but "
            f"that failed: {last_line(error)}."
        )
        return CompileError(msg, component=key.component, key=key.digest)

    return _turned(told)


@contextlib.contextmanager
def _turned(told: Callable[[Exception], HoldfastError]) -> Iterator[None]:
    """Raise what `told` makes of an error; one of Holdfast's own goes on as it is."""
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        raise told(error) from error


def last_line(error: Exception) -> str:
    """Return what OpenVINO has to say; the lines before it name its source files."""
    text = str(error).strip()
    return text.splitlines()[-1].rstrip(".") if text else type(error).__name__


def named(error: BaseException) -> str:
    """Return the class and the text of an error."""
    return f"{type(error).__name__}: {error}"


def move_error(error: BaseException, move: Move, *, given_up: bool) -> BaseException:
    """Return a failed move's error as the host gets it: it says what is in service."""
    ours = isinstance(error, HoldfastError) and not isinstance(error, CompileError)
    if ours or not isinstance(error, Exception):
        return error
    if move.action == "load":
        now = "Nothing is in service; load again once the cause is gone."
    elif given_up:
        now = (
            "What served before had been given up, was compiled again and is in service. Change "
            "the setting back, or see `holdfast doctor`."
        )
    else:
        now = "What served before still does. Change the setting back, or see `holdfast doctor`."
    component, key = blamed(error, move)
    text = str(error) if isinstance(error, CompileError) else f"{named(error)}."
    return CompileError(f"{text} {now}", component=component, key=key)


def blamed(error: BaseException, move: Move) -> tuple[str, str]:
    """Return the component and key that an error names, or else those that were being made."""
    if isinstance(error, CompileError):
        return error.component, error.key
    made = [step for step in move.steps if step.action == "compile"] or move.steps
    return ", ".join(step.subject for step in made), ", ".join(step.key for step in made)


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
