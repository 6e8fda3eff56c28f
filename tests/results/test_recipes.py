"""What pictures of Holdfast and of other programs tell of how they were made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from holdfast.engine import (
    Hires,
    Img2Img,
    InvalidRequest,
    Lora,
    Recipe,
    Txt2Img,
    recipe_from_image,
    request_from_image,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

INFOTEXT = (
    "a ring\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 6.5, Seed: 7, "
    "Size: 64x96, Model: v1-5, Tiling: True"
)
NEAREST = Txt2Img(
    prompt="a ring", negative_prompt="blurry", steps=20, scheduler="euler-a", guidance=6.5, seed=7,
    width=64, height=96,
)  # fmt: skip


def sampler(**inputs: Any) -> dict[str, Any]:
    """Return a node of ComfyUI that denoises."""
    usual = {
        "seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras",
        "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0],
        "latent_image": ["5", 0],
    }  # fmt: skip
    return {"class_type": "KSampler", "inputs": {**usual, **inputs}}


def comfy(*samplers: dict[str, Any], **nodes: dict[str, Any]) -> dict[str, str]:
    """Return what ComfyUI writes of a graph with these samplers."""
    texts = {"6": "a barn", "7": "blurry"}
    graph = {
        **{str(10 + number): each for number, each in enumerate(samplers)},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 96}},
        **{
            number: {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["4", 1]}}
            for number, text in texts.items()
        },
        **nodes,
    }
    links = [
        [1, 4, 0, 10, 0, "MODEL"], [2, 5, 0, 10, 3, "LATENT"], [3, 4, 1, 6, 0, "CLIP"],
        [4, 6, 0, 10, 1, "CONDITIONING"], [5, 4, 1, 7, 0, "CLIP"],
        [6, 7, 0, 10, 2, "CONDITIONING"],
    ]  # fmt: skip
    return {"prompt": json.dumps(graph), "workflow": json.dumps({"links": links})}


INVOKE = {
    "invokeai_metadata": json.dumps({
        "generation_mode": "txt2img", "positive_prompt": "a barn", "negative_prompt": "blurry",
        "width": 64, "height": 96, "seed": 5, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 30,
        "scheduler": "euler_a", "model": {"model_name": "sd-1"}, "app_version": "4.2",
    })
}  # fmt: skip
FOOOCUS = {
    "fooocus_scheme": "fooocus",
    "parameters": json.dumps({
        "prompt": "a barn", "negative_prompt": "", "base_model": "xl", "base_model_hash": "00",
        "guidance_scale": 4.0, "scheduler": "normal", "sampler": "unknown_sampler", "seed": "5",
        "sharpness": 2.0, "steps": 30, "version": "Fooocus v2.5",
    }),
}  # fmt: skip

NOVEL = {
    "Software": "NovelAI",
    "Source": "Stable Diffusion 1D44365E",
    "Description": "a barn",
    "Comment": json.dumps({
        "steps": 28, "sampler": "k_euler_ancestral", "seed": 5, "strength": 0.69, "noise": 0.667,
        "scale": 11.0, "uc": "blurry",
    }),
}  # fmt: skip
FORGE = (
    "a barn\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 1, Distilled CFG "
    "Scale: 3.5, Seed: 5, Size: 64x96, Model: flux1-dev, Version: f2.0.1, Module 1: ae"
)
SD_NEXT = (
    "a barn\nNegative prompt: blurry\nSteps: 20, Size: 64x96, Sampler: UniPC, Seed: 5, CFG scale: "
    "6, App: SD.Next, Version: 058a7f0, Model: v1-5, Parser: native"
)


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes a PNG with these texts."""

    def written(texts: dict[str, str]) -> Path:
        info = PngInfo()
        for name, text in texts.items():
            info.add_text(name, text)
        file = tmp_path / "picture.png"
        Image.new("RGB", (64, 96)).save(file, pnginfo=info)
        return file

    return written


def told(recipe: Recipe) -> set[tuple[str, str, str]]:
    return {(each.kind, each.name, each.value) for each in recipe.lost}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif"])
