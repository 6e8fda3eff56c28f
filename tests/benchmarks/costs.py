"""What Holdfast's own work costs: switches, plans, logs, second runs, batches."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tests.benchmarks.systems import Holdfast
from tests.benchmarks.worker import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.benchmarks.workload import Workload

SWITCHES = 20
IMPORTS = 7
ROUNDS = 3


class Costs(Holdfast):
    """One engine with a log that is read again."""

    settings: ClassVar[dict[str, Any]] = {"shapes": "dynamic"}

    def __init__(self, workload: Workload) -> None:
        self.log = Path(workload.cache).parent / f"{type(self).__name__}.jsonl"
        self.log.unlink(missing_ok=True)
        super().__init__(workload)

    def second(self) -> dict[str, float]:
        """Count what a second hires run of the same sizes compiles."""
        self.engine.run(self.request("a tree", 1))
        before = self.compiled()
        self.engine.run(self.request("a house", 2))
        return {"compiled": len(self.compiled()) - len(before)}

    def switches(self) -> dict[str, float]:
        """Time the switch between modes with all components held."""
        self.engine.switch("txt2img")
        before, milliseconds = self.compiled(), []
        for _ in range(SWITCHES // 2):
            for mode in ("img2img", "txt2img"):
                began = time.perf_counter()
                self.engine.switch(mode)
                milliseconds.append((time.perf_counter() - began) * 1e3)
        return {
            "milliseconds": statistics.median(milliseconds),
            "compiled": len(self.compiled()) - len(before),
        }

    def bookkeeping(self) -> dict[str, float]:
        """Time all that lifecycle, plan and log do within one request of 30 steps."""
        return _bookkeeping(self.engine)

    def batch(self) -> dict[str, float]:
        """Hold a batch of 4 against 4 single runs."""
        from holdfast.engine.requests.txt2img import Txt2Img

        side = self.workload.side
        one = Txt2Img(prompt="a tree", seed=1, width=side, height=side, steps=4)
        taken: dict[str, list[float]] = {"single": [], "batch": []}
        for _ in range(ROUNDS):
            for name, requests in (
                ("single", [one.but(seed=seed) for seed in range(1, 5)]),
                ("batch", [one.but(batch=4)]),
            ):
                cpu = cpu_seconds()
                for request in requests:
                    self.engine.run(request)
                taken[name].append(cpu_seconds() - cpu)
        single, batch = (statistics.median(taken[name]) for name in ("single", "batch"))
        return {"single_cpu": single, "batch_cpu": batch, "throughput": single / batch}

    def compiled(self) -> list[dict[str, Any]]:
        """Return every compile so far, as the log tells it."""
        events = map(json.loads, self.log.read_text().splitlines())
        return [event for event in events if event["event"] == "component.compile.completed"]


class StaticCosts(Costs):
    """The same with a graph for each size."""

    settings: ClassVar = {"shapes": "static"}


class Silent(Holdfast):
    """One engine whose events nobody receives, as it is by default."""

    def bookkeeping(self) -> dict[str, float]:
        """Time the same as `Costs.bookkeeping`."""
        return _bookkeeping(self.engine)


def _bookkeeping(engine: Any) -> dict[str, float]:
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.pipeline import CompiledPipeline
    from holdfast.engine.requests.hires import Hires
    from holdfast.states import Lifecycle

    request = Hires(prompt="a tree", seed=1, width=64, height=64, steps=20, hires_steps=10)
    engine.run(request)
    clock = _Clock()
    with (
        clock.watching(Emitter, "__call__"),
        clock.watching(Lifecycle, "fire"),
        clock.watching(CompiledPipeline, "plan"),
        clock.watching(CompiledPipeline, "compare"),
    ):
        engine.run(request)
    return {"milliseconds": clock.seconds * 1e3}


class _Clock:
    """Adds up the CPU time inside the functions that it watches, each moment once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextlib.contextmanager
    def watching(self, owner: type, name: str) -> Iterator[None]:
        """Watch one method while the block runs."""
        plain: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(plain)
        def watched(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.thread_time()
            try:
                return plain(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - began

        setattr(owner, name, watched)
        try:
            yield
        finally:
            setattr(owner, name, plain)


def import_seconds() -> float:
    """Return the CPU seconds that ``import holdfast.engine.engine`` adds to a bare interpreter."""

    def run(code: str) -> float:
        before = cpu_seconds()
        subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - our interpreter
        return cpu_seconds() - before

    with_it = [run("import holdfast.engine.engine") for _ in range(IMPORTS)]
    return statistics.median(with_it) - statistics.median(run("pass") for _ in range(IMPORTS))
