from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.engine.compiling.keys import ComponentKey
from holdfast.engine.models.families.stable_diffusion import STABLE_DIFFUSION
from holdfast.engine.passes.guidance import guided
from holdfast.engine.passes.one_pass import PassSpec
from holdfast.engine.passes.prompts import Conditioning
from holdfast.states import Mode


def rows(*values: float) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.tensor([[list(values)]])}


def denoiser(inputs: dict[str, Any]) -> dict[int, np.ndarray]:
    """Answer for each row on its own, with nothing that is linear."""
    text = np.asarray(inputs["encoder_hidden_states"]).sum((1, 2))[:, None, None, None]
    return {0: np.tanh(np.asarray(inputs["sample"]) * text + text**2).astype(np.float32)}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(
    "branches", [((0.7, 0.3), (0.4, -0.8), (1.0, 0.5)), ((1.0, 0.3), (1.0, 0.9)), ((1.0, 0.3),)]
)
def test_what_the_pipeline_guides_by_is_the_equations(
    images: int, rescale: float, branches: tuple[tuple[float, float], ...]
) -> None:
    """Composed by shares, then guided, then rescaled: as written out in NumPy."""
    port = SimpleNamespace(steer=None)
    view: Any = SimpleNamespace(
        ports={"unet": port},
        denoiser="unet",
        pipeline=SimpleNamespace(num_timesteps=1),
        model=SimpleNamespace(family=STABLE_DIFFUSION),
        components={"unet": SimpleNamespace(key=ComponentKey("unet", ""))},
    )
    spec = PassSpec(
        number=1, mode=Mode.TXT2IMG, width=64, height=64, steps=1, strength=None, guidance=3.0,
        scheduler=None, sampler="ddim", prompt="", negative_prompt="", seeds=(1,) * images,
        guidance_rescale=rescale,
    )  # fmt: skip
    told = Conditioning((tuple((share, rows(v)) for share, v in branches),), (rows(0.1),))
    sample = np.random.default_rng(1).standard_normal((images, 4, 5, 6)).astype(np.float32)
    doubled = {"sample": np.concatenate([sample] * 2), "timestep": np.float32(3)}
    batches = []

    def infer(inputs: dict[str, Any]) -> dict[int, np.ndarray]:
        batches.append(len(inputs["sample"]))
        return denoiser(inputs)

    with guided(view, spec, told, images):
        if len(branches) == 1 and not rescale:
            assert port.steer is None
            return
        answer = port.steer(infer, {**doubled, "encoder_hidden_states": None})[0]
    u, c = np.split(answer, 2)
    final = u + 3.0 * (c - u)

    def alone(value: float) -> np.ndarray:
        text = np.full((images, 1, 1), value)
        return denoiser({"sample": sample, "encoder_hidden_states": text})[0]

    without = alone(0.1)
    composed = without + sum(share * (alone(v) - without) for share, v in branches)
    wanted = without + 3.0 * (composed - without)
    axes = (1, 2, 3)
    ratio = composed.std(axes, keepdims=True) / wanted.std(axes, keepdims=True)
    wanted = rescale * wanted * ratio + (1 - rescale) * wanted
    np.testing.assert_allclose(final, wanted, atol=1e-5)
    assert set(batches) == {2 * images}  # what a static graph takes
    assert len(batches) == 1 + len(branches) // 2
