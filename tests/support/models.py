"""Stable Diffusion with seeded random weights, built on the spot: no download, no licence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.engine.imports import heavy, quiet

if TYPE_CHECKING:
    from pathlib import Path

WORDS = (
    "a an the of on in and with small large red green blue yellow black white circle square "
    "triangle star ring background cat dog house tree photo painting bad blurry"
)


@dataclass(frozen=True)
class Shape:
    """Widths and depths of a model's parts, as the diffusers and transformers configs name them."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]


TINY = Shape(
    unet={
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    vae={"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
    text_encoder={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
)
SD15 = Shape(
    unet={
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    text_encoder={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
)


def build_tiny_sd(folder: Path, *, seed: int = 0) -> Path:
    """
    Write a tiny Stable Diffusion 1.x as a diffusers folder: 64 px by default, multiples of 16.

    Args:
        folder: Where to write it; made if it is not there.
        seed: Other seeds give other weights in the same graph.

    Returns:
        ``folder``.
    """
    return build(folder, TINY, seed=seed)


def build_sd15_size(folder: Path, *, seed: int = 0) -> Path:
    """
    Write random weights in the exact size of Stable Diffusion 1.5 (float16, 2 GB), for benchmarks.

    Args:
        folder: Where to write it; made if it is not there.
        seed: Other seeds give other weights in the same graph.

    Returns:
        ``folder``.
    """
    return build(folder, SD15, seed=seed, dtype="float16")


def build(folder: Path, shape: Shape, *, seed: int, dtype: str = "float32") -> Path:
    """Write a seeded random Stable Diffusion of the given shape as a diffusers folder."""
    heavy()
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    with quiet(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(folder / "tokenizer")
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **shape.text_encoder,
            )
        ).eval()
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **shape.unet).eval()
        blocks = len(shape.vae["block_out_channels"])
        vae = AutoencoderKL(
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            sample_size=shape.unet["sample_size"] * 2 ** (blocks - 1),
            **shape.vae,
        ).eval()
        if shape is TINY:
            enliven(unet, vae, text_encoder)
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def enliven(unet: Any, vae: Any, text_encoder: Any) -> None:
    """Scale random weights so that noise, prompt and latents each show in the picture."""
    import torch

    for name, parameter in unet.named_parameters():
        if "attn2.to_out.0.weight" in name or "attn2.to_v.weight" in name:
            parameter.mul_(4.0)
    tokens = torch.tensor([[0, 1, 2, 3]])
    latents = torch.randn(4, 4, 8, 8)
    text = text_encoder(tokens).last_hidden_state.expand(4, -1, -1)
    scale_to(unet.conv_out, lambda: unet(latents, torch.tensor(500), text).sample, 1.0)
    scale_to(vae.decoder.conv_out, lambda: vae.decode(latents).sample, 0.5)
    pixels = torch.nn.functional.interpolate(torch.randn(4, 3, 8, 8), scale_factor=8.0) * 0.5
    means = vae.encoder.conv_out
    scale_to(means, lambda: vae.encode(pixels).latent_dist.mean, 1 / vae.config.scaling_factor)
    means.weight[4:] *= 0.01  # The other half predicts the logarithm of the variance.
    means.bias[4:] = -6.0


def scale_to(layer: Any, output: Any, deviation: float) -> None:
    """Centre a last layer's output channels on 0 and give them one standard deviation."""
    values = output()
    channels = values.shape[1]
    layer.bias[:channels] -= values.mean(dim=(0, 2, 3))
    factor = deviation / values.std()
    layer.weight *= factor
    layer.bias *= factor


def build_tokenizer(folder: Path) -> Any:
    """Write and load a CLIP tokenizer that knows ``WORDS`` whole and spells out everything else."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def write_single_file(source: Path, target: Path) -> Path:
    """
    Write a diffusers folder's weights as one checkpoint with the names of the original code base.

    Those names count blocks through (``input_blocks.4.1``) where diffusers nests them.

    Args:
        source: A Stable Diffusion 1.x folder.
        target: The ``.safetensors`` file.

    Returns:
        ``target``.
    """
    from safetensors.torch import load_file, save_file

    target.parent.mkdir(parents=True, exist_ok=True)

    layers = json.loads((source / "unet" / "config.json").read_text())["layers_per_block"]
    blocks = len(json.loads((source / "vae" / "config.json").read_text())["block_out_channels"])
    weights = {}
    for name, value in load_file(source / "unet" / "diffusion_pytorch_model.safetensors").items():
        weights["model.diffusion_model." + original_unet_name(name, layers)] = value
    for name, value in load_file(source / "vae" / "diffusion_pytorch_model.safetensors").items():
        original = original_vae_name(name, blocks)
        convolution = ".mid.attn_1." in original and value.ndim == 2
        weights["first_stage_model." + original] = (
            value[:, :, None, None].contiguous() if convolution else value
        )
    for name, value in load_file(source / "text_encoder" / "model.safetensors").items():
        weights["cond_stage_model.transformer." + name] = value
    save_file(weights, target)
    return target


def original_unet_name(name: str, layers: int) -> str:
    """Translate a name of a diffusers UNet's weight into the original code base's."""

    def block(match: re.Match[str]) -> str:
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        last = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 0}[kind]
        if side == "down":
            place = (level + 1) * (layers + 1) if kind == "downsamplers" else None
            return f"input_blocks.{place or 1 + level * (layers + 1) + index}.{last}."
        if kind == "upsamplers":
            index, last = layers, 1 if level == 0 else 2  # The first level has no attention.
        return f"output_blocks.{level * (layers + 1) + index}.{last}."

    name = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", block, name)
    for ours, original in (
        (r"^mid_block\.resnets\.0", "middle_block.0"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^mid_block\.resnets\.1", "middle_block.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^add_embedding\.linear_1", "label_emb.0.0"),
        (r"^add_embedding\.linear_2", "label_emb.0.2"),
        (r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op."),
    ):
        name = re.sub(ours, original, name)
    if "transformer_blocks" in name:
        return name
    for ours, original in (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    ):
        name = name.replace(f".{ours}.", f".{original}.")
    return name


def original_vae_name(name: str, blocks: int) -> str:
    """Translate a name of a diffusers VAE's weight into the original code base's."""
    name = re.sub(
        r"up_blocks\.(\d+)", lambda match: f"up_blocks.{blocks - 1 - int(match[1])}", name
    )
    for ours, original in (
        (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
        (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
    ):
        name = re.sub(ours, original, name)
    return name
