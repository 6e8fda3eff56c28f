"""
Gated linear units in two linear layers in place of one.

An export has a GEGLU (N. Shazeer, arXiv:2002.05202, section 2) as one linear layer whose result is
split into a value and its gate. OpenVINO's CPU plugin then writes that result, copies its halves,
and reads and writes the gate once more for its GELU. A layer for each half, with the very weights,
spares all that: the GELU becomes a part of the gate's layer. On a GPU OpenVINO fuses the split
itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import openvino as ov

# What stands between a constant and the layer that reads it, in 16 bits and in 8.
_UNPACKING = ("Convert", "Multiply", "Subtract", "FakeQuantize")
_KINDS = ("f32", "f16", "i8", "u8")
"""Of constants that NumPy can cut."""


class _Unit(NamedTuple):
    """The nodes of a gated linear unit: matrix product, bias, split."""

    product: ov.Node
    bias: ov.Node
    split: ov.Node


def split_gates(graph: ov.Model) -> ov.Model:
    """
    Return a graph of which every gated linear unit has a layer for its value and one for its gate.

    Args:
        graph: Any; left as it is.

    Returns:
        A clone, which shares the memory of all weights; `graph` itself where it has no such unit.
    """
    if not any(_units(graph)):
        return graph
    values, gates = graph.clone(), graph.clone()
    others = {node.get_friendly_name(): node for node in gates.get_ops()}
    for unit in list(_units(values)):
        width = unit.product.input_value(1).get_partial_shape()[0].get_length()
        gate = _Unit(*(others[node.get_friendly_name()] for node in unit))
        gate.product.input(0).replace_source_output(unit.product.input_value(0))
        for port, each in enumerate((unit, gate)):
            rows = slice(port * width // 2, (port + 1) * width // 2)
            for reader in (each.product, each.bias):
                _keep_rows(reader, 1, width, rows)
            for target in unit.split.output(port).get_target_inputs():
                target.replace_source_output(each.bias.output(0))
        gate.bias.set_friendly_name(f"{unit.bias.get_friendly_name()}/gate")
        gate.product.set_friendly_name(f"{unit.product.get_friendly_name()}/gate")
    values.validate_nodes_and_infer_types()
    return values


def _units(graph: ov.Model) -> Iterator[_Unit]:
    for split in graph.get_ordered_ops():
        if split.get_type_name() != "VariadicSplit" or not _is_of_last_axis(split):
            continue
        readers = [use.get_node().get_type_name() for use in split.output(1).get_target_inputs()]
        bias = split.input_value(0).get_node()
        if readers.count("Gelu") != 1 or bias.get_type_name() != "Add":
            continue
        product = bias.input_value(0).get_node()
        if (
            product.get_type_name() == "MatMul"
            and product.get_attributes()["transpose_b"]
            and _ends_in(split, product)
            and all(_is_ours(each.input_value(1)) for each in (product, bias))
        ):
            yield _Unit(product, bias, split)


def _is_of_last_axis(split: ov.Node) -> bool:
    axis, rank = split.input_value(1).get_node(), split.get_input_partial_shape(0).rank
    if axis.get_type_name() != "Constant":
        return False
    return int(axis.data) == -1 or (rank.is_static and int(axis.data) == rank.get_length() - 1)


def _ends_in(split: ov.Node, node: ov.Node) -> bool:
    """Whether whatever reads a node serves the split alone, such as what computes its lengths."""
    readers = [use.get_node() for output in node.outputs() for use in output.get_target_inputs()]
    return bool(readers) and all(
        each.get_friendly_name() == split.get_friendly_name() or _ends_in(split, each)
        for each in readers
    )


def _is_ours(output: ov.Output) -> bool:
    """Whether constants alone make it, and nothing else reads what is made of them."""
    node = output.get_node()
    if node.get_type_name() == "Constant":
        return node.get_element_type().get_type_name() in _KINDS
    return (
        node.get_type_name() in _UNPACKING
        and len(output.get_target_inputs()) == 1
        and all(_is_ours(each.get_source_output()) for each in node.inputs())
    )


def _keep_rows(reader: ov.Node, port: int, width: int, rows: slice) -> None:
    """Cut `rows` out of each constant behind an input that has `width` of them."""
    import openvino as ov

    node = reader.input_value(port).get_node()
    if node.get_type_name() != "Constant":
        for each in range(node.get_input_size()):
            _keep_rows(node, each, width, rows)
        return
    shape = list(node.get_output_shape(0))
    if width in shape:
        part = node.data[(slice(None),) * shape.index(width) + (rows,)]
        cut = ov.op.Constant(np.asarray(_Shared(np.ascontiguousarray(part))), shared_memory=True)
        cut.set_friendly_name(node.get_friendly_name())
        reader.input(port).replace_source_output(cut.output(0))


class _Shared:
    """
    An array that says it may be written to, which OpenVINO asks of memory that it is to share.

    Nobody writes to it: weights may lie in a file that is mapped read-only.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
