"""
Regions of a picture on their way through a pass: cut out, enlarged, brought back and pasted.

What a region's mask leaves out is never touched: it is not read back from latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from holdfast.engine.passes.images import as_rgb, digest
from holdfast.engine.requests.sizes import following

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from holdfast.engine.models.families import Scale
    from holdfast.engine.requests.detail import Detail
    from holdfast.engine.requests.inpaint import Inpaint
    from holdfast.engine.requests.regions import Fill

    Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Region:
    """
    What of a picture one pass redraws.

    Attributes:
        box: What is cut out: left, top, right, bottom in pixels of the picture.
        size: The (width, height) in pixels that it is redrawn at.
        mask: L, of the picture's size: 255 is redrawn, 0 stays, what is between is mixed.
        fill: What stands there before: see `Inpaint`.
    """

    box: Box
    size: tuple[int, int]
    mask: Image.Image
    fill: Fill

    @property
    def cut_mask(self) -> Image.Image:
        """The mask of what is cut out, at the size that it is redrawn at."""
        return _brought(self.mask.crop(self.box), self.size)

    @property
    def facts(self) -> dict[str, Any]:
        """What the log tells of it."""
        return {"region": list(self.box), "mask_digest": digest([self.mask])}

    def cut(self, picture: Image.Image) -> Image.Image:
        """Return what the pass begins with, at the size that it is redrawn at."""
        if self.fill == "fill":
            picture = surrounded(picture, self.mask)
        return _brought(picture.crop(self.box), self.size)

    def paste(self, drawn: Image.Image, picture: Image.Image) -> Image.Image:
        """Return the picture with what was drawn in the place of the mask, and there alone."""
        left, top, right, bottom = self.box
        pasted = picture.copy()
        back = _brought(drawn, (right - left, bottom - top))
        pasted.paste(back, self.box[:2], self.mask.crop(self.box))
        return pasted


def canvas(request: Inpaint) -> Image.Image:
    """Return the picture that a request redraws in: RGB, with what it is to grow by."""
    picture = as_rgb(request.image)
    if not any(request.outpaint):
        return picture
    left, top, right, bottom = request.outpaint
    grown = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    return surrounded(Image.fromarray(grown), _grown_mask(request))


def region_of(request: Inpaint, scale: Scale) -> Region:
    """Return the one region of a request."""
    mask = blurred(request.selection, request.mask_blur)
    asked = (request.width, request.height)
    if request.area == "whole":
        box = (0, 0, *request.size)
        size = request.size if asked == (None, None) else following(request.size, *asked)
    else:
        box = widened(_bounds(mask), request.padding, mask.size, _aspect(asked))
        size = _working(box, asked, scale)
    if asked == (None, None):
        size = (_next(size[0], scale.multiple), _next(size[1], scale.multiple))
    return Region(box, size, mask, request.fill)


def region_of_detail(selection: Image.Image, detail: Detail, scale: Scale) -> Region:
    """Return one of a detail's regions, from its mask on the picture."""
    size = (detail.width or scale.default[0], detail.height or scale.default[1])
    if detail.dilation:
        selection = selection.filter(ImageFilter.MaxFilter(2 * detail.dilation + 1))
    mask = blurred(selection, detail.mask_blur)
    box = widened(_bounds(mask), detail.padding, mask.size, size[0] / size[1])
    return Region(box, size, mask, detail.fill)


def blurred(mask: Image.Image, pixels: float) -> Image.Image:
    """Return a mask that fades over so many pixels."""
    return mask.filter(ImageFilter.GaussianBlur(pixels)) if pixels else mask


def widened(box: Box, padding: int, size: tuple[int, int], aspect: float | None) -> Box:
    """
    Return a box with padding around it, and of an aspect as far as the picture has room for that.

    Args:
        box: Left, top, right, bottom.
        padding: Pixels on each side.
        size: Of the picture, which it stays within.
        aspect: Width by height; None: any.
    """
    spans = []
    for first, last, most in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        spans.append((max(0, first - padding), min(most, last + padding)))
    if aspect is not None:
        width, height = (last - first for first, last in spans)
        wanted = (max(width, round(height * aspect)), max(height, round(width / aspect)))
        spans = [_stretched(*each) for each in zip(spans, wanted, size, strict=True)]
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def binary(mask: Image.Image) -> NDArray[np.float32]:
    """Return what a mask selects, as (H, W): 1 or 0, grey from half on."""
    return (np.asarray(mask) >= _HALF).astype(np.float32)


def surrounded(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """
    Return a picture in which the colours around a mask run into what it selects.

    They are averaged over ever larger blocks, and each pixel takes the smallest that knows one:
    pull and push, Gortler et al., The Lumigraph (1996).
    """
    known: NDArray[np.float32] = 1 - np.asarray(mask, np.float32)[..., None] / np.float32(255)
    colours = np.asarray(picture, np.float32)
    filled = _pushed((colours * known).astype(np.float32), known.astype(np.float32))
    mixed = colours * known + filled * (1 - known)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _pushed(sums: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean colour at each pixel, from coarser levels where the weight is under 1."""
    height, width = weights.shape[:2]
    if height == width == 1:
        return np.where(weights > 0, sums / np.maximum(weights, _TINY), _GREY).astype(np.float32)
    halves = [np.pad(each, ((0, height % 2), (0, width % 2), (0, 0))) for each in (sums, weights)]
    coarse = [
        each.reshape(-(-height // 2), 2, -(-width // 2), 2, -1).sum(axis=(1, 3)) for each in halves
    ]
    full = np.minimum(coarse[1], 1)
    below = _pushed(coarse[0] * full / np.maximum(coarse[1], _TINY), full)
    image = Image.fromarray(below.clip(0, 255).astype(np.uint8))
    beneath = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return sums + beneath * (1 - weights)


def _grown_mask(request: Inpaint) -> Image.Image:
    """Return the mask of what a picture grows by, whatever else is redrawn."""
    mask = Image.new("L", request.size, 255)
    mask.paste(0, (*request.outpaint[:2], *_sum(request.outpaint[:2], request.image.size)))
    return mask


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _bounds(mask: Image.Image) -> Box:
    return mask.getbbox() or (0, 0, *mask.size)


def _aspect(asked: tuple[int | None, int | None]) -> float | None:
    width, height = asked
    return width / height if width and height else None


def _working(box: Box, asked: tuple[int | None, int | None], scale: Scale) -> tuple[int, int]:
    """Return the size of a cut's own aspect that is asked for, or has the area of the model's."""
    size = (box[2] - box[0], box[3] - box[1])
    if asked != (None, None):
        return following(size, *asked)
    area = scale.default[0] * scale.default[1]
    factor = math.sqrt(area / (size[0] * size[1]))
    return round(size[0] * factor), round(size[1] * factor)


def _next(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _stretched(span: tuple[int, int], wanted: int, most: int) -> tuple[int, int]:
    """Return a span lengthened on both sides, moved inwards where it would leave 0 to `most`."""
    length = min(wanted, most)
    first = (span[0] + span[1] - length) // 2
    first = min(max(first, 0), most - length)
    return first, first + length


def _brought(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


_HALF = 128
_TINY = 1e-6
_GREY = 127.5
"""What stands where no pixel of a picture is known."""
