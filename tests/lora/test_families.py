"""LoRAs on every family that is run, in every spelling, against diffusers on the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from holdfast.engine import Engine, Lora, Txt2Img
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.lora import Strength, fuse, read_lora, targets
from holdfast.engine.lora.names import originals
from holdfast.engine.models.source import resolve
from tests.conftest import ignore
from tests.support import lora_data
from tests.support.lora_graphs import read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("sd1", "sd2", "sdxl", "lcm")
FORMS = {
    **lora_data.WRITERS,
    "peft": lora_data.write_peft,
    "comfy": lora_data.write_comfy,
    "kohya, original": lora_data.write_kohya_original,
}
WEIGHT = 0.8
PROMPT = "a large red circle on a blue background"


@dataclass(frozen=True)
class Model:
    """
    One family's tiny model, and a LoRA on all of its linear and convolution layers.

    Attributes:
        folder: As diffusers has it.
        components: Each part that the LoRA changes.
        graphs: As OpenVINO has it.
        deltas: The LoRA, before it has a file format.
        fused: Each weight with the LoRA in it, by diffusers, by component and module.
        image: Made by diffusers with it, 0 to 255.
        cache: Where the model is exported.
    """

    folder: Path
    components: tuple[str, ...]
    graphs: Path
    deltas: lora_data.Deltas
    fused: dict[str, dict[str, np.ndarray]]
    image: np.ndarray
    cache: Path


@pytest.fixture(scope="module", params=FAMILIES)
def model(
    request: pytest.FixtureRequest,
    family: Callable[[str], Path],
    tiny_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Model:
    heavy()
    import diffusers

    work = tmp_path_factory.mktemp(request.param)
    with quiet():
        folder = family(request.param)
        graphs = resolve(folder, tiny_cache, ignore).path
        components = tuple(
            name for name in ("unet", "text_encoder", "text_encoder_2") if (graphs / name).exists()
        )
        shapes = {
            component: {
                module: target.shape
                for module, target in targets(read(graphs, component)).items()
                if not target.obstacle
            }
            for component in components
        }
        deltas = lora_data.make(shapes, dict.fromkeys(components, lambda _: True), seed=1)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
        path = lora_data.write_diffusers(work / "reference.safetensors", deltas)
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="reference")
        pipeline.set_adapters(["reference"], [WEIGHT])
        pipeline.fuse_lora(components=list(components), adapter_names=["reference"])
        pipeline.unload_lora_weights()
        fused = {
            component: {
                name.removeprefix("text_model."): layer.weight.detach().numpy()
                for name, layer in getattr(pipeline, component).named_modules()
                if name.removeprefix("text_model.") in shapes[component]
            }
            for component in components
        }
        image = paint(pipeline)
    return Model(folder, components, graphs, deltas, fused, image, tiny_cache)


def paint(pipeline: Any) -> np.ndarray:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    return np.asarray(image, np.float64)


def test_every_kind_of_layer_is_there(model: Model) -> None:
    """The LoRA holds attention, projections, convolutions and embeddings, and each text encoder."""
    layers = set(model.deltas.layers["unet"])
    for end in (
        "attn1.to_q", "attn2.to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_in", "conv_out",
        "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
        "time_embedding.linear_1", "time_embedding.linear_2",
    ):  # fmt: skip
        assert any(layer.endswith(end) for layer in layers), end
    if "text_encoder_2" in model.components:
        assert {"add_embedding.linear_1", "add_embedding.linear_2"} <= layers
        assert "text_projection" in model.deltas.layers["text_encoder_2"]
    for component in model.components[1:]:
        assert "encoder.layers.1.mlp.fc2" in model.deltas.layers[component]


@pytest.mark.parametrize("form", FORMS)
def test_fused_weights_are_those_of_diffusers(model: Model, form: str, tmp_path: Path) -> None:
    """Whatever the file's spelling, each constant is the weight that diffusers and PEFT fuse."""
    deltas = model.deltas
    if form in {"comfy", "kohya, original"}:
        # What latent consistency models added has no name in the original code base.
        unet = {
            name: each for name, each in deltas.layers["unet"].items() if "cond_proj" not in name
        }
        deltas = replace(deltas, layers={**deltas.layers, "unet": unet})
    path = FORMS[form](tmp_path / "style.safetensors", deltas)
    lora = read_lora(path, model.components)
    assert set(lora.layers) == (
        {"unet"} if form in {"peft", "kohya, original"} else set(model.components)
    )
    for component in lora.layers:
        places = targets(fuse(read(model.graphs, component), component, [(lora, Strength(WEIGHT))]))
        for module in deltas.layers[component]:
            place = places[module]
            ours = place.constant.data.T if place.transposed else place.constant.data
            theirs = model.fused[component][module]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=module)


def test_an_image_is_that_of_diffusers(model: Model, tmp_path: Path) -> None:
    """An engine's image with the LoRA as kohya writes it is the one that diffusers makes."""
    path = lora_data.write_kohya(tmp_path / "style.safetensors", model.deltas)
    request = Txt2Img(prompt=PROMPT, width=64, height=64, steps=3, guidance=4.0, seed=3)
    with Engine(
        model=model.folder, cache_dir=model.cache, precision="f32", lora=(Lora(path, WEIGHT),)
    ) as engine:
        image = np.asarray(engine.run(request).images[0], np.float64)
        engine.configure(lora=())
        plain = np.asarray(engine.run(request).images[0], np.float64)
    assert np.abs(image - model.image).mean() <= 1
    assert np.abs(image - model.image).max() <= 8
    assert np.abs(plain - model.image).mean() > 2


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_original_names_are_those_of_diffusers(name: str) -> None:
    """The original names of a real UNet's layers are those that diffusers converts back."""
    heavy()
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {
        "SD 1.5": {"cross_attention_dim": 768, "block_out_channels": (32, 32, 64, 64)},
        "SDXL": {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
        },
    }[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    modules = {
        name for name, layer in unet.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }  # fmt: skip
    names = {
        f"model.diffusion_model.{key}.{what}": f"{module}.{what}"
        for key, module in originals(modules)
        for what in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(names, dict(unet.config))
    assert all(key == name for key, name in converted.items())
    assert {f"{module}.weight" for module in modules} <= converted.keys()
