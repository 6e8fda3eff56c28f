"""Families beside Stable Diffusion 1.x run through the same engine, against diffusers again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from holdfast.engine import Hires, Txt2Img
from holdfast.engine.graphs.timesteps import accept_fractional_timesteps, embed_timesteps_exactly
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.models.source import resolve
from tests.conftest import ignore
from tests.support.lora_graphs import read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from holdfast.engine import Engine

PROMPT = "a large red circle on a blue background"
STEPS = 3


@dataclass(frozen=True)
class Case:
    """
    A tiny model, and what diffusers runs it with.

    Attributes:
        family: Of `tests.support.families.BUILDERS`.
        classes: diffusers' pipelines for both passes.
        length: Of the schedule that the second one is told, for `STEPS` over half a strength.
        shapes: As the engine is asked to compile.
        vae: Fields of the VAE's configuration over the model's own.
    """

    family: str
    classes: tuple[str, str]
    length: int = 2 * STEPS
    shapes: str = "dynamic"
    vae: Mapping[str, Any] = field(default_factory=dict)


XL = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
CASES = {
    "lcm": Case(
        "lcm",
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        length=STEPS,
    ),
    "sdxl": Case("sdxl", XL),
    "sdxl, latents with mean and deviation": Case(
        "sdxl",
        XL,
        vae={
            "latents_mean": [-1.6, 1.9, -1.4, 2.5],
            "latents_std": [8.5, 5.9, 6.6, 5.2],
            "scaling_factor": 0.5,
        },
    ),
    "sdxl guided by an embedding, static": Case("sdxl-lcm", XL, shapes="static"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hires_equals_diffusers(
    open_engine: Callable[..., Engine],
    family: Callable[[str], Path],
    tiny_cache: Path,
    tmp_path: Path,
    case: Case,
) -> None:
    """Both passes are those of the family's own diffusers pipelines, with exactly their steps."""
    heavy()
    import diffusers
    import torch

    folder = family(case.family)
    with quiet():
        first = getattr(diffusers, case.classes[0]).from_pretrained(folder)
        first.vae.register_to_config(**case.vae)
        second = getattr(diffusers, case.classes[1])(**first.components)
        for pipeline in (first, second):
            pipeline.set_progress_bar_config(disable=True)

        def reference(pipeline: Any, **arguments: Any) -> Any:
            return pipeline(
                PROMPT, guidance_scale=4.0, generator=torch.Generator().manual_seed(3), **arguments
            ).images[0]

        composed = reference(first, width=64, height=64, num_inference_steps=STEPS)
        enlarged = composed.resize((96, 96), Image.Resampling.LANCZOS)
        painted = reference(second, image=enlarged, strength=0.5, num_inference_steps=case.length)

    model = resolve(folder, tiny_cache, ignore).path
    if case.vae:
        model = shutil.copytree(model, tmp_path / "model")
        for part in ("vae_decoder", "vae_encoder"):
            file = model / part / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **case.vae}))
    engine = open_engine(model=model, precision="f32", shapes=case.shapes)
    result = engine.run(Hires(
        prompt=PROMPT, width=64, height=64, scale=1.5, steps=STEPS, strength=0.5, guidance=4.0,
        seed=3,
    ))  # fmt: skip
    for ours, theirs in ((result.first_pass[0], composed), (result.images[0], painted)):
        difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
        assert difference.mean() <= 1
        assert difference.max() <= 8
    passes = [
        event
        for event in map(json.loads, engine.config.log_file.read_text().splitlines())
        if event["event"] == "pass.completed"
    ]
    assert [each["evaluations"] for each in passes] == [STEPS, STEPS]

    graph = read(model, "unet")
    accept_fractional_timesteps(graph)
    assert embed_timesteps_exactly(graph)


@pytest.mark.slow
@pytest.mark.parametrize("clip_skip", [None, 3])
def test_two_text_encoders_read_a_long_weighted_prompt(
    open_engine: Callable[..., Engine],
    family: Callable[[str], Path],
    tmp_path: Path,
    clip_skip: int | None,
) -> None:
    """
    SDXL draws what diffusers draws from rows of both encoders, of the layer that is asked for (the
    last but one), pooled from the first chunk; of an embedding each encoder reads its own vectors.
    """
    heavy()
    import diffusers
    import torch

    folder = family("sdxl")
    with quiet():
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(4)
    vectors = {n: rng.standard_normal((1, 32)).astype(np.float32) for n in ("clip_g", "clip_l")}
    save_file(vectors, tmp_path / "ink.safetensors")
    ink = 5  # a token that no prompt has
    chunks = [
        [("a large", 1), ("red", 1.4), (ink, 1.2), ("circle", 1)],
        [("on a blue background", 1)],
    ]
    wide, pooled = [], None
    for encoder, name in (
        (pipeline.text_encoder, "clip_l"),
        (pipeline.text_encoder_2, "clip_g"),
    ):
        encoder.get_input_embeddings().weight.data[ink] = torch.from_numpy(vectors[name][0])
        rows = []
        for number, chunk in enumerate(chunks):
            ids, weights = [pipeline.tokenizer.bos_token_id], [1.0]
            for said, weight in chunk:
                words = (
                    [said]
                    if said == ink
                    else pipeline.tokenizer(said, add_special_tokens=False).input_ids
                )
                ids, weights = ids + words, weights + [weight] * len(words)
            left = 77 - len(ids)
            ids += [pipeline.tokenizer.eos_token_id] + [pipeline.tokenizer.pad_token_id] * (
                left - 1
            )
            with torch.no_grad():
                out = encoder(torch.tensor([ids]), output_hidden_states=True)
            z = out.hidden_states[-(clip_skip or 2)]
            weighed = z * torch.tensor(weights + [1.0] * left)[None, :, None]
            rows.append(weighed * z.mean() / weighed.mean() if weighed.mean().abs() > 1e-5 else z)
            pooled = out[0] if number == 0 and encoder is pipeline.text_encoder_2 else pooled
        wide.append(torch.cat(rows, 1))
    embedded = torch.cat(wide, -1)
    with quiet():
        theirs = pipeline(
            prompt_embeds=embedded, pooled_prompt_embeds=pooled,
            negative_prompt_embeds=embedded * 0, negative_pooled_prompt_embeds=pooled * 0,
            width=64, height=64, num_inference_steps=STEPS, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
        ).images[0]  # fmt: skip
    engine = open_engine(model=folder, precision="f32", embeddings=tmp_path / "ink.safetensors")
    request = Txt2Img(
        prompt="a large (red:1.4) (ink:1.2) circle BREAK on a blue background", width=64,
        height=64, steps=STEPS, guidance=4.0, seed=3, clip_skip=clip_skip,
    )  # fmt: skip
    ours = np.asarray(engine.run(request).images[0], np.float64)
    assert np.abs(ours - np.asarray(theirs, np.float64)).mean() <= 1
    other = request.but(clip_skip=2 if clip_skip else 3)
    assert np.abs(ours - np.asarray(engine.run(other).images[0], np.float64)).mean() > 1
