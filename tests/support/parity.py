"""Images of diffusers in PyTorch, to hold an engine's against: the same weights and seeds."""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.imports import heavy, quiet

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from PIL import Image

PROMPT = "a large red circle on a blue background"
NEGATIVE = "a bad blurry photo"


@dataclass(frozen=True)
class Reference:
    """
    diffusers' pipelines of one family.

    Attributes:
        txt2img: Name of the pipeline class.
        img2img: Name of that which begins with an image; empty where diffusers has none.
        settings: What every call is given besides.
        guidance: What the scale is called.
        takes_negative: It takes a negative prompt.
        order: Of what its denoiser is asked: see `sparing`.
    """

    txt2img: str
    img2img: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    takes_negative: bool = True
    order: str = "prompt last"

    @property
    def negative(self) -> dict[str, str]:
        """The negative prompt, as a request and a pipeline call it."""
        return {"negative_prompt": NEGATIVE} if self.takes_negative else {}

    def draw(
        self,
        folder: Path,
        *,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        cheap: Collection[int] = (),
    ) -> np.ndarray:
        """Make an image from the prompt; 0 to 255, shape (height, width, 3)."""
        size = {"width": width, "height": height}
        with sparing(_pipeline(self.txt2img, folder).transformer, cheap, self.order):
            return self._run(
                self.txt2img, folder, guidance, seed, num_inference_steps=steps, **size
            )

    def redraw(
        self,
        folder: Path,
        image: Image.Image,
        *,
        length: int,
        strength: float,
        guidance: float,
        seed: int,
    ) -> np.ndarray:
        """Make an image from another one, by `strength` of a schedule of `length` steps."""
        size = {"width": image.width, "height": image.height}
        start = {"image": image, "strength": strength, "num_inference_steps": length}
        return self._run(self.img2img, folder, guidance, seed, **start, **size)

    def _run(
        self, name: str, folder: Path, guidance: float, seed: int, **settings: Any
    ) -> np.ndarray:
        import torch

        with quiet():
            made = _pipeline(name, folder)(
                prompt=PROMPT,
                generator=torch.Generator().manual_seed(seed),
                **{self.guidance: guidance},
                **self.negative,
                **self.settings,
                **settings,
            )
        return as_array(made.images[0])


REFERENCES = {
    "sd3": Reference("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    "sd3-without-t5": Reference("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    "flux-dev": Reference("FluxPipeline", "FluxImg2ImgPipeline", takes_negative=False),
    "flux-schnell": Reference("FluxPipeline", "FluxImg2ImgPipeline", takes_negative=False),
    "flux2-klein": Reference("Flux2KleinPipeline", takes_negative=False),
    "flux2-klein-base": Reference("Flux2KleinPipeline", takes_negative=False, order="in turn"),
    "z-image": Reference("ZImagePipeline", "ZImageImg2ImgPipeline", order="prompt first"),
    "sana": Reference("SanaPipeline", settings={"use_resolution_binning": False}),
    "qwen-image": Reference(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        guidance="true_cfg_scale",
        order="in turn",
    ),
}
"""By the names of `tiny_transformers.FAMILIES`."""


@contextlib.contextmanager
def sparing(denoiser: Any, cheap: Collection[int], order: str = "prompt last") -> Iterator[None]:
    """
    Have a guided denoiser of PyTorch reuse what guidance added, for one image.

    Args:
        denoiser: Its `forward` is replaced for as long as this is open.
        cheap: Evaluations, from 0, that run the prompt alone.
        order: ``"prompt last"`` or ``"prompt first"`` of a batch of two, or ``"in turn"``: first
            the prompt, then the negative prompt, each alone.
    """
    import torch

    forward, calls, kept = denoiser.forward, iter(range(10**6)), {}

    @functools.wraps(forward)
    def in_a_batch(*args: Any, **kwargs: Any) -> Any:
        place = 0 if order == "prompt first" else 1
        if next(calls) not in cheap:
            answers = forward(*args, **kwargs)[0]
            kept["added"] = answers[place] - answers[1 - place]
            return (answers,)

        def part(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: part(each) for name, each in value.items()}
            rows = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
            return value[place : place + 1] if rows and len(value) == 2 else value

        drawn = forward(*map(part, args), **part(kwargs))[0][0]
        pair = [drawn - kept["added"], drawn]
        pair = pair[::-1] if order == "prompt first" else pair
        return (pair if order == "prompt first" else torch.stack(pair),)

    @functools.wraps(forward)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        evaluation, is_negative = divmod(next(calls), 2)
        if is_negative and evaluation in cheap:
            return (kept["drawn"] - kept["added"],)
        answer = forward(*args, **kwargs)[0]
        if is_negative:
            kept["added"] = kept["drawn"] - answer
        kept["drawn"] = answer
        return (answer,)

    if cheap:
        denoiser.forward = in_turn if order == "in turn" else in_a_batch
    try:
        yield
    finally:
        denoiser.forward = forward


@contextlib.contextmanager
def reusing_features(unet: Any) -> Iterator[None]:
    """Have a UNet of PyTorch take what its last resnet begins with from the last batch of two."""
    import torch

    kept = {}

    def reuse(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        features, skipped = inputs[0].tensor_split([-unet.config.block_out_channels[0]], 1)
        if len(features) == 2:
            kept["features"] = features
        return (torch.cat([kept["features"][-len(features) :], skipped], 1), *inputs[1:])

    hook = unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(reuse)
    try:
        yield
    finally:
        hook.remove()


@functools.lru_cache(maxsize=2)
def _pipeline(name: str, folder: Path) -> Any:
    heavy()
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, entry in index.items() if entry == [None, None]}
    pipeline = getattr(diffusers, name).from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def assert_same(ours: Image.Image, theirs: np.ndarray) -> None:
    """Within 1 of 255 in the mean, and nowhere far off."""
    difference = np.abs(as_array(ours) - theirs)
    assert difference.mean() <= 1
    assert difference.max() <= 8
