"""What holds of normalizations that are scaled by what is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from holdfast.engine.graphs.scaled_norms import WITHOUT_SNIPPETS, has_scaled_norms

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (2, 64, 4, 4)


def normalized(*, by: str) -> ov.Model:
    """Return a group normalization, multiplied by an input or by a constant, and shifted."""
    channels = SHAPE[1]
    values = ops.parameter(SHAPE, np.float32, name="values")
    scale = ops.parameter((2, channels, 1, 1), np.float32, name="scale")
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    norm = ops.group_normalization(values, ones, zeros, 8, 1e-5)
    half = ops.constant(np.full((1, channels, 1, 1), 2, np.float16))
    factor = {"input": scale, "constant": ops.convert(half, "f32")}[by]
    return ov.Model([ops.add(ops.multiply(factor, norm), scale)], [values, scale], by)


def test_only_what_is_computed_counts(tiny_ir: Path) -> None:
    """A constant factor, in whichever precision, is none of them; nor is a plain UNet's."""
    assert has_scaled_norms(normalized(by="input"))
    assert not has_scaled_norms(normalized(by="constant"))
    assert not has_scaled_norms(ov.Core().read_model(tiny_ir / "unet" / "openvino_model.xml"))


def test_without_snippets_it_computes_what_it_says() -> None:
    """Its values are NumPy's, within float32."""
    random = np.random.default_rng(0)
    values = random.standard_normal(SHAPE, np.float32)
    scale = random.standard_normal((2, SHAPE[1], 1, 1), np.float32)
    compiled = ov.Core().compile_model(
        normalized(by="input"),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", **WITHOUT_SNIPPETS},
    )
    grouped = values.reshape(2, 8, -1)
    deviation = np.sqrt(grouped.var(axis=2, keepdims=True) + 1e-5)
    plain = ((grouped - grouped.mean(axis=2, keepdims=True)) / deviation).reshape(SHAPE)
    apart = np.abs(compiled([values, scale])[0] - (plain * scale + scale)).max()
    assert apart < 1e-5
