"""An image from a prompt and an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from holdfast.engine.requests.drawn import Drawn
from holdfast.engine.requests.pictures import Picture
from holdfast.engine.requests.sizes import Fit, following
from holdfast.engine.requests.values import SIDE, Fraction, Side

if TYPE_CHECKING:
    from typing import Unpack

    from holdfast.engine.requests.given import Img2ImgChanges, Img2ImgFields


class Img2Img(Drawn):
    """
    An image from a prompt and an image.

    Attributes:
        image: A PIL image, a path, or a data URL (PNG, JPEG, WebP, ...). It is read, turned as
            its EXIF tag says and copied at once; where it is transparent, it counts as on white.
        strength: Share of the noise schedule that is run over the image, over 0 and up to 1.
        width: Pixels; the image is resized to it (Lanczos). With only one of both given, the
            aspect is kept; with none, the image's own size.
        height: The same.
        fit: What becomes of an image of another aspect: ``"crop"`` covers the size and cuts what
            sticks out, ``"fill"`` lies within and draws its edges out, ``"stretch"`` bends it.
        steps: Steps that are run, exactly: the schedule is made longer for a low strength.

    The others are those of `Txt2Img`.
    """

    kind: Literal["img2img"] = "img2img"
    image: Picture
    strength: Fraction = 0.7
    width: Side | None = None
    height: Side | None = None
    fit: Fit = "crop"

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[Img2ImgFields]) -> None: ...

    def but(self, **changes: Unpack[Img2ImgChanges]) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        return self._but(changes)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if max(self.size) > SIDE:
            width, height = self.size
            msg = f"the image would be {width}x{height}: give a width and height up to {SIDE}"
            raise ValueError(msg)
        return self

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) in pixels that the image is brought to."""
        return following(self.image.size, self.width, self.height)
