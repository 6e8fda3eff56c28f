"""What the engine's tests share: engines whose logs are audited, LoRAs, and owners of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Engine

from ..logbook.audited import assert_clean  # noqa: TID252 - tests are no installed package
from .engines import write_lora
from .workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .lora_graphs import Shapes


@pytest.fixture
def open_engine(
    request: pytest.FixtureRequest, tiny_ir: Path, tiny_cache: Path, tmp_path: Path
) -> Iterator[Callable[..., Engine]]:
    """
    Opens engines on the tiny model; afterwards each log must stand the audit.

    A test that breaks the rules on purpose carries ``@pytest.mark.unaudited(reason)``.
    """
    opened: list[Engine] = []

    def open_one(**settings: Any) -> Engine:
        log = tmp_path / f"engine-{len(opened)}.jsonl"
        defaults = {"model": tiny_ir, "cache_dir": tiny_cache, "log_file": log}
        opened.append(Engine(**{**defaults, **settings}))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()
    if request.node.get_closest_marker("unaudited") is None:
        for engine in opened:
            assert_clean(engine.config.log_file)


@pytest.fixture
def benches() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.gate.set()
        assert bench.owner.close(timeout=PATIENCE)


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches()


@pytest.fixture(scope="session")
def settings(tiny_ir: Path, tiny_cache: Path) -> dict[str, Any]:
    """Settings of engines on the tiny model, all with one cache."""
    return {"model": str(tiny_ir), "precision": "f32", "cache_dir": tiny_cache}


@pytest.fixture(scope="session")
def ink(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny model's UNet."""
    return write_lora(tiny_ir, tmp_path_factory.mktemp("ink") / "ink.safetensors")


@pytest.fixture(scope="session")
def chalk(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny model's UNet and text encoder."""
    everything = {"unet": lambda _: True, "text_encoder": lambda _: True}
    path = tmp_path_factory.mktemp("chalk") / "chalk.safetensors"
    return write_lora(tiny_ir, path, seed=2, wanted=everything)


@pytest.fixture(scope="session")
def shapes(tiny_ir: Path) -> Shapes:
    """The shape of each weight of the tiny model that a LoRA can change."""
    from holdfast.engine.lora import targets

    from .lora_graphs import read

    return {
        component: {
            module: target.shape
            for module, target in targets(read(tiny_ir, component)).items()
            if not target.obstacle
        }
        for component in ("unet", "text_encoder")
    }
