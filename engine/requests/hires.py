"""Hires fix: two passes and what stands between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from holdfast.engine.requests.drawn import Drawn
from holdfast.engine.requests.lora import Lora
from holdfast.engine.requests.pictures import Picture, Pictures
from holdfast.engine.requests.schedulers import check_scheduler
from holdfast.engine.requests.sizes import Fit, following, rounded
from holdfast.engine.requests.upscalers import UPSCALERS, check_upscaler
from holdfast.engine.requests.values import (
    Fraction,
    Guidance,
    ModelName,
    Seed,
    Side,
    Speed,
    Steps,
)

if TYPE_CHECKING:
    from typing import Unpack

    from holdfast.engine.requests.given import HiresFields


class Hires(Drawn):
    """
    Hires fix: an image at a size that the model composes well at, enlarged, then img2img over it.

    The fields without ``hires_`` are those of `Txt2Img` and hold for the first pass. That is
    txt2img; img2img where there is an `image`; and none where `first_pass` is given.

    Attributes:
        image: That the first pass begins with, as of `Img2Img`.
        first_strength: Share of the noise schedule that the first pass runs over `image`.
        first_pass: Images of a first pass that is taken as it is, as ``Result.first_pass`` has
            them: only the second is run. One for each image of the batch.
        scale: Factor on both sides, 1 to 8. Must be unset where a target size is given.
        hires_width: Target in pixels; with only one of both given, the aspect is kept.
        hires_height: The same.
        fit: What becomes of a target of another aspect: see `Img2Img`.
        upscaler: One of `UPSCALERS`: image space (Pillow) or latent space.
        hires_steps: Steps that the second pass runs, exactly. None: `steps`.
        strength: Share of the noise schedule that the second pass runs. 1 forgets the first pass.
        hires_prompt: None: `prompt`.
        hires_negative_prompt: None: `negative_prompt`.
        hires_scheduler: None: that of the first pass.
        hires_guidance: None: `guidance`.
        hires_seed: Of the second pass's noise, for each image of a batch. None: its own seed.
        hires_lora: LoRA set of the second pass alone, for example ``(Lora("ink.safetensors"),)``.
            None: that of the engine; empty: none.
        hires_model: Another model for the second pass, named as `EngineConfig.model` is. It may
            be of another family where the upscaler works on pixels.
        hires_speed: None: `speed`.
    """

    kind: Literal["hires"] = "hires"
    image: Picture | None = None
    first_strength: Fraction = 0.7
    first_pass: Pictures | None = None
    width: Side | None = None
    height: Side | None = None
    scale: Annotated[float, Field(ge=1, le=8)] | None = None
    hires_width: Side | None = None
    hires_height: Side | None = None
    fit: Fit = "crop"
    upscaler: str = "lanczos"
    hires_steps: Steps | None = None
    strength: Fraction = 0.5
    hires_prompt: str | None = None
    hires_negative_prompt: str | None = None
    hires_scheduler: str | None = None
    hires_guidance: Guidance | None = None
    hires_seed: Seed | None = None
    hires_lora: tuple[Lora, ...] | None = None
    hires_model: ModelName | None = None
    hires_speed: Speed | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[HiresFields]) -> None: ...

    def but(self, **changes: Unpack[HiresFields]) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        return self._but(changes)

    @model_validator(mode="before")
    @classmethod
    def _batch_of_first_pass(cls, fields: Any) -> Any:
        given = fields.get("first_pass") if isinstance(fields, dict) else None
        if isinstance(given, (list, tuple)) and given and "batch" not in fields:
            return {**fields, "batch": len(given)}
        return fields

    @field_validator("hires_scheduler")
    @classmethod
    def _known_hires_scheduler(cls, name: str | None) -> str | None:
        return None if name is None else check_scheduler(name)

    @field_validator("upscaler")
    @classmethod
    def _known_upscaler(cls, name: str) -> str:
        return check_upscaler(name)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        sized = self.hires_width is not None or self.hires_height is not None
        if sized and self.scale is not None:
            msg = "give either scale or hires_width/hires_height, not both"
            raise ValueError(msg)
        if UPSCALERS[self.upscaler].space == "none" and (sized or (self.scale or 1.0) != 1.0):
            msg = "upscaler 'none' keeps the size: leave scale at 1, or choose another upscaler"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.first_pass is None:
            return self
        if self.image is not None:
            msg = "give either image, for a first pass over it, or first_pass, not both"
            raise ValueError(msg)
        if self.width is not None or self.height is not None:
            msg = "the first pass that was given has its size: leave width and height out"
            raise ValueError(msg)
        if not self.first_pass:
            msg = "first_pass holds no image: a request of one pass has none"
            raise ValueError(msg)
        if len(self.first_pass) != self.batch:
            msg = f"first_pass has {len(self.first_pass)} images, but batch is {self.batch}"
            raise ValueError(msg)
        if len({each.size for each in self.first_pass}) > 1:
            msg = "the images of first_pass have different sizes: make a request of each"
            raise ValueError(msg)
        if UPSCALERS[self.upscaler].space == "latent":
            msg = (
                f"upscaler {self.upscaler!r} works on latents, of which first_pass has none: "
                "choose one that works on pixels, such as 'lanczos'"
            )
            raise ValueError(msg)
        return self

    def first_size(self, default: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) of the first pass, `default` where none is asked for."""
        if self.first_pass is not None:
            return self.first_pass[0].size
        if self.image is not None:
            return following(self.image.size, self.width, self.height)
        return self.width or default[0], self.height or default[1]

    def target(self, width: int, height: int) -> tuple[int, int]:
        """
        Return the second pass's exact (width, height) in pixels for a first pass of this size.

        With one of `hires_width`, `hires_height` given, the other follows the aspect, rounded
        half up. Without either, both are ``scale`` (2 unless set) times the first pass.
        """
        if self.hires_width is not None or self.hires_height is not None:
            return following((width, height), self.hires_width, self.hires_height)
        factor = 1.0 if UPSCALERS[self.upscaler].space == "none" else self.scale or 2.0
        return rounded(width * factor), rounded(height * factor)
