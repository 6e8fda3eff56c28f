"""A bar over the whole of a request, both passes of it, where standard error is a terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from holdfast.engine.subscribers import CompileHeartbeat

if TYPE_CHECKING:
    from holdfast.engine.engine import Engine
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.jobs.progress import Progress as Place

T = TypeVar("T")
_REFRESH_SECONDS = 0.1


def wait(engine: Engine, job: Job[T]) -> T:
    """
    Wait for a job's result, and show how far it has come.

    An interrupt stops the job, which keeps its first pass.

    Raises:
        KeyboardInterrupt: It was interrupted, and has stopped.
        HoldfastError: What it failed with.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    compiling: dict[str, str] = {}

    def note(beat: CompileHeartbeat) -> None:
        words = f"compiling {beat.component}, {beat.elapsed_seconds:.0f} s"
        compiling[job.progress.phase] = words

    stop_noting = engine.subscribe(note, (CompileHeartbeat,))
    try:
        with bar:
            task = bar.add_task("", total=1.0, left="")
            while not job.done():
                place = job.progress
                words = _words(place, compiling.get(place.phase, ""))
                bar.update(task, completed=place.fraction, description=words, left=_left(place))
                with contextlib.suppress(TimeoutError):
                    job.exception(_REFRESH_SECONDS)
    except KeyboardInterrupt:
        job.cancel(keep="first_pass")
        if job.exception() is not None:
            raise
    finally:
        stop_noting()
    return job.result()


def _words(place: Place, compiling: str) -> str:
    if place.step is not None:
        return f"{place.phase}, step {place.step} of {place.steps}"
    if place.phase in ("queued", "find model"):
        return "finding the model; the first time it is exported"
    words = place.phase.replace("prepare", "preparing pass").replace("import ", "importing ")
    return compiling or words


def _left(place: Place) -> str:
    seconds = place.remaining_seconds
    return "" if seconds is None else f"about {seconds:.0f} s left"
