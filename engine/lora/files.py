"""LoRA files: read, taken apart into layers, and refused where they are anything else."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from holdfast.engine.errors import LoraError
from holdfast.engine.imports import heavy
from holdfast.engine.lora.changes import change_of
from holdfast.engine.lora.names import flat, is_peft, layer_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    import numpy as np
    import torch

    from holdfast.engine.lora.changes import Change

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

# What a key says for certain that is no layer's, and what to do about it.
_OTHERS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "a whole checkpoint": (
        re.compile(
            r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\."
        ),
        "Give it as `model`, and as `lora` a file that changes one.",
    ),
    "a textual inversion embedding": (
        re.compile(r"(emb_params|clip_[lg]|string_to_param)(\..*)?|\*"),
        "It is no LoRA, and changes no weights.",
    ),
    "a LoRA with an embedding in it": (
        re.compile(r"bundle_emb\..+"),
        "Use a file without one.",
    ),
    "IA3": (re.compile(r".+\.on_input"), "Its kind is not supported; use a LoRA."),
    "GLoRA": (
        re.compile(r".+\.(a[12]|b[12m])\.weight"),
        "Its kind is not supported, as two layouts of it have the same names; use a LoRA.",
    ),
    "OFT as PEFT or old trainers store it": (
        re.compile(r".+\.(oft_[rRsd]\w*|boft_\w+)(\..+)?"),
        "That layout is not supported; LyCORIS' `oft_blocks` is.",
    ),
    "a LoRA that changes biases": (
        re.compile(r".+\.(diff_b|lora_(B|up)\.bias)"),
        "Only the weights of linear and convolution layers can be changed.",
    ),
    "a LoRA that changes norms": (
        re.compile(r".+\.[wb]_norm"),
        "Only the weights of linear and convolution layers can be changed.",
    ),
    "a model's weights, or a part of them": (
        re.compile(
            r"(?!base_model\.)(?!.*lora)"
            r"(.+\.)?(conv_in|conv_out|to_[qkv]|[qkv]_proj|in_layers\.\d|conv[12])\.(weight|bias)"
        ),
        "Give a model as `model`, and as `lora` a file that changes one.",
    ),
}

# torch.save() writes a zip archive with a pickle in it.
_ZIP = b"PK\x03\x04"
# What PEFT keeps beside a file.
SETTINGS = "adapter_config.json"
_LISTED = 5


@dataclass(frozen=True)
class LoraFile:
    """
    A LoRA file's content. Two are equal when their content is, wherever the files lie.

    Attributes:
        name: The file's name without its suffix.
        digest: SHA-256 of the file's bytes, hexadecimal, and of PEFT's settings where those lie
            beside.
        layers: For each component (``"unet"``, ``"text_encoder"``, ``"text_encoder_2"``) that the
            file changes, its changes by layer, named flat as kohya has it, for example
            ``"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"``. Which module of a
            graph that is, `fusion.check` finds out.
    """

    name: str = field(compare=False)
    digest: str
    layers: Mapping[str, Mapping[str, Change]] = field(compare=False, repr=False)


class _Adapter(BaseModel):
    """What PEFT writes beside the matrices of one component; without it alpha is the rank."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    lora_alpha: float | None = Field(
        default=None, validation_alias=AliasChoices("lora_alpha", "alpha")
    )
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False

    def alpha(self, layer: str, rank: int | None) -> float | None:
        """Return the alpha of a layer, such that ``alpha / rank`` is its scale."""
        alpha = self.lora_alpha
        for name, value in self.alpha_pattern.items():
            if f"_{layer}".endswith(f"_{flat(name.removeprefix('^'))}"):
                alpha = value
                break
        # Rank-stabilised LoRA divides by the root of the rank (arXiv:2312.03732).
        if self.use_rslora and rank is not None:
            return (rank if alpha is None else alpha) * math.sqrt(rank)
        return alpha


