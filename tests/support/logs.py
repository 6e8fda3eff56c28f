"""Logs of real engines with a tiny model: sound ones, from which the tests make the others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import (
    Cancelled,
    CompileError,
    Detail,
    Engine,
    EngineClosed,
    Hires,
    IllegalTransition,
    Inpaint,
    InvalidRequest,
    Lora,
    LoraError,
    QueueFull,
)
from holdfast.engine.demo import style_lora
from holdfast.engine.lora import targets
from tests.support import lora_data
from tests.support.audited import events_of

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = Hires(
    prompt="a red circle", width=64, height=64, steps=4, hires_steps=3, seed=7, scheduler="euler"
)

STRANGERS = Hires(
    prompt="a large red circle on a blue background", steps=4, hires_steps=3, seed=7, scale=1.5
)


@pytest.fixture(scope="session")
def log_settings(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": str(tiny_ir),
        "precision": "f32",
        "cache_dir": tmp_path_factory.mktemp("engine-cache"),
    }


@pytest.fixture(scope="session")
def hires_log(
    log_settings: dict[str, Any], tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A hires request on a new engine, one whose second pass has its own LoRA, and one without."""
    folder = tmp_path_factory.mktemp("hires")
    lora = Lora(_tiny_lora(tiny_ir, folder / "ink.safetensors"), 0.8)
    with Engine(**log_settings, log_file=folder / "log.jsonl") as engine:
        engine.run(REQUEST)
        engine.run(REQUEST.model_copy(update={"hires_lora": (lora,)}))
        engine.run(REQUEST)
    return folder / "log.jsonl"


@pytest.fixture(scope="session")
def detail_log(log_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hires request with three regions redrawn after it, and an inpaint."""
    path = tmp_path_factory.mktemp("detail") / "log.jsonl"
    boxes = ((0, 0, 40, 40), (60, 10, 100, 60), (20, 70, 90, 120))
    with Engine(**log_settings, log_file=path) as engine:
        result = engine.run(REQUEST.but(detail=Detail(boxes=boxes, prompt="a star", steps=1)))
        mask = Image.new("L", result.images[0].size)
        mask.paste(255, boxes[0])
        engine.run(Inpaint(image=result.images[0], mask=mask, steps=1, seed=7))
    return path


def _tiny_lora(ir: Path, path: Path) -> Path:
    import openvino as ov

    unet = ov.Core().read_model(ir / "unet" / "openvino_model.xml")
    layers = {name: each.shape for name, each in targets(unet).items() if not each.obstacle}
    deltas = lora_data.make({"unet": layers}, {"unet": lora_data.linear}, seed=1)
    return lora_data.write_kohya(path, deltas)


@pytest.fixture(scope="session")
def rolled_back_log(log_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recompile in which OpenVINO refuses the UNet, and a request after it."""
    path = tmp_path_factory.mktemp("rolled-back") / "log.jsonl"
    with Engine(**log_settings, log_file=path) as engine:
        engine.load()
        store = engine._service.pipeline.store
        core = store.compiler.core
        store.compiler.core = _OutOfMemory()
        with pytest.raises(CompileError):
            engine.recompile()
        store.compiler.core = core
        engine.run(REQUEST)
    return path


class _OutOfMemory:
    def compile_model(self, *_: object) -> None:
        msg = "asked for 12 GiB, of which there are 3"
        raise MemoryError(msg)


@pytest.fixture(scope="session")
def stranger_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    What a host did with the demo model that knew little of Holdfast, and took every wrong turn.

    A load twice, a hires, a LoRA, a damaged LoRA, a budget too small, a cancel in the queue and one
    at work, a deadline, a full queue, a mode and a setting that do not exist, and a closed engine.
    """
    folder = tmp_path_factory.mktemp("stranger")
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(style_lora().read_bytes()[:1000])
    log, cache = folder / "log.jsonl", folder / "cache"
    engine = Engine(cache_dir=cache, precision="f32", queue_limit=1, log_file=log)
    engine.load()
    with pytest.raises(IllegalTransition):
        engine.load()
    engine.run(STRANGERS)
    engine.configure(lora=(Lora(style_lora(), 0.8),))
    with pytest.raises(LoraError):
        engine.configure(lora=(Lora(damaged),))
    with pytest.raises(InvalidRequest):
        engine.configure(memory_budget="1MiB")
    with pytest.raises(InvalidRequest):
        engine.switch("inpainting")
    with pytest.raises(InvalidRequest):
        engine.configure(steps=3)
    running = engine.submit(STRANGERS.but(steps=400))
    while running.progress.step is None:
        time.sleep(0.01)
    waiting = engine.submit(STRANGERS)
    with pytest.raises(QueueFull):
        engine.run(STRANGERS)
    waiting.cancel()
    running.cancel()
    late = engine.submit(STRANGERS.but(steps=900), deadline=1.0)
    for job in (running, waiting, late):
        with pytest.raises(Cancelled):
            job.result()
    engine.unload()
    with pytest.raises(IllegalTransition):
        engine.recompile()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.run(STRANGERS)
    return log


@pytest.fixture(scope="session")
def crowd_log(log_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten requests submitted at once."""
    path = tmp_path_factory.mktemp("crowd") / "log.jsonl"
    with Engine(**log_settings, log_file=path) as engine:
        for job in [engine.submit(REQUEST) for _ in range(10)]:
            job.result()
    return path


@pytest.fixture(scope="session")
def hires_events(hires_log: Path) -> list[dict[str, Any]]:
    return events_of(hires_log)
