"""Single files of odd layouts: right, or refused for the true reason before an export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.imports import heavy
from holdfast.engine.models.checkpoint import (
    check_complete,
    check_taken,
    load_checkpoint,
    read_checkpoint,
)
from holdfast.engine.models.source import resolve
from tests.conftest import ignore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

INPUT = "model.diffusion_model.input_blocks.0.0.weight"
Weights = dict[str, Any]


@pytest.fixture(scope="module")
def whole(models: ModuleType, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one file."""
    heavy()
    place = tmp_path_factory.mktemp("files") / "whole.safetensors"
    return models.write_single_file(tiny_sd, place)


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the file with other tensors or notes."""
    from safetensors.torch import load_file, save_file

    def change(edit: Callable[[Weights], Weights], notes: dict[str, str] | None = None) -> Path:
        path = tmp_path / "changed.safetensors"
        save_file(edit(load_file(whole)), path, metadata=notes)
        return path

    return change


def beside(**tensors: list[float]) -> Callable[[Weights], Weights]:
    import torch

    return lambda weights: (
        weights | {n.replace("__", "."): torch.tensor(v) for n, v in tensors.items()}
    )


def wide(weights: Weights) -> Weights:
    import torch

    return weights | {INPUT: torch.cat([weights[INPUT], torch.zeros(32, 5, 3, 3)], 1)}


def refiner(weights: Weights) -> Weights:
    return {
        name.replace("cond_stage_model.transformer.", "conditioner.embedders.0.model."): each
        for name, each in weights.items()
    }


REFUSED: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "inpainting": (wide, "inpainting model"),
    "refiner": (refiner, "a refiner"),
    "a tensor of nobody": (beside(control_model__weight=[1.0]), "control_model.weight"),
    "another sampling": (beside(edm_mean=[1.0]), "edm_mean"),
    "a VAE alone": (
        lambda weights: {
            name.removeprefix("first_stage_model."): each
            for name, each in weights.items()
            if name.startswith("first_stage_model.")
        },
        "a VAE alone. Give it as vae=",
    ),
}


@pytest.mark.parametrize(("edit", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_told_by_the_header(
    changed: Callable[..., Path], tmp_path: Path, edit: Callable[[Weights], Weights], says: str
) -> None:
    """Kinds that Holdfast does not run, and tensors that no part takes, are refused at once."""
    with pytest.raises(ModelSourceError, match=says):
        resolve(changed(edit), tmp_path / "cache", ignore)


def test_harmless_tensors_are_left_out(changed: Callable[..., Path]) -> None:
    """Averaged weights and tables of the noise schedule refuse nothing."""
    file = changed(
        beside(model_ema__decay=[1.0], alphas_cumprod=[1.0], sqrt_one_minus_alphas_cumprod=[1.0],
               posterior_variance=[1.0], betas=[1.0], denoiser__sigmas=[1.0])
    )  # fmt: skip
    found = read_checkpoint(file)
    assert (found.pipeline, found.scheduler) == ("StableDiffusionPipeline", {})


def test_a_file_tells_how_it_is_sampled(changed: Callable[..., Path]) -> None:
    """Marker tensors and notes for v-prediction and zero terminal SNR become settings."""
    file = changed(beside(v_pred=[1.0], ztsnr=[1.0]))
    both = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert read_checkpoint(file).scheduler == both
    noted = changed(lambda weights: weights, {"modelspec.prediction_type": "v"})
    assert read_checkpoint(noted).scheduler == {"prediction_type": "v_prediction"}


def test_older_names_and_scales_are_read(whole: Path, changed: Callable[..., Path]) -> None:
    """Names without text_model, and float8 weights with a scale each, give the plain weights."""
    import torch

    def edit(weights: Weights) -> Weights:
        edited = {}
        for name, each in weights.items():
            if name.startswith("model.") and name.endswith(".weight") and each.ndim == 2:
                scale = each.abs().max() / 448
                edited[name] = (each / scale).to(torch.float8_e4m3fn)
                edited[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
            else:
                edited[name.replace("transformer.text_model.", "transformer.")] = each
        return edited | {"scaled_fp8": torch.zeros(1)}

    file = changed(edit)
    assert read_checkpoint(file).pipeline == "StableDiffusionPipeline"
    plain, read = load_checkpoint(str(whole)), load_checkpoint(str(file))
    assert read.keys() == plain.keys()
    for name, each in plain.items():
        assert (read[name].float() - each).abs().max() <= each.abs().max() / 8, name


def test_gaps_and_leftovers_of_a_part_are_told() -> None:
    """A weight that is missing is named; one that no layer takes is found by its values."""
    import torch

    part = torch.nn.Linear(2, 3)
    fill = check_complete(lambda part, weights: part.load_state_dict(weights))
    fill(part, part.state_dict())
    with pytest.raises(ModelSourceError, match=r"lacks 1 weights of the Linear \(bias\)"):
        fill(part, {"weight": part.weight})
    check_taken({"a.weight": 6, "a.bias": 3, "b.weight": 9}, {"a.": part})
    with pytest.raises(ModelSourceError, match=r"holds 10 values for the Linear.*take 9"):
        check_taken({"a.weight": 6, "a.bias": 3, "a.scale": 1}, {"a.": part})
