"""What infotext tells of an image, in A1111's words."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from holdfast.engine import Hires, Img2Img, Lora, Mode, Request
from holdfast.engine.passes.metadata import Provenance, infotext
from holdfast.engine.passes.one_pass import PassSpec

INK, CHALK = Lora("ink.safetensors", 0.8), Lora("chalk.safetensors", 0.5)


def spec(number: int, width: int, height: int, loras: tuple[Lora, ...] | None = None) -> PassSpec:
    return PassSpec(
        number=number, mode=Mode.IMG2IMG, width=width, height=height, steps=4, strength=0.5,
        guidance=7.0, scheduler="euler", sampler="euler", prompt="a ring", negative_prompt="",
        seeds=(3,), loras=loras,
    )  # fmt: skip


def told(request: Request, *passes: PassSpec, loras: tuple[Lora, ...] = ()) -> str:
    made_by = Provenance("demo", "0123456789", tuple(map(str, loras)), "0.1.0")
    return infotext(request, passes, 0, made_by)


@pytest.mark.parametrize(
    ("engine", "second", "says"),
    [
        ((), (INK,), ", Hires lora: ink@0.8, Version"),
        ((INK,), (), ", Lora: ink@0.8, Hires lora: none, Version"),
        ((INK,), None, ", Lora: ink@0.8, Version"),
        ((INK,), (INK,), ", Lora: ink@0.8, Version"),
        ((INK,), (INK, CHALK), ", Lora: ink@0.8, Hires lora: ink@0.8; chalk@0.5, Version"),
        ((), None, ", Hires upscaler: Lanczos, Version"),
    ],
)
def test_infotext_tells_which_pass_had_which_lora(
    engine: tuple[Lora, ...], second: tuple[Lora, ...] | None, says: str
) -> None:
    """The engine's set is the first pass's; the second's stands beside it where it is another."""
    passes = (spec(1, 64, 64), spec(2, 128, 128, second))
    assert says in told(Hires(hires_lora=second), *passes, loras=engine)


@pytest.mark.parametrize(
    ("fit", "says", "of_hires"),
    [
        ("crop", "Resize mode: Crop and resize", None),
        ("fill", "Resize mode: Resize and fill", "Hires resize mode: Resize and fill"),
        ("stretch", "Resize mode: Just resize", "Hires resize mode: Just resize"),
    ],
)
def test_infotext_tells_what_became_of_another_aspect(
    fit: Any, says: str, of_hires: str | None
) -> None:
    """`Hires resize` alone means that it was cropped; where the aspect is kept, nothing is said."""
    image = Image.new("RGB", (64, 64))
    assert says in told(Img2Img(image=image, width=192, height=64, fit=fit), spec(1, 192, 64))
    kept = told(Img2Img(image=image, width=128, height=128, fit=fit), spec(1, 128, 128))
    assert "Resize mode" not in kept
    request = Hires(hires_width=192, hires_height=64, fit=fit)
    text = told(request, spec(1, 64, 64), spec(2, 192, 64))
    assert "Hires resize: 192x64" in text
    assert ("Hires resize mode" in text) is (of_hires is not None)
    assert of_hires is None or of_hires in text
