"""What holds of gated linear units in two layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nncf
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from holdfast.engine.graphs.geglu import split_gates
from tests.support.lora_graphs import read

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 16
UNITS_OF_THE_TINY_MODEL = 4


def weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def geglu(*, half: bool = False, told: bool = False, axis: int = -1) -> ov.Model:
    """
    Return a gated linear unit as an export has it.

    Args:
        half: Weights in float16.
        told: The product before the split is a result as well.
        axis: That is split.
    """

    def constant(values: np.ndarray) -> Any:
        if not half:
            return ops.constant(values)
        return ops.convert(ops.constant(values.astype(np.float16)), "f32")

    given = ops.parameter([-1, -1, WIDTH], ov.Type.f32, "hidden")
    product = ops.matmul(
        given, constant(weights(1, 4 * WIDTH, WIDTH)), transpose_a=False, transpose_b=True
    )
    whole = ops.add(product, constant(weights(2, 1, 1, 4 * WIDTH)))
    last = ops.gather(ops.shape_of(whole), ops.constant(axis % 3), ops.constant(0))
    lengths = ops.broadcast(ops.divide(last, ops.constant(np.int64(2))), ops.constant([2]))
    split = ops.variadic_split(whole, ops.constant(axis), lengths)
    gated = ops.multiply(split.output(0), ops.gelu(split.output(1), "erf"))
    return ov.Model([gated, whole] if told else [gated], [given], "geglu")


def kinds(graph: ov.Model) -> list[str]:
    return [node.get_type_name() for node in graph.get_ordered_ops()]


def outcome(graph: ov.Model, inputs: Any) -> np.ndarray:
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: np.ndarray = compiled(inputs)[0]
    return found


@pytest.mark.parametrize("form", [{}, {"half": True}, {"axis": 2}], ids=str)
def test_value_and_gate_come_from_layers_of_their_own(form: dict[str, Any]) -> None:
    """They are the rows of the one layer, and what comes out is the same."""
    graph = geglu(**form)
    parted = split_gates(graph)
    assert kinds(parted).count("MatMul") == 2
    assert not {"VariadicSplit", "ShapeOf"} & set(kinds(parted))
    hidden = weights(3, 2, 5, WIDTH)
    assert np.allclose(outcome(parted, hidden), outcome(graph, hidden), atol=1e-5)


def test_the_graph_given_is_left_as_it_is() -> None:
    graph = geglu()
    before = kinds(graph)
    split_gates(graph)
    assert kinds(graph) == before
    assert outcome(graph, weights(3, 1, 2, WIDTH)).shape == (1, 2, 2 * WIDTH)


def test_weights_are_shared_and_outlive_the_graph_that_they_came_from() -> None:
    """Halves are no copies; they hold what they lie in."""
    graph = geglu()
    addresses = [at.data.ctypes.data for at in constants(graph, 4 * WIDTH)]
    parted = split_gates(graph)
    halves = [at.data.ctypes.data for at in constants(parted, 2 * WIDTH)]
    assert min(halves) == min(addresses)
    assert sorted(halves)[1] - min(halves) == 2 * WIDTH * WIDTH * 4
    hidden = weights(3, 2, 5, WIDTH)
    expected = outcome(graph, hidden)
    del graph
    assert np.allclose(outcome(parted, hidden), expected, atol=1e-5)


def constants(graph: ov.Model, rows: int) -> list[ov.op.Constant]:
    return [
        node
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "Constant" and list(node.shape) == [rows, WIDTH]
    ]


def test_a_product_that_is_wanted_whole_stays_whole() -> None:
    graph = geglu(told=True)
    assert split_gates(graph) is graph


def test_a_split_of_tokens_is_no_gate() -> None:
    graph = geglu(axis=1)
    assert split_gates(graph) is graph


def test_a_denoiser_computes_the_same_with_its_units_in_two(tiny_ir: Path) -> None:
    graph = read(tiny_ir, "unet")
    parted = split_gates(graph)
    assert kinds(graph).count("VariadicSplit") == UNITS_OF_THE_TINY_MODEL
    assert "VariadicSplit" not in kinds(parted)
    inputs = {
        "sample": weights(4, 2, 4, 8, 8),
        "timestep": np.array([500]),
        "encoder_hidden_states": weights(5, 2, 77, 32),
    }
    assert np.allclose(outcome(parted, inputs), outcome(graph, inputs), atol=1e-5)


def test_a_unit_in_8_bits_is_parted_as_well() -> None:
    """Scales go with their rows, and what was quantized stays so."""
    hidden = weights(3, 2, 5, WIDTH)
    eight = nncf.quantize(geglu(), nncf.Dataset([hidden]), model_type=nncf.ModelType.TRANSFORMER)
    parted = split_gates(eight)
    assert kinds(eight).count("VariadicSplit") == 1
    assert "VariadicSplit" not in kinds(parted)
    assert [at.get_element_type() for at in constants(parted, 2 * WIDTH)] == [ov.Type.i8] * 2
    apart = np.abs(outcome(parted, hidden) - outcome(eight, hidden))
    assert apart.max() < 0.05 * np.abs(outcome(eight, hidden)).max()


def test_a_graph_without_such_units_is_given_back(tiny_ir: Path) -> None:
    graph = read(tiny_ir, "vae_decoder")
    assert split_gates(graph) is graph
