"""What identifies a compiled component: all that its compile depends on, and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.engine.lora.library import LoraUse
    from holdfast.engine.models.families import Family, Geometry, Scale
    from holdfast.states import Mode

DYNAMIC = "dynamic"
_UNSEEN = " is not here yet"


@dataclass(frozen=True)
class GraphKey:
    """
    The identity of a graph as it is read from disk.

    Attributes:
        source: Fingerprint of the component's graph, weights and configuration.
        quantization: ``"none"``, ``"int8"`` or ``"int8-weights"``.
        loras: Fused into it before it was quantized; empty where it is not.
    """

    source: str
    quantization: str = "none"
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True)
class ComponentKey:
    """
    The identity of one compiled component.

    Steps, seed, scheduler, strength and prompt are in no key; height and width are in no text
    encoder's.

    Attributes:
        component: For example ``"unet"``.
        source: Fingerprint of the component's graph, weights and configuration.
        lora: The LoRAs fused into it, in a fixed order.
        quantization: ``"none"``, ``"int8"`` or ``"int8-weights"``.
        shape: ``"dynamic"``, the main input's static shape such as ``"2x4x64x64"``, or
            where it is cut into tiles, one of `vae_tiles.STRIDES`.
        device: The OpenVINO device asked for.
        properties: Effective OpenVINO properties, sorted by name.
        openvino: OpenVINO's version.
        tokens: Of the prompt, where a denoiser's shape is static; else 0.
    """

    component: str
    source: str
    lora: tuple[LoraUse, ...] = ()
    quantization: str = "none"
    shape: str = DYNAMIC
    device: str = "CPU"
    properties: tuple[tuple[str, str], ...] = ()
    openvino: str = ""
    tokens: int = 0

    @property
    def is_seen(self) -> bool:
        """Whether its source is here and has a fingerprint; see `unseen_key`."""
        return not self.source.endswith(_UNSEEN)

    @property
    def graph(self) -> GraphKey:
        """What is read for it."""
        if self.quantization == "none":
            return GraphKey(self.source)
        return GraphKey(self.source, self.quantization, self.lora)

    @property
    def fused(self) -> tuple[LoraUse, ...]:
        """The LoRAs that are not in its graph yet when that is read."""
        return self.lora if self.quantization == "none" else ()

    @cached_property
    def digest(self) -> str:
        """
        Sixteen hexadecimal digits that stand for the key in logs and file names.

        Empty where the source has no fingerprint yet.
        """
        if not self.is_seen:
            return ""
        loras = [f"{use.digest}@{use.weight!r}{use.blocks or ''}" for use in self.lora]
        plain = [getattr(self, each.name) for each in fields(self) if each.name != "lora"]
        facts = (*plain, loras)
        return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()

    def changes_from(self, old: ComponentKey) -> tuple[str, ...]:
        """Return each field that differs, as ``"field: old -> new"``."""
        names = [each.name for each in fields(self)]
        pairs = [(name, getattr(old, name), getattr(self, name)) for name in names]
        return tuple(
            f"{name}: {_shown(before)} -> {_shown(after)}"
            for name, before, after in pairs
            if before != after
        )


def _shown(value: str | int | tuple[object, ...]) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    texts = ("=".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return "+".join(texts) or "none"


def unseen_key(component: str, device: str, quantization: str = "none") -> ComponentKey:
    """Return what stands for a component's key until it is downloaded and exported."""
    return ComponentKey(component, component + _UNSEEN, quantization=quantization, device=device)


@dataclass(frozen=True)
class Setup:
    """
    Everything besides a request that decides what must be compiled.

    Attributes:
        sources: Fingerprint of each component.
        devices: OpenVINO device of each component.
        properties: Effective OpenVINO properties of each component.
        quantization: Of the denoiser.
        static: Whether the denoiser and the VAE are compiled for one size each.
        loras: LoRA set in force.
        openvino: OpenVINO's version.
    """

    sources: Mapping[str, str]
    devices: Mapping[str, str]
    properties: Mapping[str, tuple[tuple[str, str], ...]]
    quantization: str = "none"
    static: bool = False
    loras: tuple[LoraUse, ...] = field(default=())
    openvino: str = ""

    def with_loras(self, loras: tuple[LoraUse, ...]) -> Setup:
        """Return the same setup with another LoRA set."""
        return replace(self, loras=loras)


def keys_for(
    family: Family, setup: Setup, mode: Mode, geometry: Geometry, scale: Scale
) -> dict[str, ComponentKey]:
    """Return the key of each component that `mode` needs for images of this geometry."""
    static = setup.static and not family.reads_whole
    return {
        name: ComponentKey(
            component=name,
            source=setup.sources[name],
            lora=tuple(
                use.on(name) for use in setup.loras if name in use.components and use.weight != 0
            ),
            quantization=setup.quantization if name == family.denoiser else "none",
            shape=_shape_text(family.static_shape(name, geometry, scale), static=setup.static),
            tokens=scale.tokens * geometry.chunks * (static and name == family.denoiser),
            device=setup.devices[name],
            properties=setup.properties[name],
            openvino=setup.openvino,
        )
        for name in family.components(mode)
    }


def _shape_text(shape: tuple[int, ...], *, static: bool) -> str:
    return "x".join(map(str, shape)) if static and shape else DYNAMIC
