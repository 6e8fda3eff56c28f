"""Models as people have them, through a whole engine: the same picture, or a refusal in words."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import GenerationError, Img2Img, InvalidRequest, ModelSourceError, Txt2Img
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models.checkpoint import check_lone_vae
from holdfast.engine.models.export import LONE_VAE, Order, _load_vae
from holdfast.engine.models.source import resolve
from tests.conftest import ignore
from tests.support.engines import change_weights, pixels
from tests.support.models import original_vae_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

REQUEST = Txt2Img(
    prompt="a large red circle",
    width=64,
    height=64,
    steps=2,
    guidance=4.0,
    seed=3,
    scheduler="euler",
)


def edit(file: Path, *drop: str, **changes: Any) -> None:
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))


@pytest.fixture
def ir(tiny_ir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny OpenVINO model, to be changed."""
    return shutil.copytree(tiny_ir, tmp_path / "ir")


@pytest.fixture(scope="module")
def picture(tiny_ir: Path, tiny_cache: Path) -> str:
    """What the unchanged model makes; that this is diffusers' picture is held elsewhere."""
    from holdfast.engine import Engine

    with Engine(tiny_ir, cache_dir=tiny_cache, precision="f32") as engine:
        return pixels(engine.run(REQUEST))


SAME: dict[str, Callable[[Path], Any]] = {
    "no size": lambda ir: edit(ir / "unet/config.json", "sample_size", "in_channels"),
    "a pair": lambda ir: edit(ir / "unet/config.json", sample_size=[8, 12]),
    "no scale": lambda ir: [
        edit(ir / part / "config.json", "scaling_factor") for part in ("vae_decoder", "vae_encoder")
    ],
    "huge prompts": lambda ir: edit(ir / "tokenizer/tokenizer_config.json", model_max_length=1e30),
    "no encoder": lambda ir: shutil.rmtree(ir / "vae_encoder"),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_a_file_does_not_say_is_as_in_diffusers(
    open_engine: Callable[..., Engine], ir: Path, picture: str, change: Callable[[Path], Any]
) -> None:
    """Fields and parts that older files lack change no picture that does not need them."""
    change(ir)
    assert pixels(open_engine(model=ir, precision="f32").run(REQUEST)) == picture


def test_a_mode_names_what_it_lacks(open_engine: Callable[..., Engine], ir: Path) -> None:
    """Without an encoder img2img is refused before anything is compiled, and txt2img is not."""
    shutil.rmtree(ir / "vae_encoder")
    engine = open_engine(model=ir)
    asked = Img2Img(prompt="", image=photo(), steps=2)
    with pytest.raises(InvalidRequest, match=r"has no vae_encoder.*Export the model again"):
        engine.run(asked)
    assert engine.state == "unloaded"


@pytest.mark.skipif(os.name == "nt", reason="paths are text there")
def test_a_path_of_another_encoding_is_used(
    open_engine: Callable[..., Engine], tiny_ir: Path, tmp_path: Path, picture: str
) -> None:
    """A folder whose name is Latin-1 works as any other."""
    folder = tmp_path / os.fsdecode(b"latin-\xe4")
    shutil.copytree(tiny_ir, folder)
    assert pixels(open_engine(model=folder, precision="f32").run(REQUEST)) == picture


@pytest.mark.parametrize("seen", [False, True], ids=["planned", "served"])
def test_a_model_that_is_replaced_is_another_model(
    open_engine: Callable[..., Engine],
    ir: Path,
    tiny_ir: Path,
    tmp_path: Path,
    picture: str,
    seen: bool,  # noqa: FBT001 - pytest gives it by name
) -> None:
    """New files under an open engine are another model, and no blob is kept under a wrong key."""
    settings = {"precision": "f32", "compiled_cache": True, "cache_dir": tmp_path / "cache"}
    engine = open_engine(model=ir, **settings)
    engine.plan(REQUEST)
    old = resolve(ir, tmp_path / "cache", ignore).fingerprint
    if seen:
        before = engine.run(REQUEST)
        assert pixels(before) == picture
        assert before.provenance["model_fingerprint"] == old
    change_weights(ir / "vae_decoder" / "openvino_model.xml")
    engine.unload()
    after = engine.run(REQUEST)
    assert pixels(after) != picture
    new = resolve(ir, tmp_path / "cache", ignore).fingerprint
    assert after.provenance["model_fingerprint"] == new != old
    engine.close()
    for model, drawn in ((ir, pixels(after)), (tiny_ir, picture)):
        assert pixels(open_engine(model=model, **settings).run(REQUEST)) == drawn


def test_pixels_that_are_no_numbers_are_an_error(
    open_engine: Callable[..., Engine], ir: Path
) -> None:
    """A VAE that overflows on a real picture, though not on zeros, saves no black image."""
    import openvino as ov
    from openvino import opset13 as op

    path = ir / "vae_decoder" / "openvino_model.xml"
    graph = ov.Core().read_model(path)
    (latents,) = graph.get_parameters()
    out = graph.output(0)
    largest = op.reduce_max(op.absolute(latents), op.constant([0, 1, 2, 3], ov.Type.i64), True)  # noqa: FBT003 - OpenVINO's signature
    huge = op.exp(op.multiply(largest, op.constant(1000.0, ov.Type.f32)))
    broken = op.multiply(op.subtract(huge, huge), op.constant(1e-30, ov.Type.f32))
    pixels = op.add(out.get_node().input_value(0), broken)
    pixels.output(0).get_tensor().set_names(out.get_names())
    replace_graph(path, ov.Model([op.result(pixels)], [latents], "vae"))
    with pytest.raises(GenerationError, match=r"vae_decoder.*not finite") as told:
        open_engine(model=ir, precision="f32").run(REQUEST)
    assert "smaller size" not in str(told.value)


def test_an_encoder_that_draws_itself_is_used(
    open_engine: Callable[..., Engine], ir: Path, tiny_sd: Path
) -> None:
    """Latents that an older encoder gives are denoised as diffusers denoises the same latents."""
    import diffusers
    import openvino as ov
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from openvino import opset13 as op

    path = ir / "vae_encoder" / "openvino_model.xml"
    graph = ov.Core().read_model(path)
    moments = graph.output(0).get_node().input_value(0)
    mean = op.split(moments, op.constant(1, ov.Type.i64), 2).output(0)
    mean.get_tensor().set_names({"latent_sample"})
    replace_graph(path, ov.Model([op.result(mean)], graph.get_parameters(), "vae"))
    with quiet():
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
            tiny_sd, safety_checker=None
        )
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    # The graph draws, here the mean, so that the seed's first noise is the denoiser's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _: self.mean)
        (theirs,) = pipe(
            REQUEST.prompt,
            image=photo(),
            strength=0.5,
            num_inference_steps=8,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
        ).images
    asked = Img2Img(
        prompt=REQUEST.prompt,
        image=photo(),
        strength=0.5,
        steps=4,
        guidance=4.0,
        seed=3,
        scheduler="euler",
    )
    assert apart(open_engine(model=ir, precision="f32").run(asked).images[0], theirs) <= 1


