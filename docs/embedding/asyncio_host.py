"""
Several requests of one asyncio program, with a deadline, progress, and cancelling.

Nothing here blocks the loop: the engine has a thread of its own, and a job is awaited like a task.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from holdfast.engine import Cancelled, Engine, Hires, Result, Txt2Img

if TYPE_CHECKING:
    from collections.abc import Callable

    from holdfast.engine import Job

PROMPT = "a large red circle on a blue background"


async def watch(job: Job[Result], tell: Callable[[float], object]) -> None:
    """Tell how far a job has come, five times a second, until it ends."""
    while not job.done():
        tell(job.progress.fraction)
        await asyncio.sleep(0.2)
    tell(job.progress.fraction)


async def gallery(engine: Engine, tell: Callable[[float], object] = print) -> list[Result]:
    """Make three images; the engine takes the urgent one first."""
    jobs = [
        engine.submit(Txt2Img(prompt=PROMPT, seed=1)),
        engine.submit(Hires(prompt=PROMPT, seed=2)),
        engine.submit(Txt2Img(prompt=PROMPT, seed=3), priority=1),
    ]
    watching = asyncio.create_task(watch(jobs[1], tell))
    results = await asyncio.gather(*jobs)
    await watching
    return results


async def impatient(engine: Engine, seconds: float) -> Result | Cancelled:
    """Stop a request that takes longer than this, waiting in the queue included."""
    try:
        return await engine.submit(Hires(prompt=PROMPT, steps=50), deadline=seconds)
    except Cancelled as error:
        return error


async def visitor(engine: Engine) -> Result:
    """Stop working for a visitor who leaves: cancelling this task cancels the job."""
    return await engine.submit(Hires(prompt=PROMPT, steps=50)).bound()


async def main() -> None:
    """Show all three."""
    with Engine("demo") as engine:
        for result in await gallery(engine):
            print(result.infotexts[0])
        print(await impatient(engine, 0.5))
        task = asyncio.create_task(visitor(engine))
        await asyncio.sleep(1)
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
