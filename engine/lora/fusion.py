"""
LoRAs fused into a clone of a graph.

The graph's constants carry the names of the torch parameters that they came from, so what a file
does to a weight is done to the constants themselves: no torch module is built, and constants that
no layer touches stay shared with the graph that was cloned.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

from holdfast.engine.errors import LoraError
from holdfast.engine.lora.changes import LoraLayer
from holdfast.engine.lora.files import listed
from holdfast.engine.lora.names import spellings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    import openvino as ov

    from holdfast.engine.lora.changes import Change
    from holdfast.engine.lora.files import LoraFile

# A torch parameter's name; a graph in half precision has an ending of its own for them.
_PARAMETER = re.compile(
    r"(?P<module>[\w.]+)\.(?P<what>weight|bias|_openvino_orig_weight)(_compressed)?"
)


@dataclass(frozen=True)
class Strength:
    """
    How strongly a LoRA works.

    Attributes:
        weight: Factor on its change of the weights; negative ones work against it.
        blocks: Patterns of layers (``"unet.up_blocks.*"``), each with a further factor. The first
            that matches a layer decides; a layer that none matches has 1.
    """

    weight: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()

    def of(self, layer: str) -> float:
        """Return the factor for a layer, ``"<component>.<module>"`` as diffusers calls it."""
        factors = (factor for pattern, factor in self.blocks if fnmatchcase(layer, pattern))
        return self.weight * next(factors, 1.0)

    def __str__(self) -> str:
        blocks = ", ".join(f"{pattern}={factor:g}" for pattern, factor in self.blocks)
        return f"{self.weight:g}" + (f"[{blocks}]" if blocks else "")


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

    What stands before every name (``self.``, or ``self.model.`` where the exporter had to wrap the
    module) is taken off: it is the longest beginning that all have.

    Args:
        model: A graph whose constants are called ``<prefix>.<module>.weight``, or
            ``..._compressed`` where a ``Convert`` to float32 follows.

    Returns:
        The constants by torch module path.
    """
    named = [
        (node, found)
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
        and (found := _PARAMETER.fullmatch(node.get_friendly_name()))
    ]
    paths = [tuple(found["module"].split(".")[:-1]) for _, found in named]
    first, last = (min(paths), max(paths)) if paths else ((), ())
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    prefix = len(list(shared))
    return MappingProxyType(
        {
            ".".join(found["module"].split(".")[prefix:]).removeprefix("text_model."): _target(node)
            for node, found in named
            if found["what"] != "bias"
        }
    )


def check(lora: LoraFile, component: str, model: ov.Model, strength: Strength = Strength()) -> None:
    """
    Refuse a LoRA of which a layer has no place in a component's graph.

    Args:
        lora: The LoRA.
        component: Which component the graph is of, for example ``"unet"``.
        model: Its graph; it is not changed.
        strength: How strongly it is to work.

    Raises:
        LoraError: A layer of this component has no constant of its name, or one of another shape,
            or one that cannot be fused into, such as an 8-bit weight; or a pattern of blocks
            matches no layer. The text lists which.
    """
    _placed(lora, component, model, targets(model), strength)


def fuse(model: ov.Model, component: str, loras: Sequence[tuple[LoraFile, Strength]]) -> ov.Model:
    """
    Fuse LoRAs into a clone of a component's graph.

    Each touched weight becomes ``W + sum(delta(W))``, computed in float32 and stored in the element
    type of the constant that it replaces; see `changes` for the deltas.

    Args:
        model: The component's graph; it is not changed.
        component: Which component it is, for example ``"unet"``.
        loras: LoRAs and how strongly each works; 0 changes nothing.

    Returns:
        The clone. It shares with ``model`` the memory of every constant that no layer touches.

    Raises:
        LoraError: A LoRA does not fit, as :func:`check` says it, or a sum does not fit into the
            element type.
    """
    fused = model.clone()
    places = targets(fused)
    parts: dict[str, list[tuple[Change, float]]] = {}
    for lora, strength in loras:
        for module, change in _placed(lora, component, fused, places, strength).items():
            if weight := strength.of(f"{component}.{module}"):
                parts.setdefault(module, []).append((change, weight))
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


def _placed(
    lora: LoraFile,
    component: str,
    model: ov.Model,
    places: Mapping[str, Target],
    strength: Strength,
) -> Mapping[str, Change]:
    """Return a file's changes by the graph's modules, and refuse a LoRA that does not fit."""
    layers = lora.layers.get(component, {})
    modules = spellings(places.keys())
    placed: dict[str, Change] = {}
    unfit = []
    for layer, change in layers.items():
        module = modules.get(layer, "")
        if not module:
            unfit.append(f"{layer} does not exist")
        elif places[module].obstacle:
            unfit.append(f"{module} {places[module].obstacle}")
        elif not change.fits(places[module].shape):
            unfit.append(f"{module} is {places[module].shape} and not {change.shape}")
        elif module in placed:
            unfit.append(f"{module} is named twice")
        else:
            placed[module] = change
    if unfit:
        raise LoraError(
            f"LoRA {lora.name} does not fit this model's {component}: {len(unfit)} of its "
            f"{len(layers)} layers have no place there ({listed(unfit)}). "
            + _cause(model, places, layers, [layer for layer in layers if layer not in modules])
        )
    names = [f"{component}.{module}" for module in placed]
    for pattern, _ in strength.blocks:
        if pattern.startswith(f"{component}.") and not any(
            fnmatchcase(name, pattern) for name in names
        ):
            raise LoraError(
                f"LoRA {lora.name} was asked for with blocks {pattern!r}, but has no such "
                f"layer. It has: {listed(names)}."
            )
    return MappingProxyType(placed)


def _cause(
    model: ov.Model, places: Mapping[str, Target], layers: Collection[str], missing: Collection[str]
) -> str:
    """Say what is known of why a LoRA does not fit, and what to do."""
    nameless = [name for name in _weights(model) if not _PARAMETER.fullmatch(name)]
    if missing and len(nameless) >= len(missing):
        return (
            f"{len(nameless)} of the graph's weights have lost the names that they had in torch "
            f"(for example {nameless[0]!r}), as in graphs that came through ONNX: no LoRA can be "
            "fused into those. Give the model as a diffusers folder or a .safetensors file."
        )
    if any("compressed" in place.obstacle for place in places.values()):
        return "Use a model whose weights are not compressed."
    if len(missing) == len(layers):
        return (
            f"Not one of its layers is in this model, which has {listed(places)}. Use a LoRA "
            "trained for this model."
        )
    return "Use a LoRA trained for this model."


def _weights(model: ov.Model) -> Iterator[str]:
    """Yield the name of each constant that a product or a convolution takes as its weight."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and {_form(use) for use in _uses(node.output(0))} - {
            "other"
        }:
            yield node.get_friendly_name()


def _replace(place: Target, name: str, parts: Iterable[tuple[Change, float]]) -> None:
    """Put a new constant, the old one plus the weighted deltas, where the old one was."""
    import numpy as np
    import openvino as ov
    from openvino import opset13

    old = place.constant
    kind = old.get_element_type()
    total = _converted(old.get_tensor_view(), ov.Type.f32)
    weights = total.data.T if place.transposed else total.data
    # All deltas that look at the weight do so before it is changed.
    deltas = [
        change.delta(weights, weight)
        for change, weight in parts
        if not isinstance(change, LoraLayer)
    ]
    for change, weight in parts:
        if isinstance(change, LoraLayer):
            change.add_to(weights, weight)
    for delta in deltas:
        weights += delta
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
