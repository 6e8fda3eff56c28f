"""
Normalizations that are scaled by what is computed, as a UNet's with ``scale_shift`` resnets are.

Of static shapes OpenVINO's CPU plugin fuses elementwise operations into code of its own (snippets).
In float32 it also takes a group normalization in, and where a product with another computed value
follows, 2026.4 ends the process while it compiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino as ov

WITHOUT_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
"""The property with which such a graph compiles, and runs no slower than with dynamic shapes."""


def has_scaled_norms(graph: ov.Model) -> bool:
    """Tell whether a group normalization is multiplied by anything but a constant."""
    return any(
        target.get_node().get_type_name() == "Multiply"
        and not _is_constant(target.get_node().input_value(1 - target.get_index()).get_node())
        for node in graph.get_ops()
        if node.get_type_name() == "GroupNormalization"
        for target in node.output(0).get_target_inputs()
    )


def _is_constant(node: ov.Node) -> bool:
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")
