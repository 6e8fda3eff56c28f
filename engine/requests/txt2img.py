"""An image from a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from holdfast.engine.requests.drawn import Drawn
from holdfast.engine.requests.values import Side

if TYPE_CHECKING:
    from typing import Unpack

    from holdfast.engine.requests.given import Txt2ImgFields


class Txt2Img(Drawn):
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
        schedule: How the scheduler spreads the steps: a key of `SCHEDULES`, such as ``"karras"``;
            may also stand behind the scheduler's name (``"dpm++2m karras"``). None: as it says.
        lora: LoRA set in place of the engine's; empty: none. None: the engine's. What the prompt
            names in tags comes on top.
        clip_skip: The layer of the text encoders that is read, counted from the end as A1111 does:
            1 is the last one. None: the model's own, 1 for SD and 2 for SDXL.
        guidance_rescale: Share of guidance's gain in contrast that is taken back, 0 to 1 (Lin et
            al. 2023, arXiv:2305.08891).
        eta: Share of fresh noise in each step, 0 to 1, of the samplers ``"ddim"`` (Song et al.
            2020, arXiv:2010.02502, equation 16) and ``"tcd"`` (gamma of Zheng et al. 2024,
            arXiv:2402.19159). None: the sampler's usual one, 0 and 0.3.
        variation_seed: Of the noise that each image's own is turned towards; the same for all
            images of a batch. Of both passes of a hires run.
        variation_strength: How far, 0 to 1; 1 is all the way.
        seed_resize: Width and height in pixels of the noise that is laid in the middle, for the
            composition that the seed gives at that size.
        speed: ``"exact"``: every evaluation of the denoiser is whole. ``"balanced"``, ``"fast"``:
            every second, every third one, once the picture is composed; those between run the
            prompt alone, and take from the last whole one what guidance adds and, of a UNet, what
            its deep part gave. Works only with guidance, and from 6 evaluations in a pass on.
        detail: Passes over regions of the images, after all others.
    """

    kind: Literal["txt2img"] = "txt2img"
    width: Side | None = None
    height: Side | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[Txt2ImgFields]) -> None: ...

    def but(self, **changes: Unpack[Txt2ImgFields]) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        return self._but(changes)
