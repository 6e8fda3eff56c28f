"""From what a host sets to what keys are made of: the model, devices, properties and LoRAs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from holdfast.engine.compiler import Source
from holdfast.engine.devices import (
    PRECISION,
    check_components,
    effective_properties,
    wants_static_shapes,
)
from holdfast.engine.families import VAE_DECODER, VAE_ENCODER, Geometry, family_of
from holdfast.engine.keys import Setup, keys_for, unseen_key
from holdfast.engine.memory import budget_bytes
from holdfast.engine.model import Model
from holdfast.engine.quantize import KINDS
from holdfast.engine.source import missing, resolve
from holdfast.engine.tiling import STRIDES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from holdfast.engine.compiler import Compiler
    from holdfast.engine.config import EngineConfig
    from holdfast.engine.diskcache import DiskCache
    from holdfast.engine.events import Emitter
    from holdfast.engine.keys import ComponentKey, LoraUse
    from holdfast.engine.requests import Lora
    from holdfast.engine.source import Missing, ModelFolder
    from holdfast.states import Mode


@dataclass(frozen=True)
class Settings:
    """
    What a pipeline is set to, and what follows from it.

    Attributes:
        config: As the host gave it.
        model: That it names.
        setup: What the keys of the model's components are made from.
        bytes: Returns what a component takes in memory.
    """

    config: EngineConfig
    model: Model
    setup: Setup
    bytes: Callable[[ComponentKey], int]

    def keys(
        self, mode: Mode, geometry: Geometry | None, loras: tuple[LoraUse, ...] | None = None
    ) -> dict[str, ComponentKey]:
        """
        Return the key of each component that a mode needs.

        Args:
            mode: That is to be served.
            geometry: Of its images; where the model cannot make that, or for None, its own.
            loras: In place of those of the settings, or None.
        """
        scale, setup = self.model.scale, self.setup
        if geometry is None or geometry.width % scale.multiple or geometry.height % scale.multiple:
            geometry = Geometry(scale.default, scale.default)
        if loras is not None:
            setup = setup.with_loras(loras)
        keys = keys_for(self.model.family, setup, mode, geometry, scale)
        room = budget_bytes(self.config.memory_budget) - sum(map(self.bytes, keys.values()))
        vae = {VAE_DECODER, VAE_ENCODER} & keys.keys()
        return keys | {
            name: replace(keys[name], shape=self._shape(keys[name], geometry, room)) for name in vae
        }

    def _shape(self, vae: ComponentKey, geometry: Geometry, room: int) -> str:
        """Return the shape of a VAE that there is room for, and the least work; else the least."""
        possible = {vae.shape: 1} | {
            shape: stride for shape, stride in STRIDES.items() if stride <= self.model.scale.factor
        }
        precision = dict(vae.properties)[PRECISION]
        needed = {
            shape: self.model.vae_bytes(geometry.width, geometry.height, precision, stride)
            for shape, stride in possible.items()
        }
        fitting = (shape for shape, scratch in needed.items() if scratch <= room)
        return next(fitting, min(needed, key=needed.__getitem__))


class Resolver:
    """
    Works settings out, and tells the compiler where the files lie.

    The exports that it has found are kept from being pruned, by whichever process, until `keep`.

    Args:
        compiler: Knows the devices, and reads LoRA files.
        cache: Where exported models go.
        emit: Where events go.
    """

    def __init__(self, compiler: Compiler, cache: DiskCache, emit: Emitter) -> None:
        self._compiler = compiler
        self._cache = cache
        self._emit = emit
        self._found: tuple[tuple[object, object], Model] | None = None
        self._holds = cache.holds()

    def missing(self, config: EngineConfig) -> Mapping[str, Missing]:
        """
        Return what `settings` would download or export first: of ``"model"`` and of ``"vae"``.

        Raises:
            ModelSourceError: One of them is not there, or is refused.
        """
        if self._found is not None and self._found[0] == (config.model, config.vae):
            return {}
        named = {"model": config.model} | ({} if config.vae is None else {"vae": config.vae})
        found = {
            field: missing(name, self._cache.root, self._emit) for field, name in named.items()
        }
        return {field: each for field, each in found.items() if each is not None}

    def foresee(
        self,
        config: EngineConfig,
        mode: Mode,
        geometry: Geometry | None,
        missing: Mapping[str, Missing],
    ) -> dict[str, ComponentKey]:
        """
        Return what stands for the keys of a mode's components while something is missing.

        Args:
            config: What is asked for.
            mode: That is to be served.
            geometry: As for `Settings.keys`.
            missing: From the method of this name.

        Returns:
            Keys, of which those of a missing VAE or model are not known; none at all where a model
            must be downloaded for it to be known what it consists of.
        """
        if "model" not in missing:
            found = self.settings(config.but(vae=None))
            keys = found.keys(mode, geometry)
            gone = {VAE_DECODER, VAE_ENCODER} & keys.keys()
            return keys | {name: unseen_key(name, config.device_of(name)) for name in gone}
        if not missing["model"].class_name:
            return {}
        family = family_of(missing["model"].class_name)
        kinds = {family.denoiser: _quantization(config)}
        return {
            name: unseen_key(name, config.device_of(name), kinds.get(name, "none"))
            for name in family.components(mode)
        }

    def settings(self, config: EngineConfig) -> Settings:
        """
        Return what follows from `config`. Nothing is compiled.

        Raises:
            ModelSourceError: The model or a LoRA is refused.
            InvalidRequest: A device or component does not exist, or cannot do what was asked.
        """
        model, compiler = self._model(config), self._compiler
        names = model.family.all_components
        check_components(config, names)
        setup = Setup(
            sources={name: model.source(name) for name in names},
            devices={name: config.device_of(name) for name in names},
            properties={name: effective_properties(config, name, compiler.core) for name in names},
            quantization=_quantization(config),
            static=wants_static_shapes(config, model.family.denoiser, compiler.core),
            loras=self.identify(config.lora, model),
            openvino=compiler.openvino_version,
        )
        for name in names:
            compiler.know_source(
                model.source(name), Source(model.folder_of(name), name, model.probe_side(name))
            )
        return Settings(config, model, setup, compiler.bytes)

    def identify(self, loras: tuple[Lora, ...], model: Model) -> tuple[LoraUse, ...]:
        """
        Identify LoRA files, in the one order that keys have them.

        Raises:
            LoraError: A file is refused.
        """
        shelf, family = self._compiler.loras, model.family.name
        uses = (shelf.use(lora.path, lora.weight, family) for lora in loras)
        return tuple(sorted(uses, key=lambda use: (use.digest, use.weight)))

    def keep(self, settings: Settings | None) -> None:
        """Let go of every model that was found but that of these settings."""
        model = None if settings is None else settings.model
        if self._found is not None and self._found[1] is not model:
            self._found = None
        self._holds.keep(() if model is None else model.paths)

    def _model(self, config: EngineConfig) -> Model:
        named = (config.model, config.vae)
        if self._found is None or self._found[0] != named:
            folder = self._resolved(config.model)
            vae = None if config.vae is None else self._resolved(config.vae)
            self._found = (named, Model(folder, vae))
            self._cache.prune()
        return self._found[1]

    def _resolved(self, model: str | Path) -> ModelFolder:
        found = resolve(model, self._cache.root, self._emit)
        if found.path.parent == self._cache.exports and found.path not in self._holds:
            self._holds.add(found.path)
            if not found.path.exists():  # another process has pruned it just before
                found = resolve(model, self._cache.root, self._emit)
        return found


def _quantization(config: EngineConfig) -> str:
    return config.precision if config.precision in KINDS else "none"
