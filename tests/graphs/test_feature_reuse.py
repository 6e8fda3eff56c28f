from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
import pytest

from holdfast.engine.graphs.feature_reuse import FEATURES, FRESH, KEPT, reuse_features
from holdfast.engine.graphs.geglu import split_gates
from holdfast.engine.models.source import resolve
from tests.conftest import ignore
from tests.support.lora_graphs import read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = 77


def compiled(graph: ov.Model) -> Callable[[dict[str, Any]], Any]:
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(graph, "CPU", exact).create_infer_request().infer


def random_inputs(graph: ov.Model, batch: int, height: int, width: int) -> dict[str, Any]:
    """Return inputs of a UNet of any layout, for latents of a size."""
    lot = np.random.default_rng(batch + height)
    free = {0: batch, 1: TOKENS, 2: height, 3: width}
    return {
        port.get_any_name(): lot.standard_normal(
            [
                free[axis] if side.is_dynamic else side.get_length()
                for axis, side in enumerate(port.get_partial_shape())
            ]
        ).astype(port.get_element_type().to_dtype())
        for port in graph.inputs
        if port.get_any_name() != "timestep"
    } | {"timestep": np.array([500], graph.input("timestep").get_element_type().to_dtype())}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_computed_whole_it_answers_as_the_plain_graph(
    family: Callable[[str], Path], tiny_cache: Path, name: str
) -> None:
    """To the bit, at any size and batch; so does a deep part that is handed what it gave."""
    plain = split_gates(read(resolve(family(name), tiny_cache, ignore).path, "unet"))
    graph = reuse_features(plain)
    assert [op.get_type_name() for op in graph.get_ops()].count("If") == 1
    weights = {op.get_friendly_name() for op in graph.get_ops()}
    assert len(weights) < len(plain.get_ops()) / 2  # the deep part stands inside, and only there
    infer, expected = compiled(graph), compiled(plain)
    channels = graph.input(KEPT).get_partial_shape()[1].get_length()
    for batch, height, width in ((2, 8, 8), (1, 12, 8), (2, 16, 24), (2, 8, 8)):
        inputs = random_inputs(plain, batch, height, width)
        wanted = expected(inputs)[0].copy()
        nothing = np.zeros((1, channels, 1, 1), np.float32)
        whole = infer({**inputs, FRESH: np.array([True])[0], KEPT: nothing})
        np.testing.assert_array_equal(whole[0], wanted)
        features = whole[FEATURES].copy()
        assert features.shape == (batch, channels, height, width)
        again = infer({**inputs, FRESH: np.array([False])[0], KEPT: features})
        np.testing.assert_array_equal(again[0], wanted)
        other = infer({**inputs, FRESH: np.array([False])[0], KEPT: features + 1})
        assert not np.array_equal(other[0], wanted)


def test_what_has_no_such_part_stays_as_it_is(tiny_ir: Path) -> None:
    """Other components, and denoisers with other names, are returned unchanged."""
    for part in ("text_encoder", "vae_decoder", "vae_encoder"):
        graph = read(tiny_ir, part)
        assert reuse_features(graph) is graph
