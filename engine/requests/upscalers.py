"""From the first pass's size to the second's, in image space or in latent space."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from holdfast.engine.requests.sizes import scaled

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from holdfast.engine.requests.sizes import Fit


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


def upscale_image(image: Image.Image, name: str, target: tuple[int, int], fit: Fit) -> Image.Image:
    """
    Return `image` at exactly the size `target` in pixels, by an image-space upscaler.

    Args:
        image: RGB.
        name: A key of `UPSCALERS`.
        target: (width, height).
        fit: What becomes of another aspect: see `scaled`. Cut and filled around the centre.
    """
    inner = scaled(image.size, target, fit)
    if image.size != inner:
        image = image.resize(inner, **UPSCALERS[name].options)
    left, top = ((a - b) // 2 for a, b in zip(inner, target, strict=True))
    if fit == "fill" and inner != target:
        import numpy as np

        right, bottom = target[0] - inner[0] + left, target[1] - inner[1] + top
        sides = ((-top, bottom), (-left, right), (0, 0))
        return Image.fromarray(np.pad(np.asarray(image), sides, mode="edge"))
    return image if inner == target else image.crop((left, top, left + target[0], top + target[1]))


def upscale_latents(
    latents: torch.Tensor, name: str, target: tuple[int, int], fit: Fit
) -> torch.Tensor:
    """Return latents (N, C, H, W) at the size `target`, (width, height) in latent pixels."""
    import torch

    size = (latents.shape[-1], latents.shape[-2])
    inner = scaled(size, target, fit)
    latents = torch.nn.functional.interpolate(latents, size=inner[::-1], **UPSCALERS[name].options)
    left, top = ((a - b) // 2 for a, b in zip(inner, target, strict=True))
    if fit == "fill" and inner != target:
        right, bottom = target[0] - inner[0] + left, target[1] - inner[1] + top
        return torch.nn.functional.pad(latents, (-left, right, -top, bottom), mode="replicate")
    return latents[..., top : top + target[1], left : left + target[0]]
