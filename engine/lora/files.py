"""LoRA files: read, taken apart into layers, and refused where they are anything else."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from holdfast.engine.errors import LoraError
from holdfast.engine.imports import heavy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np
    import torch

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_FAMILIES = {"sd": "SD 1.x and 2.x", "sdxl": "SDXL"}

# What a key contains if its file is not a plain LoRA, and what it is then.
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "OFT": re.compile(r"\.b?oft_"),
    "IA3": re.compile(r"\.on_input$"),
    "LoCon with Tucker decomposition": re.compile(r"\.lora_mid\."),
    "LoRA with biases": re.compile(r"\.lora_(B|up)\.bias$"),
    "a difference of whole weights": re.compile(r"\.diff(_b)?$"),
}

# What only the keys of a file contain that was trained for models of this kind.
_TRANSFORMER = re.compile(
    r"^(transformer|diffusion_model|base_model\.model\.transformer)\.|^lora_transformer_"
    r"|^lora_unet_(double|single|joint)_blocks|^lora_te3_|^text_encoder_3\."
)
_SDXL = re.compile(
    r"^lora_te[12]_|^text_encoder_2\.|(input|output)_blocks|middle_block|add_embedding|label_emb"
)
_SD = re.compile(r"^lora_te_")

_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# torch.save() writes a zip archive with a pickle in it.
_ZIP = b"PK\x03\x04"
_LISTED = 5
# Up to so many multiplications OpenBLAS uses one thread. Thin products gain nothing from more, and
# lose much where the cores are busy; blocks of this size also stay in the processor's cache.
_ONE_THREAD = 2**18
_ROWS = 32


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """
    What a LoRA adds to one linear or convolution weight.

    Attributes:
        down: float32, ``[rank, in]`` or ``[rank, in, height, width]``.
        up: float32, ``[out, rank]`` or ``[out, rank, 1, 1]``.
        alpha: The delta is scaled by ``alpha / rank``.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the torch weight that the layer is for, output channels first."""
        return (self.up.shape[0], *self.down.shape[1:])

    def add_to(self, weights: np.ndarray, weight: float) -> None:
        """
        Add ``weight * alpha / rank * up @ down`` to a torch weight, in place.

        Args:
            weights: float32 of :attr:`shape`; a convolution's must be contiguous.
            weight: How strongly the LoRA works.
        """
        rank = len(self.down)
        up = self.up.reshape(-1, rank) * (weight * self.alpha / rank)
        down = self.down.reshape(rank, -1)
        flat = weights.reshape(len(up), -1)
        width = max(1, _ONE_THREAD // (_ROWS * rank))
        for left in range(0, flat.shape[1], width):
            columns = slice(left, left + width)
            for top in range(0, len(up), _ROWS):
                rows = slice(top, top + _ROWS)
                flat[rows, columns] += up[rows] @ down[:, columns]


@dataclass(frozen=True)
class LoraFile:
    """
    A LoRA file's content. Two are equal when their content is, wherever the files lie.

    Attributes:
        name: The file's name without its suffix.
        digest: SHA-256 of the file's bytes, hexadecimal.
        layers: For each component (``"unet"``, ``"text_encoder"``, ``"text_encoder_2"``) that the
            file changes, the layers by torch module path, for example
            ``"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"``.
    """

    name: str = field(compare=False)
    digest: str
    layers: Mapping[str, Mapping[str, LoraLayer]] = field(compare=False, repr=False)


class _Adapter(BaseModel):
    """What PEFT writes beside the matrices of one component; without it alpha is the rank."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False

    def alpha(self, module: str, rank: int) -> float:
        """Return the alpha of a module's layer, such that ``alpha / rank`` is its scale."""
        alpha = rank if self.lora_alpha is None else self.lora_alpha
        for name, value in self.alpha_pattern.items():
            if f".{module}".endswith(f".{canonical(name.removeprefix('^'))}"):
                alpha = value
                break
        # Rank-stabilised LoRA divides by the root of the rank (arXiv:2312.03732).
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def read_lora(path: Path, family: str = "sd") -> LoraFile:
    """
    Read a LoRA from a ``.safetensors`` file in the format of diffusers (PEFT) or of kohya.

    Args:
        path: The file.
        family: What the model is: ``"sd"`` (SD 1.x and 2.x) or ``"sdxl"``.

    Returns:
        The file's layers as float32. Whether they fit a model is for :func:`check` to say.

    Raises:
        LoraError: The file is missing, a pickle, damaged, made for another family of models, of a
            kind other than LoRA, incomplete, or holds values that are not finite numbers.
    """
    if family not in _FAMILIES:
        raise LoraError(
            f"LoRA {path} was asked for on a model of the family {family!r}, but LoRA works for "
            f"{' and '.join(_FAMILIES.values())} alone. Ask for this model without a LoRA."
        )
    digest, tensors, adapters = _contents(path)
    alphas = {
        key.removesuffix(".alpha"): tensors.pop(key) for key in [*tensors] if key.endswith(".alpha")
    }
    _refuse_foreign(path, tensors, family)
    layers: dict[str, dict[str, LoraLayer]] = {}
    for (component, module), keys in _pairs(path, tensors, family).items():
        if keys.keys() != {"A", "B"}:
            raise LoraError(
                f"LoRA {path} holds only one of the two matrices of {component}.{module}: "
                f"{listed(keys.values())}. Get the whole file."
            )
        down, up = (tensors[keys[side]].float().numpy() for side in "AB")
        stem = keys["A"].removesuffix(".lora_down.weight")
        alpha = (
            alphas.pop(stem).float().numpy()
            if stem in alphas
            else adapters[component].alpha(module, rank=len(down))
        )
        layer = _layer(path, f"{component}.{module}", down, up, alpha)
        layers.setdefault(component, {})[module] = layer
    if alphas:
        raise LoraError(
            f"LoRA {path} holds an alpha, but no matrices, for {listed(alphas)}. "
            "Get the whole file."
        )
    return LoraFile(
        name=path.stem,
        digest=digest,
        layers=MappingProxyType({name: MappingProxyType(part) for name, part in layers.items()}),
    )


