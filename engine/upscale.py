"""From the first pass's size to the second's, in image space or in latent space."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True)
class Upscaler:
    """
    One way to enlarge.

    Attributes:
        space: ``"image"`` works on pixels, ``"latent"`` on latents (no VAE between the passes),
            ``"none"`` hands the image on as it is.
        label: Name in A1111's infotext.
        options: Pillow's filter, or arguments of ``torch.nn.functional.interpolate``.
    """

    space: Literal["image", "latent", "none"]
    label: str
    options: Mapping[str, Any]


def _latent(label: str, mode: str, *, antialias: bool = False) -> Upscaler:
    return Upscaler("latent", label, {"mode": mode, "antialias": antialias})


UPSCALERS: Mapping[str, Upscaler] = MappingProxyType({
    "lanczos": Upscaler("image", "Lanczos", {"resample": Image.Resampling.LANCZOS}),
    "bicubic": Upscaler("image", "Bicubic", {"resample": Image.Resampling.BICUBIC}),
    "nearest": Upscaler("image", "Nearest", {"resample": Image.Resampling.NEAREST}),
    "latent": _latent("Latent", "bilinear"),
    "latent-antialiased": _latent("Latent (antialiased)", "bilinear", antialias=True),
    "latent-bicubic": _latent("Latent (bicubic)", "bicubic"),
    "latent-bicubic-antialiased": _latent(
        "Latent (bicubic antialiased)", "bicubic", antialias=True
    ),
    "latent-nearest": _latent("Latent (nearest)", "nearest"),
    "latent-nearest-exact": _latent("Latent (nearest-exact)", "nearest-exact"),
    "none": Upscaler("none", "None", {}),
})  # fmt: skip


def check_upscaler(name: str) -> str:
    """
    Return the name of an upscaler, given by its name or its label in infotexts.

    Raises:
        ValueError: There is none of that name; the text lists those there are.
    """
    for short, upscaler in UPSCALERS.items():
        if name.strip().lower() in (short, upscaler.label.lower()):
            return short
    msg = f"unknown upscaler; choose one of {', '.join(UPSCALERS)}"
    raise ValueError(msg)


def upscale_image(image: Image.Image, name: str, width: int, height: int) -> Image.Image:
    """Return `image` enlarged to exactly (width, height) pixels by an image-space upscaler."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), **UPSCALERS[name].options)


def upscale_latents(latents: torch.Tensor, name: str, width: int, height: int) -> torch.Tensor:
    """Return latents (N, C, H, W) enlarged to (N, C, height, width), in latent pixels."""
    import torch

    return torch.nn.functional.interpolate(latents, size=(height, width), **UPSCALERS[name].options)
