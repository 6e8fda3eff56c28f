"""Graphs that LoRAs are fused into: the tiny model's, and one of a single layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
from openvino import opset13

from holdfast.engine.lora import LoraFile, LoraLayer

if TYPE_CHECKING:
    from pathlib import Path

Shapes = dict[str, dict[str, tuple[int, ...]]]


def read(folder: Path, component: str) -> ov.Model:
    """Read a component of a model."""
    return ov.Core().read_model(folder / component / "openvino_model.xml")


def projection(
    weight: np.ndarray, kind: ov.Type = ov.Type.f32, *, transpose: bool = True
) -> ov.Model:
    """Return a graph of one matrix product with the weight of a module called ``layer``."""
    constant = opset13.constant(np.ascontiguousarray(weight), dtype=kind)
    constant.set_friendly_name("self.layer.weight")
    factor = constant if kind == ov.Type.f32 else opset13.convert(constant, "f32")
    data = opset13.parameter([-1, weight.shape[1 if transpose else 0]], np.float32)
    return ov.Model(
        [opset13.matmul(data, factor, transpose_a=False, transpose_b=transpose)],
        [data],
        "projection",
    )


def one_layer(shape: tuple[int, int], *, rank: int = 2) -> LoraFile:
    """Return the content of a LoRA on the module ``layer`` of the UNet, in whole numbers."""
    random = np.random.default_rng(0)
    down = random.integers(-3, 4, size=(rank, shape[1])).astype(np.float32)
    up = random.integers(-3, 4, size=(shape[0], rank)).astype(np.float32)
    return LoraFile("one", "0" * 64, {"unet": {"layer": LoraLayer(down, up, alpha=1.0)}})