def _contents(path: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, _Adapter]]:
    """Return the digest, the tensors and the adapter settings of one reading of the file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
            if path.suffix.lower() != ".safetensors" or start == _ZIP:
                raise LoraError(
                    f"LoRA {path} is not a .safetensors file. Other formats are pickles, which "
                    "can run code when they are read: they are refused. Convert it to .safetensors."
                )
            data = start + file.read()
    except OSError as error:
        raise LoraError(
            f"LoRA {path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    heavy()
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        settings = json.loads(header.get("lora_adapter_metadata", "{}"))
        adapters = {
            component: _Adapter.model_validate(
                {
                    key.removeprefix(f"{component}."): value
                    for key, value in settings.items()
                    if key.startswith(f"{component}.")
                }
            )
            for component in _COMPONENTS
        }
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise LoraError(
            f"LoRA {path} is damaged or not a .safetensors file: {error}. Get the file again."
        ) from error
    return hashlib.sha256(data).hexdigest(), tensors, adapters


def _refuse_foreign(path: Path, keys: Iterable[str], family: str) -> None:
    """Refuse another kind of adapter, and a LoRA whose keys tell that it is for other models."""
    others = {"sd": (_TRANSFORMER, _SDXL), "sdxl": (_TRANSFORMER, _SD)}[family]
    names = {_TRANSFORMER: "a transformer (Flux, SD3)", _SDXL: "SDXL", _SD: "SD 1.x or 2.x"}
    for key in keys:
        for kind, mark in _OTHER_KINDS.items():
            if mark.search(key):
                raise LoraError(
                    f"LoRA {path} is {kind} (it holds {key!r}), which is not supported. "
                    "Use a LoRA of linear and convolution layers."
                )
        for other in others:
            if other.search(key):
                raise LoraError(
                    f"LoRA {path} was trained for {names[other]} (it holds {key!r}), but the "
                    f"model is {_FAMILIES[family]}. Use a LoRA trained for this model."
                )


def _pairs(path: Path, keys: Iterable[str], family: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return for each (component, torch module path) the file's keys: down is "A", up is "B"."""
    from diffusers.loaders import (
        StableDiffusionLoraLoaderMixin,
        StableDiffusionXLLoraLoaderMixin,
    )
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    # The converters rename keys and never look at values: what goes in as value is the key itself.
    named = {key: key for key in keys}
    try:
        if family == "sd":
            renamed, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(named)
        else:
            renamed, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
                named, unet_config=SimpleNamespace(layers_per_block=2)
            )
    except (ValueError, KeyError) as error:
        raise LoraError(
            f"LoRA {path} has keys that diffusers cannot convert: {error}. "
            "Use a LoRA in the format of diffusers or kohya, and get the whole file."
        ) from error
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for name, key in renamed.items():
        component, _, rest = name.partition(".")
        if component == "unet":
            (peft,) = convert_unet_state_dict_to_peft({rest: key})
        else:
            (peft,) = convert_state_dict_to_peft(
                convert_state_dict_to_peft({rest: key}, StateDictType.DIFFUSERS_OLD),
                StateDictType.DIFFUSERS,
            )
        weight = _WEIGHT.fullmatch(peft)
        if component in _COMPONENTS and weight:
            pair = pairs.setdefault((component, canonical(weight["module"])), {})
            pair[weight["side"]] = key
    used = {key for pair in pairs.values() for key in pair.values()}
    if unknown := named.keys() - used:
        raise LoraError(
            f"LoRA {path} has keys that name no layer, or one twice: {listed(unknown)}. "
            "Use a LoRA in the format of diffusers or kohya."
        )
    if not pairs:
        raise LoraError(f"LoRA {path} holds no layers. Get the whole file.")
    return pairs


def _layer(
    path: Path, name: str, down: np.ndarray, up: np.ndarray, alpha: np.ndarray | float
) -> LoraLayer:
    """Make a layer of two matrices that fit each other and hold nothing but finite numbers."""
    import numpy as np

    match down.shape, up.shape:
        case ((rank, _), (_, same)) | ((rank, _, _, _), (_, same, 1, 1)) if (
            rank == same and down.size and np.size(alpha) == 1
        ):
            pass
        case _:
            raise LoraError(
                f"LoRA {path} holds matrices of {name} that do not fit each other: down "
                f"{down.shape}, up {up.shape}. The file is damaged; get it again."
            )
    if not (np.isfinite(down).all() and np.isfinite(up).all() and np.isfinite(alpha)):
        raise LoraError(
            f"LoRA {path} holds values of {name} that are not finite numbers. "
            "Its training diverged or the file is damaged; use another one."
        )
    return LoraLayer(down, up, float(alpha))


def canonical(module: str) -> str:
    """Return a module path as all versions of transformers have it (some leave out a prefix)."""
    return module.removeprefix("text_model.")


def listed(names: Iterable[str]) -> str:
    """Return the first names in their order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return "; ".join(ordered[:_LISTED]) + more