def test_holdfasts_own_is_the_very_request(
    open_engine: Callable[..., Engine], ink: Path, tmp_path: Path, ending: str
) -> None:
    """In each format; the engine's own LoRAs, which are no part of the request, are told."""
    engine = open_engine(lora=(Lora(ink, 0.5),))
    request = Hires(prompt="a ring, Steps: 3", width=64, height=64, steps=1, seed=3)
    (file,) = engine.run(request).save(tmp_path / f"ring.{ending}")
    recipe = recipe_from_image(file)
    assert recipe.request == request_from_image(file) == request
    assert recipe.program == "Holdfast"
    assert recipe.fingerprint == engine.model_facts().fingerprint
    assert told(recipe) == {("model", "lora", "ink@0.5")}
    assert recipe_from_image(file, steps=2).request == request.but(steps=2)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif"])
def test_a1111s_is_the_nearest_request(tmp_path: Path, ending: str) -> None:
    """Its words stand in a PNG's chunk or in EXIF; what has no place here is told."""
    file = tmp_path / f"ring.{ending}"
    if ending == "png":
        info = PngInfo()
        info.add_text("parameters", INFOTEXT)
        Image.new("RGB", (64, 96)).save(file, pnginfo=info)
    else:
        exif = Image.Exif()
        comment = b"UNICODE\0" + INFOTEXT.encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
        Image.new("RGB", (64, 96)).save(file, exif=exif.tobytes())
    recipe = recipe_from_image(file)
    assert recipe.request == NEAREST
    assert recipe.program == "A1111"
    assert told(recipe) == {
        ("model", "Model", "v1-5"), ("unknown", "Tiling", "True"), ("noise", "RNG", "GPU"),
    }  # fmt: skip


def test_comfyuis_is_its_first_sampler(picture: Callable[..., Path]) -> None:
    """With the picture's size; other samplers and nodes are told, and nothing is dropped."""
    second = sampler(denoise=0.5, latent_image=["10", 0], steps=10)
    upscale = {"class_type": "LatentUpscale", "inputs": {"width": 128, "height": 192}}
    recipe = recipe_from_image(picture(comfy(sampler(), second, extra=upscale)))
    assert recipe.program == "ComfyUI"
    assert recipe.request == Txt2Img(
        prompt="a barn", negative_prompt="blurry", steps=20, guidance=8.0, scheduler="dpm++2m",
        schedule="karras", seed=5, width=64, height=96,
    )  # fmt: skip
    lost = {(kind, name): value for kind, name, value in told(recipe)}
    assert lost["noise", "seed"] == "5"
    assert lost["model", "model"] == "v1-5"
    assert "'denoise': 0.5" in lost["unknown", "sampler 2"]
    assert "'height': 192" in lost["unknown", "LatentUpscale"]
    assert len(lost) == 4


def test_comfyuis_over_an_image_asks_for_it(picture: Callable[..., Path]) -> None:
    """With a part of the noise it is an img2img, whose picture is to be given."""
    file = picture(comfy(sampler(denoise=0.6, sampler_name="euler", scheduler="normal")))
    with pytest.raises(InvalidRequest, match="give it as image="):
        recipe_from_image(file)
    begun = Image.new("RGB", (64, 96), "teal")
    assert recipe_from_image(file, image=begun).request == Img2Img(
        image=begun, prompt="a barn", negative_prompt="blurry", steps=20, guidance=8.0,
        scheduler="euler", seed=5, strength=0.6, width=64, height=96,
    )  # fmt: skip


