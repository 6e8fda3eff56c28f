"""A part of an image redrawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from PIL import Image, ImageOps
from pydantic import model_validator

from holdfast.engine.requests.drawn import Drawn
from holdfast.engine.requests.pictures import Mask, Picture
from holdfast.engine.requests.regions import Blur, Fill, Padding, Sides, is_empty
from holdfast.engine.requests.values import SIDE, Fraction, Side

if TYPE_CHECKING:
    from typing import Unpack

    from holdfast.engine.requests.given import InpaintChanges, InpaintFields


class Inpaint(Drawn):
    """
    A part of an image redrawn; all that the mask leaves out stays as it is, to the bit.

    Attributes:
        image: As of `Img2Img`. The result has its size, with what `outpaint` adds.
        mask: Of the image's size; white is redrawn, grey from half on. None: what is transparent
            in the image is redrawn.
        mask_invert: Redraw what the mask leaves out.
        mask_blur: Pixels over which the redrawn fades into what stays.
        fill: What stands there before it is redrawn: ``"original"``, the image itself;
            ``"fill"``, the colours around it; ``"noise"`` and ``"nothing"``, noise or zeros in the
            latents.
        area: ``"whole"``: the model sees the whole image. ``"masked"``: what the mask selects with
            `padding` around it is cut out, brought to the working size, redrawn, brought back and
            pasted.
        padding: Pixels.
        outpaint: Pixels that the image grows by, which are drawn too: one number for all sides, a
            mapping such as ``{"left": 64}``, or left, top, right, bottom.
        strength: Share of the noise schedule that is run over the image, over 0 and up to 1.
        width: Pixels that the area is redrawn at, the working size. With only one of both given,
            the area's aspect is kept. With none: a whole image's own size, at the next that the
            model can make; for a masked area the model's own size.
        height: The same.
        steps: Steps that are run, exactly: the schedule is made longer for a low strength.

    The others are those of `Txt2Img`.
    """

    kind: Literal["inpaint"] = "inpaint"
    image: Picture
    mask: Mask | None = None
    mask_invert: bool = False
    mask_blur: Blur = 4.0
    fill: Fill = "original"
    area: Literal["whole", "masked"] = "whole"
    padding: Padding = 32
    outpaint: Sides = (0, 0, 0, 0)
    strength: Fraction = 0.75
    width: Side | None = None
    height: Side | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[InpaintFields]) -> None: ...

    def but(self, **changes: Unpack[InpaintChanges]) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        return self._but(changes)

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if self.mask is not None and self.mask.size != self.image.size:
            msg = (
                f"the mask is {self.mask.width}x{self.mask.height}, but the image is "
                f"{self.image.width}x{self.image.height}: give a mask of the image's size"
            )
            raise ValueError(msg)
        if max(self.size) > SIDE:
            msg = f"the image would be {self.size[0]}x{self.size[1]}; sides may have {SIDE} pixels"
            raise ValueError(msg)
        if is_empty(self.selection):
            msg = "the mask selects nothing: white is what is redrawn"
            if self.mask is None:
                msg += "; give a mask, an image that is transparent there, or outpaint"
            raise ValueError(msg)
        return self

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) in pixels of the result."""
        left, top, right, bottom = self.outpaint
        return self.image.width + left + right, self.image.height + top + bottom

    @property
    def selection(self) -> Image.Image:
        """What is redrawn, before it is blurred: L, 255 where it is, of the result's size."""
        if self.mask is not None:
            mask = self.mask
        elif self.image.mode == "RGBA":
            mask = ImageOps.invert(self.image.getchannel("A"))
        else:
            mask = Image.new("L", self.image.size)
        if self.mask_invert:
            mask = ImageOps.invert(mask)
        whole = Image.new("L", self.size, 255)
        whole.paste(mask, self.outpaint[:2])
        return whole
