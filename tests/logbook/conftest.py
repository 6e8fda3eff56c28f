"""Logs of real engines with a tiny model: sound ones, from which the tests make the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import CompileError, Engine, Hires, Lora
from holdfast.engine.lora import targets
from tests.engine import lora_data

from .audited import events_of

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = Hires(
    prompt="a red circle", width=64, height=64, steps=4, hires_steps=3, seed=7, scheduler="euler"
)


@pytest.fixture(scope="session")
def settings(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": str(tiny_ir),
        "precision": "f32",
        "cache_dir": tmp_path_factory.mktemp("engine-cache"),
    }


@pytest.fixture(scope="session")
def hires_log(
    settings: dict[str, Any], tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A hires request on a new engine, one whose second pass has its own LoRA, and one without."""
    folder = tmp_path_factory.mktemp("hires")
    lora = Lora(_tiny_lora(tiny_ir, folder / "ink.safetensors"), 0.8)
    with Engine(**settings, log_file=folder / "log.jsonl") as engine:
        engine.run(REQUEST)
        engine.run(REQUEST.model_copy(update={"hires_lora": (lora,)}))
        engine.run(REQUEST)
    return folder / "log.jsonl"


def _tiny_lora(ir: Path, path: Path) -> Path:
    import openvino as ov

    unet = ov.Core().read_model(ir / "unet" / "openvino_model.xml")
    layers = {name: each.shape for name, each in targets(unet).items() if not each.obstacle}
    deltas = lora_data.make({"unet": layers}, {"unet": lora_data.linear}, seed=1)
    return lora_data.write_kohya(path, deltas)


@pytest.fixture(scope="session")
def rolled_back_log(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recompile in which OpenVINO refuses the UNet, and a request after it."""
    path = tmp_path_factory.mktemp("rolled-back") / "log.jsonl"
    with Engine(**settings, log_file=path) as engine:
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
def crowd_log(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten requests submitted at once."""
    path = tmp_path_factory.mktemp("crowd") / "log.jsonl"
    with Engine(**settings, log_file=path) as engine:
        for job in [engine.submit(REQUEST) for _ in range(10)]:
            job.result()
    return path


@pytest.fixture(scope="session")
def hires_events(hires_log: Path) -> list[dict[str, Any]]:
    return events_of(hires_log)
