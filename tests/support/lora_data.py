"""Tiny LoRAs with seeded random deltas for tiny models, written in both formats that people use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.models import original_unet_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Matrices = tuple[np.ndarray, np.ndarray]

KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Deltas:
    """
    What a LoRA adds, before it has a file format.

    Attributes:
        layers: (down, up) by component and module path, as diffusers and transformers call it
            (without ``text_model.``).
        alpha: One for all layers.
    """

    layers: Mapping[str, Mapping[str, Matrices]]
    alpha: float


def linear(module: str) -> bool:
    """Tell whether it is a projection of attention or a feed-forward layer of the UNet."""
    return "transformer_blocks" in module


def convolution(module: str) -> bool:
    """Tell whether it is a 1x1 or 3x3 convolution of the UNet, outside its first and last."""
    return module.endswith(("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "rs.0.conv"))


def make(
    weights: Mapping[str, Mapping[str, tuple[int, ...]]],
    wanted: Mapping[str, Callable[[str], bool]],
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 2.0,
    strength: float = 1.0,
) -> Deltas:
    """
    Draw deltas for the wanted modules.

    Args:
        weights: Shapes of a model's weights by component and module path.
        wanted: Which modules of a component the LoRA has.
        seed: Of the random numbers.
        rank: Of every layer.
        alpha: Of every layer.
        strength: Root mean square of ``alpha / rank * up @ down``, relative to that of a usual
            initial weight.
    """
    random = np.random.default_rng(seed)
    layers: dict[str, dict[str, Matrices]] = {}
    for component, is_wanted in wanted.items():
        for module, (outputs, *inputs) in sorted(weights[component].items()):
            if is_wanted(module):
                down = random.normal(size=(rank, *inputs)) / np.sqrt(np.prod(inputs))
                up = random.normal(size=(outputs, rank, *[1] * (len(inputs) - 1)))
                up *= strength * np.sqrt(rank) / alpha / np.sqrt(3)
                layers.setdefault(component, {})[module] = (
                    down.astype(np.float32),
                    up.astype(np.float32),
                )
    return Deltas(layers, alpha)


def kohya_tensors(deltas: Deltas) -> dict[str, np.ndarray]:
    """Return the deltas as kohya's trainer writes them."""
    tensors = {}
    of_two = "text_encoder_2" in deltas.layers
    for component, layers in deltas.layers.items():
        for module, (down, up) in layers.items():
            name = module if component == "unet" else transformers_name(module)
            prefix = (
                "lora_te1_" if of_two and component == "text_encoder" else KOHYA_PREFIX[component]
            )
            stem = prefix + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            tensors[f"{stem}.alpha"] = np.array(deltas.alpha, np.float32)
    return tensors


def write_kohya(path: Path, deltas: Deltas) -> Path:
    """Write the deltas as kohya's trainer does."""
    save_file(kohya_tensors(deltas), path)
    return path


def diffusers_tensors(deltas: Deltas) -> dict[str, np.ndarray]:
    """Return the deltas as diffusers' ``save_lora_weights`` writes them."""
    tensors = {}
    for component, layers in deltas.layers.items():
        for module, (down, up) in layers.items():
            stem = f"{component}.{module if component == 'unet' else transformers_name(module)}"
            tensors[f"{stem}.lora_A.weight"] = down
            tensors[f"{stem}.lora_B.weight"] = up
    return tensors


def write_diffusers(path: Path, deltas: Deltas, **settings: Any) -> Path:
    """Write the deltas, and PEFT's settings beside them, as ``save_lora_weights`` does."""
    adapters = {}
    for component, layers in deltas.layers.items():
        config = {
            "r": len(next(iter(layers.values()))[0]),
            "lora_alpha": deltas.alpha,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": [
                module if component == "unet" else transformers_name(module) for module in layers
            ],
            **settings,
        }
        adapters |= {f"{component}.{name}": value for name, value in config.items()}
    save_file(
        diffusers_tensors(deltas), path, metadata={"lora_adapter_metadata": json.dumps(adapters)}
    )
    return path


WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya}


def write_peft(path: Path, deltas: Deltas) -> Path:
    """Write the UNet's deltas as PEFT's ``save_pretrained`` does, its settings in a file beside."""
    tensors = {}
    for module, (down, up) in deltas.layers["unet"].items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(tensors, path)
    settings = {"lora_alpha": deltas.alpha, "peft_type": "LORA", "alpha_pattern": {}}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    return path


def write_comfy(path: Path, deltas: Deltas) -> Path:
    """Write the deltas as ComfyUI saves them: the UNet's with the original code base's names."""
    prefixes = {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    }
    tensors = {}
    for component, layers in deltas.layers.items():
        for module, (down, up) in layers.items():
            if component == "unet":
                stem = "diffusion_model." + original(module)
            else:
                stem = prefixes[component] + transformers_name(module)
            tensors[f"{stem}.lora_down.weight"] = down
            tensors[f"{stem}.lora_up.weight"] = up
            tensors[f"{stem}.alpha"] = np.array(deltas.alpha, np.float32)
    save_file(tensors, path)
    return path


def write_kohya_original(path: Path, deltas: Deltas) -> Path:
    """Write the UNet's deltas as kohya's trainer does for SDXL: original names, flat."""
    tensors = {}
    for module, (down, up) in deltas.layers["unet"].items():
        stem = "lora_unet_" + original(module).replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = down
        tensors[f"{stem}.lora_up.weight"] = up
        tensors[f"{stem}.alpha"] = np.array(deltas.alpha, np.float32)
    save_file(tensors, path)
    return path


def original(module: str) -> str:
    """Return the original code base's name of a module of the tiny UNet."""
    return original_unet_name(f"{module}.weight", layers=1).removesuffix(".weight")


def transformers_name(module: str) -> str:
    """Return a text encoder's module as files have it: all but the projection is one level down."""
    return module if module == "text_projection" else f"text_model.{module}"
