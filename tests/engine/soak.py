"""
``python -m tests.engine.soak MODEL CACHE INK CHALK TIMES``: changes in a row, and what they leave.

Prints what the process holds after the tenth change and after the last, in bytes.
"""

from __future__ import annotations

import gc
import random
import sys
from typing import TYPE_CHECKING, Any

from holdfast.engine import Engine, Lora, Txt2Img
from holdfast.engine.compiling.memory import private_bytes
from tests.support.engines import PROMPT, live_components

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST = Txt2Img(prompt=PROMPT, width=64, height=64, steps=1, seed=7)


def settled(engine: Engine) -> int:
    """Measure a fresh load, whatever was held otherwise."""
    engine.configure(lora=(), precision="f32", shapes="dynamic")
    engine.unload()
    engine.run(REQUEST)
    gc.collect()
    return private_bytes()


def main(model: str, cache: str, ink: str, chalk: str, times: str) -> None:
    """
    Change so many times, and run.

    The first ten changes are one of each kind, as OpenVINO keeps something of every kind of graph
    that it has met for as long as the process lives; the rest come at random.
    """
    chance = random.Random(0)  # noqa: S311 - not for secrets
    loras = [Lora(path, weight) for path in (ink, chalk) for weight in (0.25, 0.5, 1.0, -0.5)]
    choices: dict[str, Callable[[], Any]] = {
        "lora": lambda: (chance.choice(loras),),
        "precision": lambda: chance.choice(["f32", "auto"]),
        "shapes": lambda: chance.choice(["static", "dynamic"]),
        "policy": lambda: chance.choice(["stage_first", "evict_first", "auto"]),
        "scheduler": lambda: chance.choice(["euler", "ddim"]),
    }
    kinds: list[dict[str, Any]] = [
        {"shapes": "static"}, {"lora": (Lora(chalk),)}, {"precision": "auto"},
        {"shapes": "dynamic"}, {"lora": (Lora(ink),)}, {"policy": "evict_first"},
        {"precision": "f32"}, {"shapes": "static"}, {"scheduler": "ddim"}, {"lora": ()},
    ]  # fmt: skip
    with Engine(model, cache_dir=cache, precision="f32", memory_budget="120MiB") as engine:
        engine.run(REQUEST)
        for change in kinds:
            engine.configure(**change)
            for width in (64, 96):
                engine.run(REQUEST.but(width=width))
        early = settled(engine)
        for count in range(11, int(times) + 1):
            field = chance.choice(sorted(choices))
            engine.configure(**{field: choices[field]()})
            if count % 10 == 0:
                engine.run(REQUEST.but(width=chance.choice([64, 96])))
                assert live_components() == len(engine.snapshot().held)
        sys.stdout.write(f"{early} {settled(engine)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
