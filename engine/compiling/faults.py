"""From whatever was raised inside to the error that a host gets, with what serves now."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from holdfast.engine.errors import CompileError, GenerationError, HoldfastError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from holdfast.engine.compiling.keys import ComponentKey
    from holdfast.engine.compiling.plan import Move


def generation_errors(doing: str) -> AbstractContextManager[None]:
    """Turn what diffusers, optimum or OpenVINO raise inside into a `GenerationError`."""

    def told(error: Exception) -> GenerationError:
        return GenerationError(
            f"The pipeline failed while it was to {doing}: {type(error).__name__}: "
            f"{str(error).strip()[:300].rstrip('.')}. The components stay in service, and the "
            f"engine is ready for the next job. {_advice(error)}"
        )

    return _turned(told)


def _advice(error: BaseException) -> str:
    text = str(error).lower()
    memory = isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)
    return "Try a smaller size." if memory else "See `holdfast doctor`, and the log for the cause."


_OUT_OF_MEMORY = (
    "bad_alloc", "can't allocate memory", "cannot allocate memory", "out of memory",
    "out_of_resources", "out_of_host_memory", "mem_object_allocation_failure",
)  # fmt: skip


def unexpected(error: Exception) -> HoldfastError:
    """Return what a host gets in place of an error that nothing inside has turned."""
    if isinstance(error, MemoryError):
        return HoldfastError("There was not enough memory for it. Ask for less, or free some.")
    return HoldfastError(
        f"An unexpected error: {named(error)[:300]}. Please report "
        "it with the log (`holdfast bundle`)."
    )


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
            "The components from before were released, compiled again, and are in service. Change "
            "the setting back, or see `holdfast doctor`."
        )
    else:
        now = (
            "The components from before are still in service. Change the setting back, or see "
            "`holdfast doctor`."
        )
    component, key = blamed(error, move)
    text = str(error) if isinstance(error, CompileError) else f"{named(error)}."
    return CompileError(f"{text} {now}", component=component, key=key)


def blamed(error: BaseException, move: Move) -> tuple[str, str]:
    """Return the component and key that an error names, or else those that were being made."""
    if isinstance(error, CompileError):
        return error.component, error.key
    made = [step for step in move.steps if step.action == "compile"] or move.steps
    return ", ".join(step.subject for step in made), ", ".join(step.key for step in made)
