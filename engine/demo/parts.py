"""The demo model's parts, untrained: ordinary diffusers and transformers classes, only small."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from holdfast.engine.imports import heavy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

PROMPT_TOKENS = 32
LATENT_SIDE = 16
VAE_FACTOR = 4


def tokenizer(words: Iterable[str]) -> Any:
    """
    Build a CLIPTokenizer that has every one of some words as a token of its own.

    Any other text falls apart into bytes, as it does with CLIP's own vocabulary.

    Args:
        words: Lower-case words.
    """
    heavy()
    from transformers import CLIPTokenizer

    alphabet = [chr(code) for code in _byte_letters()]
    merges = _merges(sorted(set(words)))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=PROMPT_TOKENS,
    )


def _byte_letters() -> list[int]:
    """Code points that stand for the 256 bytes in byte-level BPE: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + index for index in range(256 - len(printable))]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016) carried on until each word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for letters in spelled for pair in pairwise(letters)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for letters in spelled:
            at = 0
            while at < len(letters) - 1:
                if (letters[at], letters[at + 1]) == best:
                    letters[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def words_in(texts: Iterable[str]) -> set[str]:
    """Collect the words and the punctuation of some texts, as CLIP's tokenizer splits them."""
    return {word for text in texts for word in re.findall(r"[a-z]+|[^\sa-z]+", text.lower())}


def autoencoder() -> Any:
    """Build the KL VAE: four latent channels, each latent cell stands for 4 x 4 pixels."""
    heavy()
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=LATENT_SIDE * VAE_FACTOR,
    )


def text_encoder(tokens: Any) -> Any:
    """Build the CLIP text encoder for a tokenizer: two layers of 128."""
    heavy()
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=128,
            intermediate_size=384,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,  # CLIP's, which programs take for granted
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def unet() -> Any:
    """
    Build the UNet: three levels, down to 4 x 4 latents, where a convolution sees the whole picture.

    Attention to the prompt at 8 x 8 and at the bottom. The prompt as a whole also joins the time
    embedding, which scales and shifts every block: what holds everywhere, such as the background,
    needs no attention to be learned.
    """
    heavy()
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def scheduler() -> Any:
    """
    Build the default scheduler: DDIM on v-prediction, from pure noise (Lin et al. 2023).

    Betas rescaled to zero terminal SNR and trailing timesteps let the first step see no signal at
    all, as in training; otherwise backgrounds come out washed out.
    """
    heavy()
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pipeline(tokens: Any, text: Any, denoiser: Any, vae: Any) -> Any:
    """Put trained parts together as a plain StableDiffusionPipeline."""
    heavy()
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokens,
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def two_threads() -> ThreadPoolExecutor:
    """Open two threads whose torch operators keep to their own."""
    import torch

    torch.set_num_threads(1)
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))


def save_lora(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """
    Write a LoRA of the UNet in both formats: stripes.safetensors and stripes_kohya.safetensors.

    Args:
        weights: By PEFT's names, without `unet.` before them.
        folder: Where the files go.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from safetensors.torch import save_file

    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(weights),
        weight_name="stripes.safetensors",
    )
    named = {f"unet.{name}": weight for name, weight in weights.items()}
    save_file(convert_state_dict_to_kohya(named), folder / "stripes_kohya.safetensors")


def save(pipe: Any, folder: Path) -> None:
    """
    Write a pipeline in diffusers' layout as float16 safetensors, vocabulary and merges as files.

    Args:
        pipe: What `pipeline` gives; its parts are float16 afterwards.
        folder: Made where it does not exist, overwritten where it does.
    """
    import torch

    pipe.to(torch.float16).save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        said = json.loads(file.read_text())
        if said.pop("_name_or_path", None) is not None:  # where a checkpoint lay
            file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    described = json.loads(pipe.tokenizer.backend_tokenizer.to_str())["model"]
    words = folder / "tokenizer"
    (words / "vocab.json").write_text(json.dumps(described["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in described["merges"])]
    (words / "merges.txt").write_text("\n".join(lines) + "\n")