def read_lora(path: Path, components: Collection[str] = ("unet", "text_encoder")) -> LoraFile:
    """
    Read a LoRA from a ``.safetensors`` file as diffusers, PEFT, kohya, LyCORIS or ComfyUI write it.

    Args:
        path: The file.
        components: Of the model, those that a LoRA can change.

    Returns:
        What the file does to each layer that it names. Whether a model has these layers is for
        `fusion.check` to say.

    Raises:
        LoraError: The file is missing, a pickle, damaged, no LoRA, of a kind that is not
            supported, incomplete, changes a component that the model has not, or holds values that
            are not finite numbers.
    """
    digest, tensors, adapters = _contents(path)
    layers: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for key in tensors:
        named = layer_key(key, components)
        if named is None:
            unknown.append(key)
            continue
        roles = layers.setdefault((named.component, named.layer), {})
        if named.role in roles:
            raise LoraError(
                f"LoRA {path} names one layer twice: {listed([key, roles[named.role]])}. "
                "The file is damaged; get it again."
            )
        roles[named.role] = key
    _refuse_unknown(path, unknown)
    changes: dict[str, dict[str, Change]] = {}
    for (component, layer), keys in layers.items():
        if component not in components:
            example = next(iter(keys.values()))
            raise LoraError(
                f"LoRA {path} changes the {component} (it holds {example!r}), and this model has "
                f"{', '.join(sorted(components))} only. Use a LoRA that was trained for a model "
                "of this kind."
            )
        arrays = {role: _array(path, key, tensors[key]) for role, key in keys.items()}
        rank = len(arrays["down"]) if "down" in arrays and arrays["down"].ndim else None
        alpha = adapters[component].alpha(layer, rank)
        try:
            changes.setdefault(component, {})[layer] = change_of(arrays, alpha)
        except LoraError as error:
            stem = min(keys.values(), key=len).rpartition(".")[0]
            msg = f"LoRA {path} {error} for {component}.{layer} ({stem}). Get the whole file."
            raise LoraError(msg) from error
    if not changes:
        raise LoraError(f"LoRA {path} holds no layers. Get the whole file.")
    return LoraFile(
        name=path.stem,
        digest=digest,
        layers=MappingProxyType({name: MappingProxyType(part) for name, part in changes.items()}),
    )


def _contents(path: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, _Adapter]]:
    """Return the digest, the tensors and the adapter settings of one reading of the file."""
    data = _bytes(path)
    heavy()
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        settings, beside = _settings(path, data, tensors)
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
    # A header is a stranger's text: whatever its reader stumbles over, the file is damaged.
    except (
        SafetensorError, ValueError, LookupError, AttributeError, TypeError, RecursionError,
        OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise LoraError(
            f"LoRA {path} is damaged or not a .safetensors file: {error}. Get the file again."
        ) from error
    return hashlib.sha256(data + beside).hexdigest(), tensors, adapters


def _bytes(path: Path) -> bytes:
    """Read a file whole that is a .safetensors file by name and beginning."""
    try:
        # What is no file may never end, or never begin.
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise LoraError(f"LoRA {path} is a device or a pipe. Give a .safetensors file.")
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
            if path.suffix.lower() != ".safetensors" or start == _ZIP:
                raise LoraError(
                    f"LoRA {path} is not a .safetensors file. Other formats are pickles, which "
                    "can run code when they are read: they are refused. Convert it to .safetensors."
                )
            return start + file.read()
    except OSError as error:
        raise LoraError(
            f"LoRA {path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error


def _settings(path: Path, data: bytes, keys: Collection[str]) -> tuple[dict[str, Any], bytes]:
    """Return PEFT's settings by ``"<component>.<name>"``, and their bytes if from another file."""
    if any(is_peft(key) for key in keys) and not any(key.endswith(".alpha") for key in keys):
        config = path.with_name(SETTINGS)
        try:
            beside = config.read_bytes()
        except OSError as error:
            msg = (
                f"LoRA {path} was written by PEFT, which keeps alpha in {SETTINGS}, and "
                f"that cannot be read beside it: {error.strerror}. Put it there."
            )
            raise LoraError(msg) from error
        settings = json.loads(beside)
        names = {f"{part}.{key}": settings[key] for part in _COMPONENTS for key in settings}
        return names, beside
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return json.loads(header.get("lora_adapter_metadata", "{}")), b""


def _refuse_unknown(path: Path, keys: Collection[str]) -> None:
    """Refuse a file with keys that are no layer's; what they are is told where that is certain."""
    for kind, (mark, advice) in _OTHERS.items():
        for key in keys:
            if mark.fullmatch(key) or (kind == "a whole checkpoint" and mark.match(key)):
                raise LoraError(f"LoRA {path} is {kind} (it holds {key!r}). {advice}")
    if keys:
        raise LoraError(
            f"LoRA {path} has {len(keys)} keys that name no layer's part: {listed(keys)}. "
            "Use a LoRA as diffusers, PEFT, kohya, LyCORIS or ComfyUI write it."
        )


def _array(path: Path, key: str, tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as float32, and refuse what is not finite numbers."""
    import numpy as np

    try:
        array: np.ndarray = tensor.float().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise LoraError(
            f"LoRA {path} holds {key!r} as {tensor.dtype}, which cannot be read: {error}. Use a "
            "file in 32 or 16 bits."
        ) from error
    if tensor.is_complex() or not np.isfinite(array).all():
        raise LoraError(
            f"LoRA {path} holds values of {key!r} that are not finite numbers. "
            "Its training diverged or the file is damaged; use another one."
        )
    return array


def listed(names: Iterable[str]) -> str:
    """Return the first names in their order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return "; ".join(ordered[:_LISTED]) + more