@pytest.fixture(scope="module")
def vae(tiny_sd: Path) -> Any:
    """Another VAE than the tiny model's, in PyTorch."""
    heavy()
    import diffusers
    import torch

    with quiet(), torch.no_grad():
        made = diffusers.AutoencoderKL.from_pretrained(tiny_sd, subfolder="vae")
        made.decoder.conv_out.weight *= -0.8
    return made


def vae_file(vae: Any, path: Path, name: Callable[[str], str]) -> Path:
    """Write a VAE as one file with `name` for each weight, and its configuration beside it."""
    from safetensors.torch import save_file

    weights = {}
    for own, each in vae.state_dict().items():
        called = name(own)
        convolution = ".mid.attn_1." in called and each.ndim == 2
        weights[called] = each[:, :, None, None].contiguous() if convolution else each
    save_file(weights, path)
    vae.save_config(path.with_suffix("") / "vae")
    return path


NAMES: dict[str, Callable[[str], str]] = {
    "diffusers": str,
    "original": lambda name: original_vae_name(name, 4),
    "of a checkpoint": lambda name: "first_stage_model." + original_vae_name(name, 4),
}


def test_a_vae_alone_replaces_the_models(
    open_engine: Callable[..., Engine], tiny_sd: Path, tiny_cache: Path, tmp_path: Path, vae: Any
) -> None:
    """A folder and a file with nothing but a VAE are one VAE, and the picture is diffusers'."""
    import diffusers
    import torch

    vae.save_pretrained(tmp_path / "vae")
    file = vae_file(vae, tmp_path / "other.safetensors", NAMES["original"])
    with quiet():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            tiny_sd, vae=vae, safety_checker=None
        )
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    (theirs,) = pipe(
        REQUEST.prompt, width=64, height=64, num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    folder, single = (
        resolve(source, tiny_cache, ignore, role="vae") for source in (tmp_path / "vae", file)
    )
    assert folder.component_fingerprints == single.component_fingerprints
    drawn = open_engine(vae=file, precision="f32").run(REQUEST).images[0]
    assert apart(drawn, theirs) <= 1


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_vae_is_read_under_every_name(
    tmp_path: Path, vae: Any, name: Callable[[str], str]
) -> None:
    """Each weight of a VAE's file is where it belongs, whatever the file calls it."""
    path = vae_file(vae, tmp_path / "other.safetensors", name)
    check_lone_vae(path)
    with quiet():
        read = _load_vae(Order(str(path), LONE_VAE, half=False, config=str(path.with_suffix(""))))
    expected = vae.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(each.equal(expected[key]) for key, each in read.state_dict().items())


def test_a_vae_with_a_gap_is_refused(tmp_path: Path, vae: Any) -> None:
    """A weight that the file of a VAE lacks is named."""
    from safetensors.torch import load_file, save_file

    path = vae_file(vae, tmp_path / "other.safetensors", NAMES["original"])
    kept = {key: each for key, each in load_file(path).items() if key != "encoder.conv_in.bias"}
    save_file(kept, path)
    with pytest.raises(ModelSourceError, match=r"AutoencoderKL \(encoder\.conv_in\.bias\)"):
        resolve(path, tmp_path / "cache", ignore, role="vae")


def replace_graph(path: Path, graph: Any) -> None:
    """Write a graph in the place of one that may be mapped still."""
    import openvino as ov

    new = path.with_name("new.xml")
    ov.save_model(graph, new, False)  # noqa: FBT003 - OpenVINO's signature
    for suffix in (".xml", ".bin"):
        new.with_suffix(suffix).replace(path.with_suffix(suffix))


def apart(ours: Image.Image, theirs: Image.Image) -> float:
    """Return how far two pictures are apart in the mean, in levels of 255."""
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    return float(np.abs(difference).mean())


def photo() -> Image.Image:
    """A picture of coarse coloured noise."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
