"""What a host asks for: one frozen value for each kind of image, checked when it is made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from holdfast.engine.schedulers import check_scheduler
from holdfast.engine.upscale import UPSCALERS, check_upscaler
from holdfast.engine.values import Fraction, Picture, Seed, Side, Value

Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0, le=100)]


class Lora(Value):
    """
    One LoRA file and how strongly it works.

    Attributes:
        path: A ``.safetensors`` file, in diffusers' or kohya's format.
        weight: Factor on its change of the weights, -10 to 10; negative ones work against it.
    """

    path: Path
    weight: Annotated[float, Field(ge=-10, le=10)] = 1.0

    def __init__(self, path: str | Path, weight: float = 1.0) -> None:
        super().__init__(path=path, weight=weight)

    @property
    def name(self) -> str:
        """The file's name without its ending, as logs and infotext show it."""
        return self.path.stem


class _Prompted(Value):
    prompt: str = ""
    negative_prompt: str = ""
    steps: Steps = 20
    guidance: Guidance = 7.0
    scheduler: str | None = None
    seed: Seed | None = None
    batch: Annotated[int, Field(ge=1, le=64)] = 1

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        return None if name is None else check_scheduler(name)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs: the denoiser then sees every image twice."""
        return self.guidance > 1


class Txt2Img(_Prompted):
    """
    An image from a prompt alone.

    Attributes:
        prompt: What to draw; may be empty.
        negative_prompt: What to keep away from; works only with `guidance` over 1.
        width: Pixels; a multiple of what the model needs. None: the model's own size.
        height: The same.
        steps: Denoising steps, 1 to 1000.
        guidance: Classifier-free guidance scale (Ho & Salimans 2022, arXiv:2207.12598), 0 to 100.
            At 1 or under, guidance is off and the denoiser's batch is halved.
        scheduler: A diffusers class name or a short name such as ``"euler-a"``. None: the
            engine's, and without one there the model's own.
        seed: 0 to 2**63 - 1; image i of a batch is made with ``seed + i``. None: a random one,
            told in the result.
        batch: Number of images.
    """

    kind: Literal["txt2img"] = "txt2img"
    width: Side | None = None
    height: Side | None = None


class Img2Img(_Prompted):
    """
    An image from a prompt and an image.

    Attributes:
        image: A PIL image, a path, or a PNG data URL; rotated by its EXIF tag, laid on white
            where it is transparent, and converted to RGB.
        strength: Share of the noise schedule that is run over the image, over 0 and up to 1.
        width: Pixels; the image is resized to it (Lanczos). None: the image's own.
        height: The same.
        steps: Steps that are run, exactly: the schedule is made longer for a low strength.

    The others are those of `Txt2Img`.
    """

    kind: Literal["img2img"] = "img2img"
    image: Picture
    strength: Fraction = 0.7
    width: Side | None = None
    height: Side | None = None


class Hires(_Prompted):
    """
    Hires fix: txt2img at a size that the model composes well at, enlarged, then img2img over it.

    The fields without ``hires_`` are those of `Txt2Img` and hold for the first pass.

    Attributes:
        scale: Factor on both sides, 1 to 8. Must be unset where a target size is given.
        hires_width: Target in pixels; with only one of both given, the aspect is kept.
        hires_height: The same.
        upscaler: One of `UPSCALERS`: image space (Pillow) or latent space.
        hires_steps: Steps that the second pass runs, exactly. None: `steps`.
        strength: Share of the noise schedule that the second pass runs. 1 forgets the first pass.
        hires_prompt: None: `prompt`.
        hires_negative_prompt: None: `negative_prompt`.
        hires_scheduler: None: that of the first pass.
        hires_guidance: None: `guidance`.
        hires_seed: None: `seed`.
        hires_lora: LoRA set of the second pass alone, for example ``(Lora("ink.safetensors"),)``.
            None: that of the engine; empty: none.
    """

    kind: Literal["hires"] = "hires"
    width: Side | None = None
    height: Side | None = None
    scale: Annotated[float, Field(ge=1, le=8)] | None = None
    hires_width: Side | None = None
    hires_height: Side | None = None
    upscaler: str = "lanczos"
    hires_steps: Steps | None = None
    strength: Fraction = 0.5
    hires_prompt: str | None = None
    hires_negative_prompt: str | None = None
    hires_scheduler: str | None = None
    hires_guidance: Guidance | None = None
    hires_seed: Seed | None = None
    hires_lora: tuple[Lora, ...] | None = None

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

    def target(self, width: int, height: int) -> tuple[int, int]:
        """
        Return the second pass's exact (width, height) in pixels for a first pass of this size.

        With one of `hires_width`, `hires_height` given, the other follows the aspect, rounded
        half up. Without either, both are ``scale`` (2 unless set) times the first pass.
        """
        if self.hires_width is not None and self.hires_height is not None:
            return self.hires_width, self.hires_height
        if self.hires_width is not None:
            return self.hires_width, _rounded(height * self.hires_width / width)
        if self.hires_height is not None:
            return _rounded(width * self.hires_height / height), self.hires_height
        factor = 1.0 if UPSCALERS[self.upscaler].space == "none" else self.scale or 2.0
        return _rounded(width * factor), _rounded(height * factor)


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


Request = Txt2Img | Img2Img | Hires


def request_from_json(text: str | bytes) -> Request:
    """
    Read a request of any kind, told apart by its ``kind``.

    Raises:
        InvalidRequest: The text is not JSON or not a request.
    """
    fields: Any = _Fields.from_json(text).model_extra  # pydantic makes a request of it
    return _Tagged(request=fields).request


class _Fields(Value):
    model_config = ConfigDict(extra="allow")


class _Tagged(Value):
    request: Annotated[Request, Field(discriminator="kind")]
