"""From what a host sets to what keys are made of: the model, devices, properties and LoRAs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from holdfast.engine.compiling.compiler import Source
from holdfast.engine.compiling.devices import (
    PRECISION,
    check_components,
    effective_properties,
    physical_devices,
    told_device,
    wants_static_shapes,
)
from holdfast.engine.compiling.keys import Setup, keys_for, unseen_key
from holdfast.engine.compiling.memory import budget_bytes
from holdfast.engine.compiling.quantize import KINDS
from holdfast.engine.errors import LoraError
from holdfast.engine.graphs.vae_tiles import STRIDES
from holdfast.engine.models.families import VAE_DECODER, VAE_ENCODER, Geometry
from holdfast.engine.models.model import Model
from holdfast.engine.models.source import missing, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from holdfast.engine.compiling.compiler import Compiler
    from holdfast.engine.compiling.keys import ComponentKey
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.lora import LoraUse
    from holdfast.engine.models.diskcache import DiskCache
    from holdfast.engine.models.source import Missing, ModelFolder, Role
    from holdfast.engine.requests.config import EngineConfig
    from holdfast.engine.requests.lora import Lora
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

        Raises:
            InvalidRequest: The model lacks a component that the mode needs.
        """
        self.model.check_mode(mode)
        scale, setup = self.model.scale, self.setup
        if geometry is None or geometry.width % scale.multiple or geometry.height % scale.multiple:
            geometry = Geometry(*scale.default)
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
        strides = STRIDES if self.model.family.cuts_vae else {}
        possible = {vae.shape: 1} | {
            shape: stride for shape, stride in strides.items() if stride <= self.model.scale.factor
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
        self._found: dict[tuple[object, object], Model] = {}
        self._holds = cache.holds()
        self._told: set[str] = set()

    def missing(self, config: EngineConfig) -> Mapping[str, Missing]:
        """
        Return what `settings` would download or export first: of ``"model"`` and of ``"vae"``.

        Raises:
            ModelSourceError: One of them is not there, or is refused.
        """
        if self._known(config) is not None:
            return {}
        named = {"model": config.model} | ({} if config.vae is None else {"vae": config.vae})
        roles: dict[str, Role] = {"model": "model", "vae": "vae"}
        found = {
            field: missing(name, self._cache.root, self._emit, roles[field])
            for field, name in named.items()
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
        family = missing["model"].family
        if family is None:
            return {}
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
            properties={
                name: effective_properties(
                    config, name, compiler.core, overflows=model.overflows(name)
                )
                for name in names
            },
            quantization=_quantization(config),
            static=wants_static_shapes(config, model.family.denoiser, compiler.core),
            loras=self.identify(config.lora, model),
            openvino=compiler.openvino_version,
        )
        self._tell_devices(setup.devices.values())
        for name in names:
            compiler.know_source(
                model.source(name),
                Source(model.folder_of(name), name, model.family, model.scale),
            )
        return Settings(config, model, setup, compiler.bytes)

    def _tell_devices(self, asked: Iterable[str]) -> None:
        """Log each physical device when it is asked for first."""
        core = self._compiler.core
        for device in dict.fromkeys(one for each in asked for one in physical_devices(core, each)):
            if device not in self._told:
                self._told.add(device)
                self._emit("device.found", **told_device(core, device))

    def identify(self, loras: tuple[Lora, ...], model: Model) -> tuple[LoraUse, ...]:
        """
        Identify LoRA files, in the one order that keys have them.

        Raises:
            LoraError: A file is refused, or the model takes none.
        """
        known, family = self._compiler.loras, model.family
        if loras and not family.takes_loras:
            names = ", ".join(lora.path.name for lora in loras)
            msg = (
                f"LoRA {names} was asked for, but the model is a {model.folder.class_name}, and "
                "LoRA works with Stable Diffusion 1.x, 2.x and XL alone. Leave it out."
            )
            raise LoraError(msg)
        parts = (*family.text_encoders, family.denoiser)
        uses = (known.use(lora.path, lora.weight, parts, lora.blocks) for lora in loras)
        return tuple(sorted(uses, key=lambda use: (use.digest, use.weight, use.blocks)))

    def keep(self, *settings: Settings) -> None:
        """Let go of every model that was found but those of these settings."""
        models = [each.model for each in settings]
        self._found = {name: found for name, found in self._found.items() if found in models}
        self._holds.keep(frozenset().union(*(model.paths for model in models)))

    def _model(self, config: EngineConfig) -> Model:
        model = self._known(config)
        if model is None:
            folder = self._resolved(config.model, "model")
            vae = None if config.vae is None else self._resolved(config.vae, "vae")
            model = Model(folder, vae)
            self._found[config.model, config.vae] = model
            self._cache.prune()
        return model

    def _known(self, config: EngineConfig) -> Model | None:
        """Return the model that these settings name, where it was found and is what it was."""
        model = self._found.get((config.model, config.vae))
        return model if model is not None and model.is_unchanged else None

    def _resolved(self, model: str | Path, role: Role) -> ModelFolder:
        found = resolve(model, self._cache.root, self._emit, role=role)
        if found.path.parent == self._cache.exports:
            self._holds.add(found.path)
            if not found.path.exists():  # another process has pruned it just before
                found = resolve(model, self._cache.root, self._emit, role=role)
        return found


def _quantization(config: EngineConfig) -> str:
    return config.precision if config.precision in KINDS else "none"
