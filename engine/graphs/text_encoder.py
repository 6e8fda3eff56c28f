"""
What a CLIP text encoder's graph does not offer as it is exported: vectors in place of tokens, and
the output of a layer before the last.
"""

from __future__ import annotations

import re
from typing import Any

VECTORS = "vectors"
"""Input (B or 1, T or 1, width) of an opened graph: what stands where `REPLACED` is not 0."""

REPLACED = "replaced"
"""Input (B or 1, T or 1) of an opened graph: 1 where a vector stands in place of the token's."""


def take_vectors(graph: Any) -> bool:
    """
    Let a text encoder take vectors in place of its table's for some of its tokens.

    The two inputs are small and the table is not touched, so textual inversion (Gal et al. 2022,
    arXiv:2208.01618) costs no compile. With zeros for both the result is that of the plain graph.

    Returns:
        Whether it looks its tokens up in a table; where it does not it is left as it is.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13

    lookup = _lookup(graph)
    if lookup is None:
        return False
    width = lookup.get_output_partial_shape(0)[2]
    vectors = opset13.parameter(ov.PartialShape([-1, -1, width]), np.float32, name=VECTORS)
    replaced = opset13.parameter(ov.PartialShape([-1, -1]), np.float32, name=REPLACED)
    for parameter in (vectors, replaced):
        parameter.output(0).set_names({parameter.get_friendly_name()})
    uses = list(lookup.output(0).get_target_inputs())
    zero = opset13.constant(np.float32(0))
    column = opset13.unsqueeze(opset13.not_equal(replaced, zero), opset13.constant(np.int64(-1)))
    chosen = opset13.select(column, vectors, lookup)
    for use in uses:
        use.replace_source_output(chosen.output(0))
    graph.add_parameters([vectors, replaced])
    graph.validate_nodes_and_infer_types()
    return True


def skipped(layers: int) -> str:
    """Return the name of the output that leaves out this many of the last layers."""
    return f"skipped.{layers}"


def give_earlier_layers(graph: Any) -> int:
    """
    Let a text encoder give what its denoiser would read if it ended some layers earlier.

    Each is normalised as the last layer's is. A graph that gives hidden states already is left as
    it is.

    Returns:
        How many such outputs it has now, see `skipped`.
    """
    from openvino import opset13

    outputs = {name: port for port in graph.outputs for name in port.get_names()}
    if "last_hidden_state" not in outputs or any(n.startswith("hidden_states") for n in outputs):
        return 0
    last = outputs["last_hidden_state"].get_node().input_value(0).get_node()
    norm = _norm(last)
    states = _layers(graph)
    if not norm or len(states) < 2:  # noqa: PLR2004 - one layer has none before it
        return 0
    apply = {
        "MVN": lambda value, node: opset13.mvn(
            value, node.input_value(1), *(node.get_attributes()[name] for name in _MVN)
        ),
        "Multiply": lambda value, node: opset13.multiply(value, node.input_value(1)),
        "Add": lambda value, node: opset13.add(value, node.input_value(1)),
    }
    for count, state in enumerate(reversed(states[:-1]), start=1):
        value = state
        for node in norm:
            value = apply[node.get_type_name()](value, node)
        graph.add_outputs([value.output(0)])
        graph.outputs[-1].get_tensor().set_names({skipped(count)})
    graph.validate_nodes_and_infer_types()
    return len(states) - 1


_MVN = ("normalize_variance", "eps", "eps_mode")


def _lookup(graph: Any) -> Any | None:
    """Return the node that turns token ids into vectors."""
    for parameter in graph.get_parameters():
        if "input_ids" not in parameter.output(0).get_names():
            continue
        waiting = list(parameter.output(0).get_target_inputs())
        while waiting:
            use = waiting.pop()
            node = use.get_node()
            if node.get_type_name() in ("Convert", "Reshape") and use.get_index() == 0:
                waiting += node.output(0).get_target_inputs()
            elif node.get_type_name() == "Gather" and use.get_index() == 1:
                return node
    return None


def _layers(graph: Any) -> list[Any]:
    """Return the output of each layer, in order; exporters name them by torch's modules."""
    found = {}
    for node in graph.get_ordered_ops():
        match = re.search(r"encoder\.layers\.(\d+)/aten::add/Add_1$", node.get_friendly_name())
        if match is not None:
            found[int(match[1])] = node
    return [found[index] for index in sorted(found)]


def _norm(last: Any) -> list[Any]:
    """Return the nodes of the final norm in order; a gain of 1 and a bias of 0 have none."""
    nodes = [last]
    while nodes[-1].get_type_name() in ("Add", "Multiply"):
        nodes.append(nodes[-1].input_value(0).get_node())
    return nodes[::-1] if nodes[-1].get_type_name() == "MVN" else []
