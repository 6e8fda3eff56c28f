"""
Single files: what a checkpoint holds by its header, and its weights as diffusers takes them.

What no part of a model takes refuses the file, a list of harmless names aside: a tensor that is
dropped in silence may be the scale of a weight, or say how the model is to be sampled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models.configs import UNet
from holdfast.engine.models.families import family_of, refuse
from holdfast.engine.models.integrity import read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from holdfast.engine.models.integrity import Header

UNET = "model.diffusion_model."
VAE = "first_stage_model."
_ENCODERS = ("cond_stage_model.", "conditioner.")
_PARTS = (UNET, VAE, *_ENCODERS)
_HARMLESS = re.compile(
    r"model_ema\..*|denoiser\.sigmas|global_step|logvar|lvlb_weights|betas|posterior_\w+"
    r"|(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?|sqrt_recip\w*|state_dict"
)
"""Averaged weights beside the plain ones, and tables that follow from the noise schedule."""
_MARKERS: Mapping[str, Mapping[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
_SCALES = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale)")
_SCALE_NOTES = re.compile(r".*\.(?:scale_input|input_scale)|(?:.*\.)?scaled_fp8")
_NO_TEXT_MODEL = re.compile(
    r"(?P<prefix>cond_stage_model\.transformer|conditioner\.embedders\.0\.transformer)"
    r"\.(?=embeddings\.|encoder\.|final_layer_norm\.)"
)
_LONE_VAE = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\..*")


@dataclass(frozen=True)
class Checkpoint:
    """
    What the header of a whole model's file says.

    Attributes:
        pipeline: diffusers' pipeline class.
        dtypes: Types of the weights, as safetensors writes them.
        scheduler: Settings that the file carries itself, over those of any configuration.
    """

    pipeline: str
    dtypes: frozenset[str]
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Read from its header what a single file is; no weight is read.

    Raises:
        ModelSourceError: It is damaged, is no whole model, is a model of a kind that cannot run, or
            holds tensors that no part takes.
    """
    header = read_header(path)
    _refuse_parts(path, header)
    larger = any(name.startswith("conditioner.") for name in header.tensors)
    pipeline = "StableDiffusionXLPipeline" if larger else "StableDiffusionPipeline"
    _refuse_kinds(path, header, pipeline)
    scheduler: dict[str, Any] = {}
    for name, settings in _MARKERS.items():
        if name in header.tensors:
            scheduler |= settings
    if header.notes.get("modelspec.prediction_type") == "v":
        scheduler |= _MARKERS["v_pred"]
    known = {*_MARKERS, "scaled_fp8"}
    unknown = [
        name
        for name in header.tensors
        if not name.startswith(_PARTS) and not _HARMLESS.fullmatch(name) and name not in known
    ]
    if unknown:
        msg = (
            f"{path} holds {len(unknown)} tensors that no part of a {pipeline} takes "
            f"({', '.join(sorted(unknown)[:3])}, ...); to leave them out could give wrong images. "
            "Use another file of the model, or its diffusers folder."
        )
        raise ModelSourceError(msg)
    weights = (each for name, each in header.tensors.items() if name.startswith(_PARTS))
    return Checkpoint(pipeline, frozenset(each.dtype for each in weights), scheduler)


def check_lone_vae(path: Path) -> frozenset[str]:
    """
    Make sure that a file is a VAE alone, and return the types of its weights.

    Raises:
        ModelSourceError: It is damaged, or something else.
    """
    header = read_header(path)
    others = [name for name in header.tensors if not _LONE_VAE.fullmatch(name.removeprefix(VAE))]
    if others or not header.tensors:
        msg = (
            f"{path} was given as vae=, but is not a VAE alone: it holds "
            f"{', '.join(sorted(others)[:3]) or 'nothing'}. Give a VAE, or a whole model to take "
            "it from."
        )
        raise ModelSourceError(msg)
    return frozenset(each.dtype for each in header.tensors.values())


def is_whole(path: Path) -> bool:
    """Tell whether a file holds more than a VAE, as far as its names say."""
    names = read_header(path).tensors
    return any(name.startswith((UNET, *_ENCODERS)) for name in names)


