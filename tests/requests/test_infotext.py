"""Infotext read back: to an equal request from Holdfast's, to the nearest one from others'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from holdfast.engine import (
    Detail,
    Hires,
    Img2Img,
    Inpaint,
    InvalidRequest,
    Lora,
    Mode,
    Request,
    Txt2Img,
)
from holdfast.engine.passes.metadata import Provenance, infotext
from holdfast.engine.passes.one_pass import PassSpec
from holdfast.engine.requests.infotext import request_from_infotext

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PICTURE = Image.new("RGB", (64, 48), "teal")
MASK = Image.new("L", (64, 48), 255)
OTHER = Image.new("RGB", (64, 48), "red")

AWKWARD = (
    "\n", "\r", '"', "\\", ",", ": ", " ", "Steps: 20, Seed: 1, Size: 8x8", "Negative prompt:",
    "\nNegative prompt: b", "<lora:x:1>", "[SEP]", "größe", "\N{LINE SEPARATOR}", "Holdfast: {}",
)  # fmt: skip
texts = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=5), max_size=6).map("".join)
parts = st.floats(0.0001, 1)
numbers = st.floats(0, 100)
seeds = st.integers(0, 2**63 - 1)
sides = st.none() | st.integers(8, 512)
schedulers = st.sampled_from([None, "euler", "dpm++2m-karras", "DPM++ 2M", "k_euler_a"])
names = st.sampled_from(["ink", "a@b", "x; y", "größe"]).map(lambda name: f"{name}.safetensors")
loras = st.builds(
    Lora,
    names,
    st.floats(-10, 10),
    st.dictionaries(st.just("unet.up_blocks.*"), st.floats(-10, 10)),
)
sets = st.none() | st.lists(loras, max_size=3).map(tuple)
details = st.fixed_dictionaries(
    {"boxes": st.just(((0, 0, 9, 9), (3, 3, 40, 40)))},
    optional={
        "prompt": texts, "strength": parts, "steps": st.integers(1, 50), "guidance": numbers,
        "mask_blur": numbers, "padding": st.integers(0, 9), "lora": sets, "seed": seeds,
        "scheduler": schedulers, "width": sides, "fill": st.sampled_from(["fill", "noise"]),
    },
)  # fmt: skip
common: dict[str, SearchStrategy[Any]] = {
    "prompt": texts, "negative_prompt": texts, "steps": st.integers(1, 50), "guidance": numbers,
    "scheduler": schedulers, "lora": sets, "clip_skip": st.none() | st.integers(1, 4),
    "speed": st.sampled_from(["exact", "fast"]),
    "guidance_rescale": st.floats(0, 1), "seed_resize": st.none() | st.just((32, 48)),
    "width": sides, "height": sides,
    "detail": st.lists(details.map(lambda fields: Detail(**fields)), max_size=2).map(tuple),
}  # fmt: skip
fits = st.sampled_from(["crop", "fill", "stretch"])
second: dict[str, SearchStrategy[Any]] = {
    "scale": st.none() | st.floats(1, 8), "upscaler": st.sampled_from(["lanczos", "bicubic"]),
    "hires_steps": st.none() | st.integers(1, 50), "hires_prompt": st.none() | texts,
    "hires_negative_prompt": st.none() | texts, "hires_scheduler": schedulers,
    "hires_guidance": st.none() | numbers, "hires_seed": st.none() | seeds, "hires_lora": sets,
    "hires_model": st.sampled_from([None, "demo", "owner/name"]), "strength": parts,
    "first_strength": parts, "fit": fits, "hires_speed": st.sampled_from([None, "balanced"]),
}  # fmt: skip
inpainted: dict[str, SearchStrategy[Any]] = {
    "mask_blur": numbers, "padding": st.integers(0, 99),
    "fill": st.sampled_from(["original", "fill", "noise", "nothing"]), "strength": parts,
    "area": st.sampled_from(["whole", "masked"]),
    "outpaint": st.sampled_from([(0, 0, 0, 0), (1, 2, 3, 4)]),
}  # fmt: skip
PICTURES: dict[str, Any] = {"image": PICTURE, "mask": MASK, "first_pass": (PICTURE,)}


def asked(kind: type[Any], optional: dict[str, Any], **fixed: Any) -> SearchStrategy[Request]:
    fields = st.fixed_dictionaries({"seed": seeds}, optional=optional)
    return fields.map(lambda chosen: kind(**{**chosen, **fixed}))


first_given = {name: each for name, each in common.items() if name not in {"width", "height"}}
both = st.fixed_dictionaries({"variation_seed": seeds, "variation_strength": parts})
requests = st.one_of(
    asked(Txt2Img, common),
    both.flatmap(lambda fields: asked(Txt2Img, common, **fields)),
    st.floats(0, 1).flatmap(lambda eta: asked(Txt2Img, common, scheduler="ddim", eta=eta)),
    asked(Img2Img, {**common, "strength": parts, "fit": fits}, image=PICTURE),
    asked(Inpaint, {**common, **inpainted}, image=PICTURE, mask=MASK),
    asked(Hires, {**common, **second}),
    asked(Hires, {**common, **second}, image=PICTURE),
    asked(Hires, {**first_given, **second}, first_pass=(PICTURE,)),
    details.map(lambda fields: Detail(**{**fields, "image": PICTURE, "seed": 3})),
)


def written(request: Request) -> str:
    """Return infotext of passes that a model of 512 pixels would have."""

    def spec(number: int, **changed: Any) -> PassSpec:
        usual: dict[str, Any] = {
            "width": 512, "height": 512, "steps": request.steps or 20, "strength": None,
            "guidance": 7.0 if request.guidance is None else request.guidance,
            "scheduler": "euler", "sampler": request.scheduler or "euler",
            "prompt": request.prompt, "negative_prompt": request.negative_prompt,
            "loras": request.lora, "seeds": (request.seed or 0,),
        }  # fmt: skip
        return PassSpec(number=number, mode=Mode.TXT2IMG, **{**usual, **changed})

    passes = [spec(1)]
    if isinstance(request, Hires):
        again = {"strength": request.strength, "width": 1024, "height": 1024}
        for name in ("prompt", "negative_prompt", "guidance"):
            if (value := getattr(request, f"hires_{name}")) is not None:
                again[name] = value
        passes.append(spec(2, loras=request.hires_lora, **again))
    return infotext(request, passes, 0, Provenance("demo", "0123", ("ink@0.5",), "0.1.0"))


@given(requests)
def test_what_is_written_is_read_back_equal(request: Request) -> None:
    """Any request, whatever its prompts hold and however many digits its numbers have."""
    pictures = {
        name: value for name, value in PICTURES.items() if getattr(request, name, None) is not None
    }
    again, lost = request_from_infotext(written(request), **pictures)
    assert again == request
    assert not lost


def test_a_picture_is_asked_for_and_held_against_the_one_that_was() -> None:
    """Every picture of a request, a mask and a first pass too."""
    for request, name, wrong in (
        (Img2Img(image=PICTURE, seed=1), "image", OTHER),
        (Hires(first_pass=PICTURE, seed=1), "first_pass", OTHER),
    ):
        text = written(request)
        with pytest.raises(InvalidRequest, match=f"picture of 64x48, .* give it as {name}="):
            request_from_infotext(text)
        with pytest.raises(InvalidRequest, match="is another picture"):
            request_from_infotext(text, **{name: wrong})


def test_the_nearest_request_comes_from_what_a1111_writes() -> None:
    """Its words are fields; what has no place here is told, and nothing is dropped."""
    request, lost = request_from_infotext(
        "a (ring:1.2), <lora:ink:0.8>\nNegative prompt: blurry\nbad\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 5, "
        "Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Denoising strength: 0.4, "
        "Clip skip: 2, Hires upscale: 1.5, Hires steps: 10, Hires upscaler: R-ESRGAN 4x+, "
        'Lora hashes: "ink: 00aa", Eta: 0.5, Version: v1.10.1'
    )
    assert request == Hires(
        prompt="a (ring:1.2), <lora:ink:0.8>", negative_prompt="blurry\nbad", steps=20,
        scheduler="dpm++2m", schedule="karras", guidance=6.5, seed=5, width=512, height=768,
        strength=0.4, clip_skip=2, scale=1.5, hires_steps=10,
    )  # fmt: skip
    assert {(each.kind, each.name, each.value) for each in lost} == {
        ("model", "Model", "v1-5"),
        ("value", "Hires upscaler", "R-ESRGAN 4x+"),
        ("value", "eta", "0.5"),
        ("noise", "RNG", "GPU"),
    }


@pytest.mark.parametrize(
    "text", ["", "a ring", "a ring\nSteps: 3", "Steps: 1, Seed: 2, Holdfast: x, Size: 8x8"]
)
def test_a_text_that_tells_nothing_is_refused(text: str) -> None:
    """What is no infotext, or was changed by hand, is told."""
    with pytest.raises(InvalidRequest, match=r"does not tell|was changed"):
        request_from_infotext(text)
