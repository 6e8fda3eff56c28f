"""Regions of a picture redrawn one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from PIL import Image
from pydantic import BeforeValidator, Field, field_validator, model_validator

from holdfast.engine.requests.lora import Lora
from holdfast.engine.requests.pictures import Mask, Picture, several
from holdfast.engine.requests.regions import HALF, Blur, Box, Fill, Padding, is_empty
from holdfast.engine.requests.schedulers import check_scheduler
from holdfast.engine.requests.values import Fraction, Guidance, Seed, Side, Speed, Steps, Value

if TYPE_CHECKING:
    from typing import Unpack

    from holdfast.engine.requests.given import DetailFields


class Detail(Value):
    """
    Regions of a picture that are redrawn one by one, each at the model's own size.

    It is a request of its own where it has an `image`; else it is the last part of another
    request, of which it takes what is unset here. Nothing outside of its regions changes.

    Attributes:
        image: What is redrawn in, as of `Img2Img`, at its own size; None as a part of a request.
        boxes: Regions, each (left, top, right, bottom) in pixels of the picture.
        masks: Regions, each of the picture's size; white is redrawn.
        largest: How many are redrawn, the largest first. None: all, as they are given.
        dilation: Pixels by which each region grows on all sides before it is blurred.
        mask_blur: Pixels over which it fades in.
        padding: Pixels around it that the model sees as well.
        fill: What stands in it before: see `Inpaint`.
        prompt: What to draw; several, parted by ``[SEP]``, are for one region each, and the last
            of them for all that follow. Empty: that of the request.
        negative_prompt: The same.
        strength: Share of the noise schedule that is run over each region, over 0 and up to 1.
        steps: Steps that are run, exactly. None: those of the request, or 20.
        guidance: None: that of the request, or 7.
        scheduler: None: that of the request.
        seed: Of the first region; each further one has the next. None: that of the image.
        batch: Number of images, each with the next seed; 1 as a part of a request.
        lora: LoRA set of these passes alone. None: that of the engine; empty: none.
        speed: See `Txt2Img`. None: that of the request, or exact.
        width: Pixels that each region is redrawn at. None: the model's own size.
        height: The same.
    """

    kind: Literal["detail"] = "detail"
    image: Picture | None = None
    boxes: tuple[Box, ...] = ()
    masks: Annotated[tuple[Mask, ...], BeforeValidator(several)] = ()
    largest: Annotated[int, Field(ge=1)] | None = None
    dilation: Padding = 4
    mask_blur: Blur = 4.0
    padding: Padding = 32
    fill: Fill = "original"
    prompt: str = ""
    negative_prompt: str = ""
    strength: Fraction = 0.4
    steps: Steps | None = None
    guidance: Guidance | None = None
    scheduler: str | None = None
    seed: Seed | None = None
    batch: Annotated[int, Field(ge=1, le=64)] = 1
    lora: tuple[Lora, ...] | None = None
    speed: Speed | None = None
    width: Side | None = None
    height: Side | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[DetailFields]) -> None: ...

    def but(self, **changes: Unpack[DetailFields]) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        return self._but(changes)

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        return None if name is None else check_scheduler(name)

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if not self.boxes and not self.masks:
            msg = "give the regions to redraw, as boxes or masks"
            raise ValueError(msg)
        for left, top, right, bottom in self.boxes:
            if left >= right or top >= bottom:
                msg = (
                    f"the box {(left, top, right, bottom)} is empty; give left, top, right, bottom"
                )
                raise ValueError(msg)
        for number, mask in enumerate(self.masks, start=1):
            if is_empty(mask):
                msg = f"mask {number} selects nothing: white is what is redrawn"
                raise ValueError(msg)
        if self.image is not None:
            self.regions(self.image.size)
        return self

    def regions(self, size: tuple[int, int]) -> tuple[Image.Image, ...]:
        """
        Return each region as a mask (L, 255: redrawn) on a picture of `size`, in their order.

        Raises:
            ValueError: A mask has another size, or a box lies outside.
        """
        found = [_boxed(box, size) for box in self.boxes]
        for number, mask in enumerate(self.masks, start=1):
            if mask.size != size:
                msg = (
                    f"mask {number} is {mask.width}x{mask.height}, but the picture is "
                    f"{size[0]}x{size[1]}: give a mask of its size"
                )
                raise ValueError(msg)
            found.append(mask)
        if self.largest is not None:
            found = sorted(found, key=lambda mask: -sum(mask.histogram()[HALF:]))[: self.largest]
        return tuple(found)


def _boxed(box: Box, size: tuple[int, int]) -> Image.Image:
    left, top, right, bottom = box
    if left >= size[0] or top >= size[1] or right <= 0 or bottom <= 0:
        msg = f"the box {box} lies outside of the picture, which is {size[0]}x{size[1]}"
        raise ValueError(msg)
    mask = Image.new("L", size)
    mask.paste(255, (max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])))
    return mask