def _refuse_parts(path: Path, header: Header) -> None:
    wanted = (("a text encoder", _ENCODERS), ("a VAE", (VAE,)), ("a UNet", (UNET,)))
    missing = [
        what
        for what, prefixes in wanted
        if not any(name.startswith(prefixes) for name in header.tensors)
    ]
    if not missing:
        return
    if header.tensors and all(_LONE_VAE.fullmatch(n.removeprefix(VAE)) for n in header.tensors):
        msg = f"{path} was given as the model, but is a VAE alone. Give it as vae=, with a model."
        raise ModelSourceError(msg)
    msg = (
        f"{path} was given as a whole model, but holds no weights of {' or '.join(missing)}. "
        "Give a Stable Diffusion checkpoint; a LoRA goes into `lora`, a VAE alone into `vae`."
    )
    raise ModelSourceError(msg)


def _refuse_kinds(path: Path, header: Header, pipeline: str) -> None:
    """Refuse what `families` refuses in a folder, by the names and shapes of a header."""
    family = family_of(pipeline)
    sides = {}
    for what, name in (
        ("in", UNET + "input_blocks.0.0.weight"),
        ("latent", VAE + "decoder.conv_in.weight"),
    ):
        tensor = header.tensors.get(name)
        sides[what] = tensor.shape[1] if tensor is not None and len(tensor.shape) > 1 else 4
    index: dict[str, Any] = {}
    if pipeline == "StableDiffusionXLPipeline":
        names = header.tensors
        clip = any(name.startswith("conditioner.embedders.0.transformer.") for name in names)
        index = {} if clip else {"text_encoder": [None, None]}
    if sides["in"] == 2 * sides["latent"] + 1:
        raise refuse(str(path), "an inpainting model in a single file; give it as a folder")
    why = family.refusal(index) or family.denoiser_refusal(
        UNet(in_channels=sides["in"]), sides["latent"]
    )
    if why:
        raise refuse(str(path), why)


def load_checkpoint(path: str) -> dict[str, Any]:
    """
    Read all weights under the names that diffusers converts, scaled where they carry a scale.

    Older files call a text encoder's layers without ``text_model``; float8 weights come with a
    scale for each layer.
    """
    from safetensors.torch import load_file

    weights: dict[str, Any] = load_file(path)
    for name in tuple(weights):
        scaled = _SCALES.fullmatch(name)
        if scaled:
            target = f"{scaled['layer']}.weight"
            scale = weights.pop(name).float()
            factor = (
                scale
                if scale.numel() == 1
                else scale.reshape(-1, *[1] * (weights[target].ndim - 1))
            )
            weights[target] = weights[target].float() * factor
        elif _SCALE_NOTES.fullmatch(name) or name in _MARKERS:
            del weights[name]
    return {
        _NO_TEXT_MODEL.sub(r"\g<prefix>.text_model.", name): each for name, each in weights.items()
    }


def check_complete(fill: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return diffusers' function that fills a part with converted weights, made to refuse gaps.

    Args:
        fill: Takes the part and its weights by name; leaves what they lack empty, without a word.
    """

    def filled(part: Any, weights: Mapping[str, Any], *args: Any, **settings: Any) -> Any:
        _refuse_missing(part, {name for name, _ in part.named_parameters()} - weights.keys())
        return fill(part, weights, *args, **settings)

    return filled


def check_loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    """
    Return a library's function that loads a part from a folder, made to refuse gaps.

    Args:
        load: Takes ``output_loading_info``; draws what the weights lack at random, and warns.
    """

    def loaded(kind: Any, *args: Any, **settings: Any) -> Any:
        part, told = load(kind, *args, **{**settings, "output_loading_info": True})
        _refuse_missing(part, told["missing_keys"])
        return (part, told) if settings.get("output_loading_info") else part

    return loaded


def _refuse_missing(part: Any, missing: Collection[str]) -> None:
    if missing:
        msg = (
            f"it lacks {len(missing)} weights of the {type(part).__name__} "
            f"({', '.join(sorted(missing)[:3])}). Get the whole model"
        )
        raise ModelSourceError(msg)


def check_taken(weights: Mapping[str, int], parts: Mapping[str, Any]) -> None:
    """
    Make sure that every value of the file came into a part, and every value of a part from it.

    Args:
        weights: Number of values of each tensor of the file.
        parts: As diffusers loaded them, by the prefix that their weights have in the file.

    Raises:
        ModelSourceError: Some did not.
    """
    for prefix, part in parts.items():
        held = sum(
            count
            for name, count in weights.items()
            if name.startswith(prefix) and not name.startswith(f"{prefix}loss.")
        )
        taken = sum(each.numel() for each in part.state_dict().values())
        if held != taken:
            msg = (
                f"the file holds {held} values for the {type(part).__name__}, of which its layers "
                f"take {taken}: the configuration beside it is of another model, or the file is of "
                "a kind that diffusers does not know"
            )
            raise ModelSourceError(msg)
