"""
A plain script: both passes, progress on one line, and Ctrl-C keeps what is there.

Run it with `python script.py "a large red circle on a blue background" out.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.engine import Cancelled, Engine, Hires, Progress


def make(engine: Engine, prompt: str, target: Path) -> bool:
    """Write the image to `target`; return whether both passes were run."""
    job = engine.submit(Hires(prompt=prompt, seed=7, scale=2.0))
    try:
        while not job.done():
            show(job.progress)
            try:
                job.result(timeout=0.2)
            except TimeoutError:
                continue
        job.result().save(target)
    except (KeyboardInterrupt, Cancelled):
        job.cancel(keep="first_pass")
        error = job.exception()
        if isinstance(error, Cancelled) and error.first_pass:
            error.first_pass[0].save(target)
        return False
    return True


def show(progress: Progress) -> None:
    """Draw one line that is overwritten by the next."""
    left = progress.remaining_seconds
    remaining = "" if left is None else f", {left:.0f} s to go"
    print(f"\r{progress.fraction:4.0%} {progress.phase}{remaining}   ", end="", flush=True)


if __name__ == "__main__":
    with Engine("demo") as engine:
        make(engine, sys.argv[1], Path(sys.argv[2]))
    print()
