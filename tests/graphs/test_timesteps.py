from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
import pytest

from holdfast.engine.graphs.timesteps import accept_fractional_timesteps, embed_timesteps_exactly
from tests.support.engines import NEEDS_BF16
from tests.support.lora_graphs import read

if TYPE_CHECKING:
    from pathlib import Path

ROUNDED = 999.0
"""Of eight significant bits it becomes 1000."""


def unet(folder: Path) -> ov.Model:
    graph = read(folder, "unet")
    accept_fractional_timesteps(graph)
    return graph


def exact(folder: Path) -> ov.Model:
    graph = unet(folder)
    assert embed_timesteps_exactly(graph)
    return graph


def noise(graph: ov.Model, timestep: float, precision: str, *, rows: int = 1) -> np.ndarray:
    """Predict the noise in fixed latents of two images."""
    random = np.random.default_rng(0)
    inputs = {
        "sample": random.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.full([rows], timestep, np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, 32), np.float32),
    }
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found: np.ndarray = compiled(inputs)[0]
    return found


def error(graph: ov.Model, folder: Path, timestep: float) -> float:
    """Return how far a graph in bf16 is off from the model in float32, relative to its values."""
    expected = noise(unet(folder), timestep, "f32")
    return float(
        np.linalg.norm(noise(graph, timestep, "bf16") - expected) / np.linalg.norm(expected)
    )


@NEEDS_BF16
@pytest.mark.parametrize("timestep", [ROUNDED, 850.5, 651.0, 1.0])
def test_bf16_does_not_round_the_timestep(tiny_ir: Path, timestep: float) -> None:
    """In bf16 the noise is off by one to two percent, late steps and early ones alike."""
    assert error(exact(tiny_ir), tiny_ir, timestep) < 0.015


@NEEDS_BF16
def test_openvino_rounds_it_otherwise(tiny_ir: Path) -> None:
    """An export as it is is off by three times as much: what the other tests rule out is real."""
    assert error(unet(tiny_ir), tiny_ir, ROUNDED) > 3 * error(exact(tiny_ir), tiny_ir, ROUNDED)


@NEEDS_BF16
def test_a_clone_computes_the_same(tiny_ir: Path) -> None:
    """What LoRAs are fused into, and what is given a static shape, is as exact."""
    graph = exact(tiny_ir)
    assert np.array_equal(noise(graph.clone(), ROUNDED, "bf16"), noise(graph, ROUNDED, "bf16"))


@pytest.mark.parametrize("rows", [1, 2])
def test_float32_stays_as_it_is(tiny_ir: Path, rows: int) -> None:
    """In float32 nothing changes, to the bit, with one timestep for all images or one for each."""
    before, after = (
        noise(graph, 850.5, "f32", rows=rows) for graph in (unet(tiny_ir), exact(tiny_ir))
    )
    assert np.array_equal(before, after)


def test_a_graph_without_timesteps_is_left_alone(tiny_ir: Path) -> None:
    """A VAE has none, and nothing in it changes."""
    graph = read(tiny_ir, "vae_decoder")
    before = [node.get_friendly_name() for node in graph.get_ordered_ops()]
    assert not embed_timesteps_exactly(graph)
    assert [node.get_friendly_name() for node in graph.get_ordered_ops()] == before
