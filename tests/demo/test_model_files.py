"""The packaged model is small, plain and what other programs can read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from holdfast.engine.demo import model_folder, style_lora
from holdfast.engine.demo.scenes import describe, draw, place
from holdfast.engine.demo.stock import to_pixels
from holdfast.engine.imports import heavy
from holdfast.engine.passes.previews import PUBLISHED, fit


def test_the_weights_are_small():
    """All of the model takes at most 12 MB, the LoRA less than 500 kB."""
    files = [file for file in model_folder().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert style_lora().stat().st_size < 500_000


def test_weights_are_safetensors():
    """No file of the model can run code when it is read."""
    endings = {file.suffix for file in model_folder().rglob("*") if file.is_file()}
    assert endings == {".json", ".md", ".safetensors", ".txt"}


def test_configs_are_plain_json():
    """No config holds an infinity or a NaN, which other readers of JSON refuse."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for file in model_folder().rglob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)


def test_configs_name_no_folder():
    """No config tells where the model lay when it was trained."""
    for file in model_folder().rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_diffusers_reads_it():
    """The folder is an ordinary StableDiffusionPipeline and makes a picture of any size it can."""
    heavy()
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_folder(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe("a red star", width=96, height=64, num_inference_steps=2).images
    assert pictures[0].size == (96, 64)


def test_previews_have_its_colours():
    """The published map of its latents is what its encoder makes of drawn scenes."""
    heavy()
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model_folder() / "vae").eval()
    rng = np.random.default_rng(0)
    described = [describe(rng, figures=1 + number % 2) for number in range(400)]
    pixels = to_pixels([draw(place(each, rng), 64) for each in described])
    with torch.no_grad():
        latents = (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).numpy()
    fitted, known = fit(latents, pixels.numpy()), PUBLISHED["demo"]
    facts = {
        name: tuple(fact) if isinstance(fact, list) else fact for name, fact in vae.config.items()
    }
    assert all(facts[name] == fact for name, fact in known.vae.items())
    np.testing.assert_allclose(known.map.factors, fitted.factors, atol=0.01)
    np.testing.assert_allclose(known.map.bias, fitted.bias, atol=0.01)
    assert latents.std() == pytest.approx(known.map.spread, rel=0.1)


def test_the_card_tells_the_figures():
    """The model card lies beside the weights and holds measured shares."""
    card = (model_folder() / "README.md").read_text()
    assert "background" in card
    assert "%" in card


def test_finding_the_files_is_cheap():
    """Asking where the model lies loads nothing."""
    assert isinstance(model_folder(), Path)
    assert (model_folder() / "model_index.json").is_file()
