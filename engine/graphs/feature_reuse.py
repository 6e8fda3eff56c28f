"""
A UNet whose deep levels can be left out, with what they gave earlier in their place.

From one step to the next the deep levels of a UNet hardly change (DeepCache, arXiv:2312.00858).
What reaches the last resnet of its outermost level is computed inside an ``If``, or handed in. With
the deep part computed the graph's answer is the plain one's, to the bit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino as ov

FRESH, KEPT, FEATURES = "fresh", "kept_features", "features"
"""Inputs: whether the deep part is computed, and what stands in for it. Output: what it gave."""

_JOINT = re.compile(r"__module\.(?:model\.)?up_blocks\.(\d+)/aten::cat/Concat(?:_(\d+))?")
_FLOATS = frozenset({"f32", "f16", "bf16"})


def reuse_features(graph: ov.Model) -> ov.Model:
    """
    Return a UNet's graph that runs its deep part or takes features in its place.

    It has the inputs `FRESH` (a truth value) and `KEPT` (features, float32), and `FEATURES` as a
    further output.

    Args:
        graph: Any; left as it is.

    Returns:
        A clone, which shares the memory of all weights; `graph` itself where it has no such part.
    """
    import openvino as ov
    from openvino import opset13

    name = _joint(graph)
    if name is None:
        return graph
    whole, inner = graph.clone(), graph.clone()
    joint = _named(whole)[name]
    source = joint.input_value(0)
    shallow = _shallow(whole, joint)
    crossing = _crossing(source, shallow)

    within, parameters = _named(inner), []
    for output in crossing:
        given = opset13.parameter(output.get_partial_shape(), output.get_element_type())
        parameters.append(given)
        _output(within, output).replace(given.output(0))
    deep = opset13.result(_output(within, source))
    kept_inside = opset13.parameter(source.get_partial_shape(), ov.Type.f32)
    kept_result = opset13.result(kept_inside)

    fresh = opset13.parameter([], ov.Type.boolean, name=FRESH)
    kept = opset13.parameter(source.get_partial_shape(), ov.Type.f32, name=KEPT)
    choice = opset13.if_op(fresh.output(0))
    choice.set_then_body(ov.Model([deep], parameters, "deep"))
    choice.set_else_body(ov.Model([kept_result], [kept_inside], "kept"))
    for output, given in zip(crossing, parameters, strict=True):
        choice.set_input(output, given, None)
    choice.set_input(kept.output(0), None, kept_inside)
    features = choice.set_output(deep, kept_result)
    joint.input(0).replace_source_output(features)

    for parameter, title in ((fresh, FRESH), (kept, KEPT)):
        parameter.output(0).get_tensor().set_names({title})
    told = opset13.result(features)
    features.get_tensor().set_names({FEATURES})
    whole.add_parameters([fresh, kept])
    whole.add_results([told])
    whole.validate_nodes_and_infer_types()
    return whole


def _joint(graph: ov.Model) -> str | None:
    """Return the name of the node where the deep part meets the last resnet, if there is one."""
    found = {
        (int(match[1]), int(match[2] or 0)): match[0]
        for match in (_JOINT.fullmatch(node.get_friendly_name()) for node in graph.get_ops())
        if match
    }
    return found[max(found)] if found else None


def _named(graph: ov.Model) -> dict[str, Any]:
    return {node.get_friendly_name(): node for node in graph.get_ops()}


def _output(nodes: dict[str, Any], like: Any) -> Any:
    return nodes[like.get_node().get_friendly_name()].output(like.get_index())


def _shallow(graph: ov.Model, joint: Any) -> frozenset[str]:
    """Return the names of what the graph needs although the joint's first input is handed in."""
    seen: set[str] = set()
    ahead: list[Any] = list(graph.get_results())
    name = joint.get_friendly_name()
    while ahead:
        node = ahead.pop()
        if node.get_friendly_name() in seen:
            continue
        seen.add(node.get_friendly_name())
        is_joint = node.get_friendly_name() == name
        ahead += [each.get_source_output().get_node() for each in node.inputs()[is_joint:]]
    return frozenset(seen)


def _crossing(source: Any, shallow: frozenset[str]) -> list[Any]:
    """
    Return what the deep part takes from the shallow one.

    Constants, and shapes that are computed of what crosses, are its own as well: known inside, they
    let OpenVINO fuse there what it fuses elsewhere.
    """
    found: dict[tuple[str, int], Any] = {}
    seen: set[str] = set()
    ahead = [source]
    while ahead:
        output = ahead.pop()
        node = output.get_node()
        name = node.get_friendly_name()
        if name in shallow and not _is_constant(node):
            is_float = output.get_element_type().get_type_name() in _FLOATS
            if is_float or node.get_type_name() == "Parameter":
                found[name, output.get_index()] = output
                continue
        if name not in seen:
            seen.add(name)
            ahead += [each.get_source_output() for each in node.inputs()]
    return list(found.values())


def _is_constant(node: Any) -> bool:
    if node.get_type_name() == "Constant":
        return True
    sources = [each.get_source_output().get_node() for each in node.inputs()]
    return bool(sources) and all(map(_is_constant, sources))
