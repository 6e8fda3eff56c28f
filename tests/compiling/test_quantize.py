"""What holds of a denoiser in 8 bits. All with a tiny model, quantized once for the module."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.engine.compiling.quantize import KINDS, FusedLora, is_whole, quantize
from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import runtime
from holdfast.engine.lora import Strength, fuse, read_lora
from holdfast.engine.models.integrity import Digests
from holdfast.engine.models.source import resolve

if TYPE_CHECKING:
    from pathlib import Path

    import openvino as ov

    from holdfast.engine.models.source import ModelFolder

INNER, OUTER = "mid_block.resnets.0.conv1", ("conv_in", "conv_out")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def model(tiny_ir: Path, cache: Path) -> ModelFolder:
    return resolve(tiny_ir, cache, lambda *_, **__: None)


@pytest.fixture(scope="module", params=KINDS)
def quantized(
    request: pytest.FixtureRequest, model: ModelFolder, cache: Path
) -> tuple[str, Path, list[tuple[str, dict[str, Any]]]]:
    told: list[tuple[str, dict[str, Any]]] = []
    graph = quantize(
        model, request.param, (), cache, lambda event, **facts: told.append((event, facts))
    )
    return request.param, graph, told


def evaluate(graph: Path | ov.Model) -> np.ndarray:
    """Run the denoiser once on fixed noise."""
    runtime()
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    random = np.random.default_rng(0)
    inputs = {
        "sample": random.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.array(500),
        "encoder_hidden_states": random.standard_normal((2, 77, 32), np.float32),
    }
    output: np.ndarray = compiled(inputs)[0]
    return output


def kinds_of_constants(graph: Path) -> dict[str, str]:
    """Return the element type of every named constant."""
    runtime()
    import openvino as ov

    return {
        operation.get_friendly_name(): operation.get_element_type().to_string()
        for operation in ov.Core().read_model(graph).get_ops()
        if operation.get_type_name() == "Constant"
    }


def test_an_8_bit_denoiser_computes_nearly_the_same(
    quantized: tuple[str, Path, list[Any]], model: ModelFolder
):
    """Even on noise, unlike what its ranges were observed on, it is off by less than a fifth."""
    exact = evaluate(model.component_path("unet"))
    apart = np.linalg.norm(evaluate(quantized[1]) - exact) / np.linalg.norm(exact - exact.mean())
    assert 0 < apart < 0.2


def test_weights_are_8_bits_but_for_the_layers_that_are_kept(
    quantized: tuple[str, Path, list[Any]], model: ModelFolder
):
    """Int8 keeps the first and the last convolution as they are, int8-weights every one."""
    kind, graph, _ = quantized
    types = kinds_of_constants(graph)
    whole = model.component_path("unet").with_suffix(".bin").stat().st_size
    share = 0.4 if kind == "int8" else 1
    assert graph.with_suffix(".bin").stat().st_size < share * whole
    assert "i8" in types.values()
    kept = OUTER if kind == "int8" else (*OUTER, INNER)  # others lose their names
    assert {types.get(f"self.{layer}.weight") for layer in kept} == {"f32"}
    assert (f"self.{INNER}.weight" in types) == (kind == "int8-weights")


def test_progress_is_told_between_start_and_completion(quantized: tuple[str, Path, list[Any]]):
    """The first event is the start, the last the completion with the size of what was written."""
    kind, graph, told = quantized
    names = [event for event, _ in told]
    assert (names[0], names[-1]) == ("export.started", "export.completed")
    assert told[-1][1]["bytes"] == sum(path.stat().st_size for path in graph.parent.iterdir())
    between = [facts for event, facts in told if event == "export.progress"]
    assert len(between) == len(told) - 2
    assert all(0 <= facts["done"] < facts["total"] for facts in between)
    phases = list(dict.fromkeys(facts["phase"] for facts in between))
    assert phases == (["denoise", "observe"] if kind == "int8" else [])


def test_a_lora_is_in_what_is_quantized(
    quantized: tuple[str, Path, list[Any]], model: ModelFolder, cache: Path, ink: Path
):
    """Quantized with a LoRA the denoiser is nearer to the fused one than to the one without."""
    runtime()
    import openvino as ov

    kind, graph, _ = quantized
    file = read_lora(ink)
    loras = (FusedLora(str(ink), file.digest, 0.7),)
    styled = quantize(model, kind, loras, cache, lambda *_, **__: None)
    assert styled.parent != graph.parent
    plain = model.component_path("unet")
    fused = fuse(ov.Core().read_model(plain), "unet", [(file, Strength(0.7))])
    near, far = (np.linalg.norm(evaluate(styled) - evaluate(other)) for other in (fused, plain))
    assert near < 0.7 * far


def test_it_is_computed_once(
    quantized: tuple[str, Path, list[Any]], model: ModelFolder, cache: Path
):
    """Asked again, the same file comes back and nothing is told, because nothing is done."""
    kind, graph, _ = quantized
    told: list[str] = []
    assert quantize(model, kind, (), cache, lambda event, **_: told.append(event)) == graph
    assert told == []


@pytest.mark.parametrize("damage", ["cut", "changed", "weights gone", "digest gone"])
def test_a_damaged_one_is_not_whole(
    quantized: tuple[str, Path, list[Any]], tmp_path: Path, damage: str
):
    """A copy is whole; a cut or changed file is told by its content, and a missing one too."""
    copied = shutil.copytree(quantized[1].parent, tmp_path / "copied")
    digests = Digests(tmp_path / "digests.json", lambda *_, **__: None)
    assert is_whole(copied / "openvino_model.xml", digests)
    weights = copied / "openvino_model.bin"
    whole = weights.read_bytes()
    if damage == "cut":
        os.truncate(weights, len(whole) // 2)
    elif damage == "changed":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (weights if damage == "weights gone" else copied / "digest").unlink()
    assert not is_whole(copied / "openvino_model.xml", digests)


def test_a_failure_says_what_was_asked_and_leaves_nothing(model: ModelFolder, tmp_path: Path):
    """A graph that cannot be read is an error of the model's source, and no folder stays behind."""
    broken = tmp_path / "model"
    shutil.copytree(model.path, broken)
    (broken / "unet" / "openvino_model.xml").write_text("no graph")
    told: list[str] = []
    with pytest.raises(ModelSourceError, match="precision='int8-weights' was asked for"):
        quantize(
            replace(model, path=broken),
            "int8-weights",
            (),
            tmp_path / "cache",
            lambda event, **_: told.append(event),
        )
    assert told == ["export.started", "export.failed"]
    assert [path for path in (tmp_path / "cache" / "exports").iterdir() if path.is_dir()] == []
