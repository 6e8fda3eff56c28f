"""A large image whose whole decode the memory budget cannot hold: the VAE of SD 1.5, in tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.worker import peak_bytes

if TYPE_CHECKING:
    from tests.benchmarks.workload import Workload

BUDGET = 2**32
SIDE = 1024


class Tiles:
    """One engine with a tiny denoiser: what takes time and memory is the VAE."""

    def __init__(self, workload: Workload) -> None:
        from holdfast.engine.engine import Engine

        self.log = Path(workload.cache).parent / "Tiles.jsonl"
        self.log.unlink(missing_ok=True)
        self.engine = Engine(
            workload.model,
            vae=workload.vae,
            memory_budget=BUDGET,
            cache_dir=Path(workload.cache),
            log_file=self.log,
        )

    def hires(self) -> dict[str, float]:
        """Make an image of twice `SIDE`, and tell what the VAE took for it."""
        from holdfast.engine.requests.hires import Hires

        request = Hires(
            prompt="a tree", seed=1, width=SIDE, height=SIDE, scale=2.0, upscaler="lanczos",
            steps=1, hires_steps=1, strength=0.5, guidance=1.0,
        )  # fmt: skip
        result = self.engine.run(request)
        events = [json.loads(line) for line in self.log.read_text().splitlines()]
        first, last = [event for event in events if event["event"] == "decode.completed"]
        (encode,) = [event for event in events if event["event"] == "encode.completed"]
        return {
            "budget": BUDGET,
            "peak": peak_bytes(),
            "first_decode": first["seconds"],
            "encode": encode["seconds"],
            "decode": last["seconds"],
            "tiled": float(encode["tiled"] and last["tiled"]),
            "degradations": len(result.degradations),
            "side": result.images[0].width,
        }
