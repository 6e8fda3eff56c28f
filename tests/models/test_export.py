from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models import child_process
from holdfast.engine.models.export import Order, export
from holdfast.engine.models.source import resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from holdfast.engine import Engine
    from holdfast.engine.models.child_process import Progress

LATENTS = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
TEXT = np.random.default_rng(1).standard_normal((2, 77, 32), dtype=np.float32)
EXPORTED = ["export.started", "export.progress", "export.progress", "export.completed"]
RESOLVE = """
import sys
from pathlib import Path
from holdfast.engine.models.source import resolve
def emit(event, **facts):
    print(event, flush=True)
print(resolve(sys.argv[1], Path(sys.argv[2]), emit).fingerprint, flush=True)
"""


class Log(list[dict[str, Any]]):
    def __call__(self, event: str, /, **facts: Any) -> None:
        self.append({"event": event, **facts})

    @property
    def events(self) -> list[str]:
        return [entry["event"] for entry in self]


def process(model: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - this interpreter
        [sys.executable, "-c", RESOLVE, str(model), str(cache)], stdout=subprocess.PIPE, text=True
    )


def constants(ir: Path, component: str) -> list[Any]:
    import openvino

    model = openvino.Core().read_model(ir / component / "openvino_model.xml")
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]


def infer(ir: Path, component: str, *inputs: Any) -> np.ndarray[Any, Any]:
    import openvino

    compiled = openvino.Core().compile_model(
        ir / component / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    result: np.ndarray[Any, Any] = compiled(list(inputs))[0]
    return result


def test_float32_weights_are_exported_to_the_bit(tiny_sd: Path, tiny_ir: Path):
    """Every weight of a float32 UNet stands in the IR as it was, and none in a lesser type."""
    heavy()
    from safetensors.numpy import load_file

    nodes = constants(tiny_ir, "unet")
    assert not [node for node in nodes if node.get_element_type().get_type_name() == "f16"]
    exported = {node.get_friendly_name(): node for node in nodes}
    weights = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    compared = 0
    for name, weight in weights.items():
        node = exported.get(f"self.{name}")
        if node is not None and node.data.shape == weight.shape:
            assert np.array_equal(node.data, weight), name
            compared += 1
    assert compared > len(weights) / 3


def test_the_export_computes_what_the_source_does(tiny_sd: Path, tiny_ir: Path):
    """UNet and VAE decoder at f32 agree with PyTorch on the same weights."""
    heavy()
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with quiet(), torch.no_grad():
        unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").eval()
        vae = AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae").eval()
        noise = unet(torch.tensor(LATENTS), torch.tensor(500), torch.tensor(TEXT)).sample.numpy()
        pixels = vae.decode(torch.tensor(LATENTS)).sample.numpy()
    assert np.abs(infer(tiny_ir, "unet", LATENTS, np.int64(500), TEXT) - noise).max() < 1e-4
    assert np.abs(infer(tiny_ir, "vae_decoder", LATENTS) - pixels).max() < 1e-4


def test_float16_weights_stay_float16(models: ModuleType, tmp_path: Path, tiny_ir: Path):
    """A source stored in float16 gives float16 constants, with the values that were stored."""
    heavy()
    from safetensors.numpy import load_file

    source = models.build(tmp_path / "half", models.TINY, seed=0, dtype="float16")
    ir = resolve(source, tmp_path / "cache", Log()).path
    name = "down_blocks.0.resnets.0.conv1.weight"
    stored = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")[name]
    (node,) = [n for n in constants(ir, "unet") if n.get_friendly_name().startswith(f"self.{name}")]
    assert node.data.dtype == np.float16
    assert np.array_equal(node.data, stored)
    for component in ("unet", "vae_decoder"):
        half, whole = (
            (folder / component / "openvino_model.bin").stat().st_size for folder in (ir, tiny_ir)
        )
        assert half < 0.55 * whole


@pytest.fixture(scope="module")
def survivors(
    tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[psutil.Process], list[list[str]]]:
    """Kill a process amid its export, then let two export the same at once."""
    cache = tmp_path_factory.mktemp("killed")
    killed = process(tiny_sd, cache)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "export.started\n"
    while not list(cache.glob("exports/*.tmp-*/model_index.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    orphans = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [path.is_dir() for path in cache.glob("exports/*.tmp-*")] == [True]
    two = [process(tiny_sd, cache) for _ in range(2)]
    said = [child.communicate()[0].splitlines() for child in two]
    assert [child.returncode for child in two] == [0, 0]
    return cache, orphans, said


Survivors = tuple["Path", list[psutil.Process], list[list[str]]]


def test_an_exporter_ends_with_its_process(survivors: Survivors):
    """A kill of the process that asked ends the exporter too."""
    _, orphans, _ = survivors
    assert len(orphans) == 1
    assert psutil.wait_procs(orphans, timeout=60)[1] == []


def test_a_killed_export_leaves_nothing(survivors: Survivors):
    """After the next export of the same model nothing half-made is left."""
    cache, _, _ = survivors
    names = sorted(path.name for path in (cache / "exports").iterdir())
    assert [name.removesuffix(".lock") for name in names] == [names[0]] * 2


def test_of_two_processes_one_exports(survivors: Survivors):
    """One of two that ask at once exports, the other waits, and both have the same model."""
    _, _, said = survivors
    alone = ["model.resolved"]
    assert sorted(lines[:-1] for lines in said) == [[*EXPORTED, *alone], alone]
    assert said[0][-1] == said[1][-1]


def test_an_export_after_a_kill_is_whole(survivors: Survivors, tiny_sd: Path, tiny_cache: Path):
    """The export after a killed one has the fingerprint of an undisturbed one."""
    _, _, said = survivors
    assert said[0][-1] == resolve(tiny_sd, tiny_cache, Log()).fingerprint


def test_a_damaged_export_is_made_again(
    tiny_sd: Path, tiny_cache: Path, tiny_ir: Path, tmp_path: Path
):
    """An export in the cache whose weights were cut is discarded, logged and made anew."""
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")
    os.truncate(cache / "exports" / tiny_ir.name / "unet" / "openvino_model.bin", 1000)
    log = Log()
    model = resolve(tiny_sd, cache, log)
    assert log.events == ["cache.discarded", *EXPORTED, "model.resolved"]
    assert model.fingerprint == resolve(tiny_sd, tiny_cache, Log()).fingerprint
    assert log[-2]["bytes"] == sum(
        file.stat().st_size for file in model.path.rglob("*") if file.is_file()
    )


def test_weights_that_do_not_fit_their_config_are_an_error(tiny_sd: Path, tmp_path: Path):
    """Class and message of the exporter's error reach the host, and nothing stays in the cache."""
    source = shutil.copytree(tiny_sd, tmp_path / "sd")
    config = source / "unet" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "block_out_channels": [64, 64]})
    )
    log = Log()
    with pytest.raises(ModelSourceError, match=r"exporter failed with \w+: .*shape"):
        resolve(source, tmp_path / "cache", log)
    assert log.events == ["export.started", "export.progress", "export.failed"]
    assert [path.suffix for path in (tmp_path / "cache" / "exports").iterdir()] == [".lock"]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_missing_weight_is_named(models: ModuleType, tiny_sd: Path, tmp_path: Path, form: str):
    """No part is exported with a weight that diffusers drew at random, or left empty."""
    heavy()
    from safetensors.torch import load_file, save_file

    if form == "folder":
        model = shutil.copytree(tiny_sd, tmp_path / "sd")
        weights, name = model / "text_encoder" / "model.safetensors", "layers.0.mlp.fc1.weight"
    else:
        model = weights = models.write_single_file(tiny_sd, tmp_path / "sd.safetensors")
        configs = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(tiny_sd, model.with_suffix(""), ignore=configs)
        name = "output_blocks.0.0.out_layers.3.weight"
    kept = {key: each for key, each in load_file(weights).items() if not key.endswith(name)}
    save_file(kept, weights, metadata={"format": "pt"})
    told = {
        "folder": r"lacks 1 weights of the CLIPTextModel \(.*fc1\.weight\)",
        "file": r"lacks 1 weights of the UNet2DConditionModel \(up_blocks.*conv2\.weight\)",
    }
    with pytest.raises(ModelSourceError, match=told[form] + ". Get the whole model"):
        resolve(model, tmp_path / "cache", Log())


def test_a_killed_exporter_is_an_error(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An exporter that was killed, for want of memory perhaps, is told from one that failed."""

    class Killed(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.kill()

    monkeypatch.setattr(child_process.subprocess, "Popen", Killed)
    with pytest.raises(ModelSourceError, match="was stopped by signal 9"):
        export(Order(str(tiny_sd), "StableDiffusionPipeline", half=False), tmp_path)


def test_an_interrupt_ends_the_exporter(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A KeyboardInterrupt amid an export passes through and leaves no process behind."""
    children: list[subprocess.Popen[bytes]] = []

    class Seen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            children.append(self)

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(child_process.subprocess, "Popen", Seen)
    with pytest.raises(KeyboardInterrupt):
        export(Order(str(tiny_sd), "StableDiffusionPipeline", half=False), tmp_path, interrupt)
    assert children[0].returncode == -signal.SIGKILL


def test_a_frozen_application_is_told_what_to_do(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where there is no interpreter to start, nothing is started, and the error says what helps."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ModelSourceError, match="export it beforehand with `holdfast export`"):
        resolve(tiny_sd, tmp_path, Log())


def test_a_single_file_with_configs_is_the_same_model(
    models: ModuleType, tiny_sd: Path, tiny_cache: Path, tmp_path: Path
):
    """A checkpoint in the original naming, with configs beside it, gives the model it came from."""
    source = models.write_single_file(tiny_sd, tmp_path / "files" / "checkpoint.safetensors")
    configs = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_sd, source.with_suffix(""), ignore=configs)
    model = resolve(source, tmp_path / "cache", Log())
    assert model.fingerprint == resolve(tiny_sd, tiny_cache, Log()).fingerprint


def test_a_single_file_without_configs_says_what_is_missing(
    models: ModuleType, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Offline and without configs the error names the folder that they go into."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source = models.write_single_file(tiny_sd, tmp_path / "files" / "checkpoint.safetensors")
    with pytest.raises(ModelSourceError, match=f"into the folder {source.with_suffix('')}"):
        resolve(source, tmp_path / "cache", Log())


PRUNE = """
import sys
from pathlib import Path
from holdfast.engine.models.diskcache import DiskCache
DiskCache(Path(sys.argv[1]), 0, lambda *_, **__: None).prune()
"""


def test_a_model_in_use_is_pruned_by_no_process(
    open_engine: Callable[..., Engine], tiny_sd: Path, tiny_cache: Path, tmp_path: Path
):
    """What an engine has taken from the cache stays, loaded or not, until the engine is closed."""
    cache = shutil.copytree(tiny_cache, tmp_path / "cache")

    def prune() -> list[str]:
        command = [sys.executable, "-c", PRUNE, str(cache)]
        subprocess.run(command, check=True)  # noqa: S603 - this interpreter
        return [path.name for path in (cache / "exports").iterdir() if path.is_dir()]

    engine = open_engine(model=str(tiny_sd), cache_dir=cache)
    engine.load()
    kept = prune()
    assert len(kept) == 1
    engine.unload()
    assert prune() == kept
    engine.load()
    engine.close()
    assert prune() == []
