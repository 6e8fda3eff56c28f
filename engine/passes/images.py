"""Images and latents at the border of a pass: made ready, and told apart by digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a request's picture (RGB or RGBA) as a pipeline takes it: RGB, on white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
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
