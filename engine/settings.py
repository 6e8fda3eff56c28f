"""From what a host sets to what keys are made of: the model, devices, properties and LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.devices import check_components, effective_properties, wants_static_shapes
from holdfast.engine.keys import LoraUse, Setup
from holdfast.engine.model import Model
from holdfast.engine.quantize import quantize
from holdfast.engine.source import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.engine.compiler import Compiler
    from holdfast.engine.config import EngineConfig
    from holdfast.engine.events import Emitter
    from holdfast.engine.requests import Lora


@dataclass(frozen=True)
class Settings:
    """
    What a pipeline is set to, and what follows from it.

    Attributes:
        config: As the host gave it.
        model: That it names.
        setup: What the keys of the model's components are made from.
    """

    config: EngineConfig
    model: Model
    setup: Setup


class Resolver:
    """
    Works settings out, and tells the compiler where the files lie.

    Args:
        compiler: Knows the devices, and reads LoRA files.
        cache_dir: Where exported models go.
        emit: Where events go.
    """

    def __init__(self, compiler: Compiler, cache_dir: Path, emit: Emitter) -> None:
        self._compiler = compiler
        self._cache_dir = cache_dir
        self._emit = emit
        self._found: tuple[tuple[object, object], Model] | None = None

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
        int8 = config.precision.startswith("int8")
        setup = Setup(
            sources={name: model.source(name) for name in names},
            devices={name: config.device_of(name) for name in names},
            properties={name: effective_properties(config, name, compiler.core) for name in names},
            quantization=config.precision if int8 else "none",
            static=wants_static_shapes(config, model.family.denoiser, compiler.core),
            loras=self.identify(config.lora, model),
            openvino=compiler.openvino_version,
        )
        for name in names:
            compiler.know_source(
                model.source(name), model.file(name), probe_side=model.probe_side(name)
            )
        if config.precision in ("int8", "int8-weights"):
            denoiser = model.family.denoiser
            compiler.know_source(
                model.source(denoiser),
                quantize(model.folder, config.precision, self._cache_dir, self._emit),
                quantization=config.precision,
                probe_side=model.probe_side(denoiser),
            )
        return Settings(config, model, setup)

    def identify(self, loras: tuple[Lora, ...], model: Model) -> tuple[LoraUse, ...]:
        """
        Identify LoRA files, in the one order that keys have them.

        Raises:
            LoraError: A file is refused.
        """
        shelf, family = self._compiler.loras, model.family.name
        uses = (shelf.use(lora.path, lora.weight, family) for lora in loras)
        return tuple(sorted(uses, key=lambda use: (use.digest, use.weight)))

    def _model(self, config: EngineConfig) -> Model:
        named = (config.model, config.vae)
        if self._found is None or self._found[0] != named:
            folder = resolve(config.model, self._cache_dir, self._emit)
            vae = None if config.vae is None else resolve(config.vae, self._cache_dir, self._emit)
            self._found = (named, Model(folder, vae))
        return self._found[1]