def test_other_programs_are_read(picture: Callable[..., Path]) -> None:
    """InvokeAI's and Fooocus's; a sampler that is not to be had here is told."""
    invoke = recipe_from_image(picture(INVOKE))
    assert invoke.program == "InvokeAI"
    assert invoke.request == Txt2Img(
        prompt="a barn", negative_prompt="blurry", steps=30, guidance=7.5, scheduler="euler-a",
        seed=5, width=64, height=96,
    )  # fmt: skip
    assert told(invoke) == {
        ("noise", "seed", "5"), ("model", "model", "sd-1"), ("unknown", "rand_device", "cpu"),
    }  # fmt: skip
    fooocus = recipe_from_image(picture(FOOOCUS))
    assert fooocus.program == "Fooocus"
    assert fooocus.request == Txt2Img(
        prompt="a barn", steps=30, guidance=4.0, seed=5, width=64, height=96
    )
    assert ("value", "sampler", "unknown_sampler") in told(fooocus)
    novel = recipe_from_image(picture(NOVEL))
    assert novel.program == "NovelAI"
    assert novel.request == Txt2Img(
        prompt="a barn", negative_prompt="blurry", steps=28, guidance=11.0, scheduler="euler-a",
        seed=5, width=64, height=96,
    )  # fmt: skip
    assert ("unknown", "noise", "0.667") in told(novel)


def test_what_writes_as_a1111_does_is_read_so(picture: Callable[..., Path]) -> None:
    """Forge and SD.Next, whose own words are told."""
    forge = recipe_from_image(picture({"parameters": FORGE}))
    assert forge.request == Txt2Img(
        prompt="a barn", steps=20, scheduler="dpm++2m", schedule="karras", guidance=1.0, seed=5,
        width=64, height=96,
    )  # fmt: skip
    assert told(forge) == {
        ("unknown", "Distilled CFG Scale", "3.5"), ("unknown", "Module 1", "ae"),
        ("model", "Model", "flux1-dev"), ("noise", "RNG", "GPU"),
    }  # fmt: skip
    sd_next = recipe_from_image(picture({"parameters": SD_NEXT}))
    assert sd_next.request == Txt2Img(
        prompt="a barn", negative_prompt="blurry", steps=20, scheduler="unipc", guidance=6.0,
        seed=5, width=64, height=96,
    )  # fmt: skip
    assert ("unknown", "Parser", "native") in told(sd_next)


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"parameters": "a ring"},
        {"holdfast": "{"},
        {"holdfast": '{"request": 5}'},
        {"prompt": "[" * 5000, "workflow": "{}"},
        {"prompt": "{}", "workflow": '{"links": []}'},
        comfy(),
    ],
)
def test_a_picture_that_tells_nothing_is_refused(
    picture: Callable[..., Path], texts: dict[str, str]
) -> None:
    """One without metadata, with another's or with broken ones is told to be so."""
    with pytest.raises(InvalidRequest, match=r"does not tell how it was made|cannot be read"):
        recipe_from_image(picture(texts))


def test_no_picture_is_refused(tmp_path: Path) -> None:
    """A file that is none, or is not there, is an error with its name."""
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nowhere.png"):
        with pytest.raises(InvalidRequest, match=f"{name} cannot be read as an image"):
            recipe_from_image(tmp_path / name)


def test_values_that_are_refused_here_are_left_out(picture: Callable[..., Path]) -> None:
    """A number beyond what Holdfast takes is told, and the rest is a request."""
    text = INFOTEXT.replace("CFG scale: 6.5", "CFG scale: -3").replace("20", "99999")
    recipe = recipe_from_image(picture({"parameters": text}))
    assert recipe.request == NEAREST.but(guidance=7.0)
    assert ("value", "steps", "99999") in told(recipe)
    assert ("value", "guidance", "-3.0") in told(recipe)


def test_strange_values_are_told_and_break_nothing(picture: Callable[..., Path]) -> None:
    """Numbers without end, numbers for lists, texts for numbers: what is no value is left out."""
    own = {"request": {"kind": "txt2img", "prompt": "a barn"}, "loras": 5, "model_fingerprint": []}
    assert recipe_from_image(picture({"holdfast": json.dumps(own)})).request.prompt == "a barn"
    strange = sampler(steps=float("inf"), cfg="many", sampler_name="x" * 1000, seed="nan")
    recipe = recipe_from_image(picture(comfy(strange)))
    assert recipe.request == Txt2Img(
        prompt="a barn", negative_prompt="blurry", width=64, height=96, schedule="karras"
    )
    assert {name for kind, name, _ in told(recipe) if kind == "value"} == {
        "steps", "cfg_scale", "sampler", "seed",
    }  # fmt: skip
    assert all(len(value) < 250 for _, _, value in told(recipe))
