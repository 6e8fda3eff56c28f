"""
LoRAs fused into a clone of a graph.

A LoRA adds a product of two thin matrices to a weight (Hu et al. 2021, arXiv:2106.09685):
``W + weight * alpha / rank * up @ down``. The graph's constants carry the names of the torch
parameters that they came from, so the sum is made on the constants themselves: no torch module is
built, and constants that no layer touches stay shared with the graph that was cloned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from holdfast.engine.errors import LoraError
from holdfast.engine.lora.files import canonical, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import openvino as ov

    from holdfast.engine.lora.files import LoraFile, LoraLayer

_CONSTANT = re.compile(r"self\.(?P<module>.+)\.weight(_compressed)?")


@dataclass(frozen=True, eq=False)
class Target:
    """
    A constant of a graph that has the name of a torch weight.

    Attributes:
        constant: The graph's node.
        transposed: Whether the graph holds the torch weight with its two axes exchanged.
        obstacle: Why nothing can be fused into it; empty where it can.
    """

    constant: ov.Node
    transposed: bool
    obstacle: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the torch weight, output channels first."""
        shape = tuple(self.constant.shape)
        return shape[::-1] if self.transposed else shape


def targets(model: ov.Model) -> Mapping[str, Target]:
    """
    Find the constants of a graph that have the names of torch weights.

    Args:
        model: A graph as optimum-intel exports it: constants are called ``self.<module>.weight``,
            and ``self.<module>.weight_compressed`` where a ``Convert`` to float32 follows.

    Returns:
        The constants by torch module path.
    """
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and (
            named := _CONSTANT.fullmatch(node.get_friendly_name())
        ):
            found[canonical(named["module"])] = _target(node)
    return MappingProxyType(found)


def check(lora: LoraFile, component: str, model: ov.Model) -> None:
    """
    Refuse a LoRA of which a layer has no place in a component's graph.

    Args:
        lora: The LoRA.
        component: Which component the graph is of, for example ``"unet"``.
        model: Its graph; it is not changed.

    Raises:
        LoraError: A layer of this component has no constant of its name, or one of another shape,
            or one that cannot be fused into, such as an 8-bit weight. The text lists which.
    """
    _refuse_unfit(lora, component, targets(model))


def fuse(model: ov.Model, component: str, loras: Sequence[tuple[LoraFile, float]]) -> ov.Model:
    """
    Fuse LoRAs into a clone of a component's graph.

    Each touched weight becomes ``W + sum(weight * alpha / rank * up @ down)``, computed in float32
    and stored in the element type of the constant that it replaces.

    Args:
        model: The component's graph; it is not changed.
        component: Which component it is, for example ``"unet"``.
        loras: LoRAs with their weights, which may be negative; 0 changes nothing.

    Returns:
        The clone. It shares with ``model`` the memory of every constant that no layer touches.

    Raises:
        LoraError: A LoRA does not fit, as :func:`check` says it, or a sum does not fit into the
            element type.
    """
    fused = model.clone()
    places = targets(fused)
    parts: dict[str, list[tuple[LoraLayer, float]]] = {}
    for lora, weight in loras:
        _refuse_unfit(lora, component, places)
        if weight:
            for module, layer in lora.layers.get(component, {}).items():
                parts.setdefault(module, []).append((layer, weight))
    for module, wanted in parts.items():
        _replace(places[module], f"{component}.{module}", wanted)
    return fused


def _target(constant: ov.Node) -> Target:
    """Look at how a graph uses a constant with the name of a torch weight."""
    kind = constant.get_element_type().get_type_name()
    if kind not in {"f16", "bf16", "f32"}:
        return Target(constant, transposed=False, obstacle=f"is compressed to {kind}")
    forms = {_form(use) for use in _uses(constant.output(0))}
    if forms <= {"linear", "convolution"} or forms == {"transposed"}:
        return Target(constant, transposed="transposed" in forms, obstacle="")
    return Target(
        constant, transposed=False, obstacle="is not the weight of a linear layer or convolution"
    )


def _uses(output: ov.Output) -> Iterator[ov.Input]:
    """Yield where a constant is used; a graph in half precision converts it to float32 first."""
    for use in output.get_target_inputs():
        if use.get_node().get_type_name() == "Convert":
            yield from _uses(use.get_node().output(0))
        else:
            yield use


def _form(use: ov.Input) -> str:
    """Return in which form an operation takes a weight, ``"other"`` if it is not a known one."""
    node = use.get_node()
    match node.get_type_name(), use.get_index():
        case "Convolution", 1:
            return "convolution"
        case "MatMul", 1:
            return "linear" if node.get_attributes()["transpose_b"] else "transposed"
        case _:
            return "other"


def _refuse_unfit(lora: LoraFile, component: str, places: Mapping[str, Target]) -> None:
    """Refuse a LoRA unless each of its layers for the component has its place."""
    unfit = []
    for module, layer in lora.layers.get(component, {}).items():
        if module not in places:
            unfit.append(f"{module} does not exist")
        elif places[module].obstacle:
            unfit.append(f"{module} {places[module].obstacle}")
        elif places[module].shape != layer.shape:
            unfit.append(f"{module} is {places[module].shape} and not {layer.shape}")
    if unfit:
        raise LoraError(
            f"LoRA {lora.name} does not fit this model's {component}: {len(unfit)} of its "
            f"{len(lora.layers[component])} layers have no place there ({listed(unfit)}). "
            "Use a LoRA trained for this model, and a model whose weights are not compressed."
        )


def _replace(place: Target, name: str, parts: Iterable[tuple[LoraLayer, float]]) -> None:
    """Put a new constant, the old one plus the weighted deltas, where the old one was."""
    import numpy as np
    import openvino as ov
    from openvino import opset13

    old = place.constant
    kind = old.get_element_type()
    total = _converted(old.get_tensor_view(), ov.Type.f32)
    weights = total.data.T if place.transposed else total.data
    for layer, weight in parts:
        layer.add_to(weights, weight)
    largest = np.finfo(np.float16 if kind == ov.Type.f16 else np.float32).max
    if not (weights.max() <= largest and weights.min() >= -largest):
        raise LoraError(
            f"The LoRAs asked for make weights of {name} larger than {kind.get_type_name()} can "
            "hold. Use smaller LoRA weights."
        )
    new = opset13.constant(total if kind == ov.Type.f32 else _converted(total, kind))
    new.set_friendly_name(old.get_friendly_name())
    for use in old.output(0).get_target_inputs():
        use.replace_source_output(new.output(0))


def _converted(tensor: ov.Tensor, kind: ov.Type) -> ov.Tensor:
    """Copy a tensor into another element type; ten times as fast as numpy, which lacks bfloat16."""
    import openvino as ov
    from openvino import opset13

    copy = ov.Tensor(kind, tensor.shape)
    source = opset13.parameter(tensor.shape, tensor.element_type)
    if not opset13.convert(source, kind).evaluate([copy], [tensor]):
        raise LoraError(f"OpenVINO cannot convert {tensor.element_type} to {kind}.")
    return copy
