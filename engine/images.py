"""Images and latents at the border of a pass: made ready, and told apart by digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from collections.abc import Iterable


def as_rgb(image: Image.Image) -> Image.Image:
    """
    Return an image as a pipeline takes it: upright, RGB, 8 bits.

    Turned as its EXIF tag says; transparent parts lie on white; 16-bit greyscale keeps its range.
    """
    import numpy as np

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, layer)
    return image.convert("RGB")


def digest(values: Iterable[Image.Image | Any]) -> str:
    """Return 16 hexadecimal digits for a list of images, or of latents as torch tensors."""
    import numpy as np

    whole = hashlib.blake2b(digest_size=8)
    for value in values:
        array = np.asarray(value) if isinstance(value, Image.Image) else value.numpy()
        whole.update(f"{array.shape} {array.dtype}".encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


def text_digest(text: str) -> str:
    """Return 16 hexadecimal digits for a prompt."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
