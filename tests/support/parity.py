"""Images of diffusers in PyTorch, to hold an engine's against: the same weights and seeds."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.imports import heavy, quiet

if TYPE_CHECKING:
    from collections.abc import Mapping
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
    """

    txt2img: str
    img2img: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    guidance: str = "guidance_scale"
    takes_negative: bool = True

    @property
    def negative(self) -> dict[str, str]:
        """The negative prompt, as a request and a pipeline call it."""
        return {"negative_prompt": NEGATIVE} if self.takes_negative else {}

    def draw(
        self, folder: Path, *, width: int, height: int, steps: int, guidance: float, seed: int
    ) -> np.ndarray:
        """Make an image from the prompt; 0 to 255, shape (height, width, 3)."""
        size = {"width": width, "height": height}
        return self._run(self.txt2img, folder, guidance, seed, num_inference_steps=steps, **size)

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
    "flux2-klein-base": Reference("Flux2KleinPipeline", takes_negative=False),
    "z-image": Reference("ZImagePipeline", "ZImageImg2ImgPipeline"),
    "sana": Reference("SanaPipeline", settings={"use_resolution_binning": False}),
    "qwen-image": Reference(
        "QwenImagePipeline", "QwenImageImg2ImgPipeline", guidance="true_cfg_scale"
    ),
}
"""By the names of `tiny_transformers.FAMILIES`."""


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
