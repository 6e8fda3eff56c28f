"""LoRA tags: ``<lora:name:0.8>`` in a prompt."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class LoraTag:
    """
    A tag, read.

    Attributes:
        name: Of a file in the LoRA folder, without its ending.
        text_encoder: Weight on the text encoders.
        denoiser: Weight on the denoiser.
    """

    name: str
    text_encoder: float
    denoiser: float


def read_tag(tag: str) -> LoraTag:
    """
    Read ``<lora:name>``, ``<lora:name:weight>`` or ``<lora:name:te:unet>``; ``te=`` and ``unet=``
    may name the weights. ``lyco`` stands for ``lora``.

    Raises:
        InvalidRequest: It names another kind of network, or a weight is not a number.
    """
    kind, name, *rest = (part.strip() for part in tag[1:-1].split(":"))
    if kind == "hypernet":
        msg = f"{tag} stands in the prompt, but Holdfast runs no hypernetworks. Take it out."
        raise InvalidRequest(msg)
    places = iter(("te", "unet"))
    weights = {}
    for part in rest:
        key, named, value = part.rpartition("=")
        try:
            weights[key.strip() if named else next(places)] = float(value)
        except (ValueError, StopIteration) as error:
            msg = _wrong(tag)
            raise InvalidRequest(msg) from error
    if not name or not weights.keys() <= {"te", "unet"}:
        raise InvalidRequest(_wrong(tag))
    text_encoder = weights.get("te", 1.0)
    return LoraTag(name, text_encoder, weights.get("unet", text_encoder))


def _wrong(tag: str) -> str:
    return (
        f"{tag} stands in the prompt, but cannot be read. Write <lora:name:weight>, or "
        "<lora:name:te:unet> with a weight for the text encoders and one for the denoiser."
    )


def find_lora(name: str, folder: Path | None) -> Path:
    """
    Return the ``.safetensors`` file of this name in a folder or below it.

    Raises:
        InvalidRequest: There is no folder, or no such file; the text names those that are near.
    """
    if folder is None:
        msg = (
            f"<lora:{name}> stands in the prompt, but the engine has no lora_dir to find it in. "
            "Open it with lora_dir=, or give the file as lora=."
        )
        raise InvalidRequest(msg)
    files = {file.stem: file for file in sorted(folder.glob("**/*.safetensors"), reverse=True)}
    if name in files:
        return files[name]
    folded = {stem.lower(): file for stem, file in files.items()}
    if name.lower() in folded:
        return folded[name.lower()]
    near: Sequence[str] = difflib.get_close_matches(name, files, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else "Check the name."
    msg = (
        f"<lora:{name}> stands in the prompt, but there is no {name}.safetensors in {folder}. "
        f"{hint}"
    )
    raise InvalidRequest(msg)
