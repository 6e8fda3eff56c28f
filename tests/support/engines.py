"""Engines on the tiny model for tests of what they compile, and their logs."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest

from holdfast.engine import Engine
from holdfast.engine.lora import targets
from tests.support import lora_data
from tests.support.audited import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from holdfast.engine.compiling.compiler import Compiler
    from holdfast.engine.pipeline import CompiledPipeline
    from holdfast.engine.results.result import Result

PROMPT = "a large red circle on a blue background"
CAPABILITIES = frozenset(ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
NEEDS_BF16 = pytest.mark.skipif(
    "BF16" not in CAPABILITIES, reason="this CPU does not compute in bf16"
)
PRECISIONS = [pytest.param("f32"), pytest.param("bf16", marks=NEEDS_BF16)]


@contextlib.contextmanager
def opened(settings: Mapping[str, Any], log: Path) -> Iterator[Engine]:
    """Open an engine; when it is closed again, its log breaks no rule and no plan was missed."""
    engine = Engine(**settings, log_file=log / f"{uuid.uuid4().hex}.jsonl")
    try:
        yield engine
    finally:
        assert engine.close(timeout=120)
    path = engine.config.log_file
    assert path is not None
    assert_clean(path)


@dataclass(frozen=True)
class Record:
    """What an engine has logged since the record began."""

    path: Path
    start: int

    def events(self, *names: str) -> list[dict[str, Any]]:
        lines = self.path.read_bytes()[self.start :].splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if not names or event["event"] in names]

    @property
    def compiled(self) -> list[str]:
        """Names of the components that were compiled, in order."""
        return [event["component"] for event in self.events("component.compile.completed")]

    @property
    def reused(self) -> list[str]:
        """Names of the held components that were put in service again, in order."""
        return [event["component"] for event in self.events("component.reused")]

    @property
    def evicted(self) -> list[str]:
        """Names of the components that were given up, in order."""
        return [event["component"] for event in self.events("component.evicted")]

    @property
    def states(self) -> list[str]:
        """The states gone through, the first one included; empty where there was no move."""
        moves = self.events("state.changed")
        return [moves[0]["source"], *(move["dest"] for move in moves)] if moves else []


def record(engine: Engine) -> Record:
    """Begin to look at what an engine logs."""
    path = engine.config.log_file
    assert path is not None
    return Record(path, path.stat().st_size)


def pixels(result: Result) -> str:
    """Name the exact pixels of a result's images."""
    digest = hashlib.blake2b(digest_size=8)
    for image in result.images:
        digest.update(str(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def pipeline_of(engine: Engine) -> CompiledPipeline:
    return engine._service.pipeline


def compiler_of(engine: Engine) -> Compiler:
    return pipeline_of(engine).store.compiler


def live_components() -> int:
    """Count the compiled models that anything in this process still holds, but for views."""
    import openvino as ov

    gc.collect()
    return sum(type(each) is ov.CompiledModel for each in gc.get_objects())


def write_lora(
    ir: Path,
    path: Path,
    *,
    seed: int = 1,
    strength: float = 1.0,
    wanted: Mapping[str, Callable[[str], bool]] | None = None,
) -> Path:
    """Write a LoRA for a model, by default for every attention layer of its UNet."""
    import openvino as ov

    wanted = wanted or {"unet": lora_data.linear}
    shapes = {
        component: {
            name: each.shape
            for name, each in targets(
                ov.Core().read_model(ir / component / "openvino_model.xml")
            ).items()
            if not each.obstacle
        }
        for component in wanted
    }
    deltas = lora_data.make(shapes, wanted, seed=seed, strength=strength)
    return lora_data.write_kohya(path, deltas)


def change_weights(graph: Path) -> None:
    """Scale the largest weight of a graph on disk: the same graph with another fingerprint."""
    found = re.findall(r'element_type="f32"[^>]*? offset="(\d+)" size="(\d+)"', graph.read_text())
    offset, size = max(
        ((int(start), int(count)) for start, count in found), key=lambda each: each[1]
    )
    weights = np.memmap(graph.with_suffix(".bin"), np.float32, "r+", offset, (size // 4,))
    weights *= 0.9
    weights.flush()
