"""
Tiny models of the families whose denoiser is a transformer, with seeded random weights.

Parts, kinds of layers, ratios and scheduler settings are those of the real models; widths and
depths are as small as the exporters take them. Sides are multiples of 16, of Sana 32.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.engine.imports import heavy, quiet
from tests.support import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORDS = models.WORDS.split()

# What the pipelines put around a prompt: as whole words, so that it takes as many tokens as with
# the real tokenizers (QwenImage drops the first 34, whatever they are).
TEMPLATE = [
    "system", "user", "assistant", "Describe", "the", "image", "by", "detailing", "color", "shape",
    "size", "texture", "quantity", "text", "spatial", "relationships", "objects", "background",
    "think",
]  # fmt: skip

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Of Qwen3, as far as one question goes."""


def sd3(folder: Path, seed: int = 0, *, medium: bool = True, t5: bool = True) -> Path:
    """
    Stable Diffusion 3 or 3.5; sides are multiples of 16.

    Args:
        folder: Where to write it.
        seed: Of the weights.
        medium: With the normed and doubled attention of 3.5; else as 3.0.
        t5: With the third text encoder, which people leave out to save memory.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    with _seeded(seed):
        tokenizer = models.build_tokenizer(folder / "tokenizer")
        tokenizer_2 = models.build_tokenizer(folder / "tokenizer_2")
        tokenizer_3 = t5_tokenizer(folder / "tokenizer_3") if t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,  # Of both CLIPs side by side, and of T5.
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=96,
            dual_attention_layers=(0,) if medium else (),
            qk_norm="rms_norm" if medium else None,
        ).eval()
        _amplify(transformer.context_embedder, 4)
        _settle(
            transformer.proj_out,
            lambda: (
                transformer(
                    hidden_states=_noise(2, 16, 8, 8),
                    timestep=_at(500.0, 2),
                    encoder_hidden_states=_noise(2, 20, 64),
                    pooled_projections=_noise(2, 64),
                ).sample
            ),
        )
        return _save(
            folder,
            StableDiffusion3Pipeline,
            vae=_sixteen_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=_clip_text(tokenizer, projected=True),
            text_encoder_2=_clip_text(tokenizer_2, projected=True),
            text_encoder_3=_t5_text(tokenizer_3, width=64) if t5 else None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def flux(folder: Path, seed: int = 0, *, told_guidance: bool = True) -> Path:
    """
    Flux 1; sides are multiples of 16.

    Args:
        folder: Where to write it.
        seed: Of the weights.
        told_guidance: Guidance is an input, as of Flux dev; schnell has none.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    schedule = _DYNAMIC_SHIFT
    if not told_guidance:
        schedule = schedule | {"shift": 1.0, "use_dynamic_shifting": False}
    with _seeded(seed):
        tokenizer = models.build_tokenizer(folder / "tokenizer")
        tokenizer_2 = t5_tokenizer(folder / "tokenizer_2")
        transformer = FluxTransformer2DModel(
            in_channels=64,
            out_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=told_guidance,
            axes_dims_rope=(4, 6, 6),
        ).eval()
        _amplify(transformer.context_embedder, 8)
        _listen(transformer, 12)
        _settle(
            transformer.proj_out,
            lambda: (
                transformer(
                    hidden_states=_noise(2, 16, 64),
                    encoder_hidden_states=_noise(2, 20, 32),
                    pooled_projections=_noise(2, 32),
                    timestep=_at(0.5, 2),
                    guidance=_at(3.5, 2) if told_guidance else None,
                    img_ids=_noise(16, 3) * 0,
                    txt_ids=_noise(20, 3) * 0,
                ).sample
            ),
        )
        return _save(
            folder,
            FluxPipeline,
            vae=_sixteen_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_clip_text(tokenizer),
            text_encoder_2=_t5_text(tokenizer_2, width=32),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        )


def flux2_klein(folder: Path, seed: int = 0, *, distilled: bool = True) -> Path:
    """
    Flux 2 Klein; sides are multiples of 16.

    Its text encoder has 28 layers, thin ones: the pipeline reads the layers 9, 18 and 27.

    Args:
        folder: Where to write it.
        seed: Of the weights.
        distilled: Without guidance, as the 4-step models are.
    """
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    with _seeded(seed):
        tokenizer = qwen_tokenizer(folder / "tokenizer")
        text = _qwen3_text(tokenizer, layers=28, causal=True)
        transformer = Flux2Transformer2DModel(
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 32,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).eval()
        _amplify(transformer.context_embedder, 40)  # Qwen's random states are small.
        _listen(transformer, 12)
        _settle(
            transformer.proj_out,
            lambda: (
                transformer(
                    hidden_states=_noise(2, 16, 128),
                    encoder_hidden_states=_noise(2, 20, 96),
                    timestep=_at(0.5, 2),
                    guidance=None,
                    img_ids=_noise(2, 16, 4) * 0,
                    txt_ids=_noise(2, 20, 4) * 0,
                ).sample
            ),
        )
        vae = AutoencoderKLFlux2(**_VAE_SHAPE, latent_channels=32, sample_size=64).eval()
        _settle_vae(vae, 32, deviation=1.0)
        # The pipeline undoes this norm between transformer and VAE; a trained one is not 0 and 1.
        vae.bn.running_mean.copy_(torch.randn(128) * 0.1)
        vae.bn.running_var.copy_(torch.rand(128) + 0.5)
        return _save(
            folder,
            Flux2KleinPipeline,
            vae=vae,
            text_encoder=text,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**_DYNAMIC_SHIFT),
            is_distilled=distilled,
        )


def z_image(folder: Path, seed: int = 0) -> Path:
    """Z-Image; sides are multiples of 16. The turbo model is this with guidance 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with _seeded(seed):
        tokenizer = qwen_tokenizer(folder / "tokenizer")
        transformer = ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 512, 512],
        ).eval()
        for pad in (transformer.x_pad_token, transformer.cap_pad_token):
            pad.normal_(std=0.02)  # Fresh ones are whatever lay in memory.
        _settle(
            transformer.all_final_layer["2-1"].linear,
            lambda: transformer(
                list(_noise(2, 16, 1, 8, 8)),
                _at(0.5, 2),
                list(_noise(2, 20, 32)),
                return_dict=False,
            )[0],
        )
        return _save(
            folder,
            ZImagePipeline,
            vae=_sixteen_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_qwen3_text(tokenizer, layers=3),
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def sana(folder: Path, seed: int = 0) -> Path:
    """
    Sana; sides are multiples of 32.

    Args:
        folder: Where to write it.
        seed: Of the weights.
    """
    from diffusers import (
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    with _seeded(seed):
        tokenizer = gemma_tokenizer(folder / "tokenizer")
        transformer = SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=32,
        ).eval()
        _amplify(transformer.caption_projection.linear_2, 4)
        _settle(
            transformer.proj_out,
            lambda: (
                transformer(
                    hidden_states=_noise(2, 32, 4, 4),
                    encoder_hidden_states=_noise(2, 20, 32),
                    timestep=_at(500.0, 2),
                ).sample
            ),
        )
        flow = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        return _save(
            folder,
            SanaPipeline,
            vae=_deep_vae(),
            text_encoder=_gemma_text(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=flow,
        )


def qwen_image(folder: Path, seed: int = 0) -> Path:
    """QwenImage; sides are multiples of 16."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with _seeded(seed):
        tokenizer = qwen_tokenizer(folder / "tokenizer")
        text = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    **_DECODER,
                    "vocab_size": len(tokenizer),
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                },
            )
        ).eval()
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ).eval()
        _amplify(transformer.txt_in, 8)
        _listen(transformer, 12)
        _settle(
            transformer.proj_out,
            lambda: (
                transformer(
                    hidden_states=_noise(2, 16, 64),
                    encoder_hidden_states=_noise(2, 20, 32),
                    timestep=_at(0.5, 2),
                    img_shapes=[[(1, 4, 4)]] * 2,
                ).sample
            ),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1
        ).eval()
        last = vae.decoder.conv_out
        _settle(last, lambda: vae.decode(_noise(2, 16, 1, 8, 8)).sample, 0.5)
        moments = vae.quant_conv
        _settle(moments, lambda: vae.encode(_blots()[:, :, None]).latent_dist.mean, 2.0)
        moments.weight[16:] *= 0.01
        moments.bias[16:] = -6.0
        return _save(
            folder,
            QwenImagePipeline,
            vae=vae,
            text_encoder=text,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                **_DYNAMIC_SHIFT | {"shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9},
                shift_terminal=0.02,
            ),
        )


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd3": lambda folder: sd3(folder, medium=False),
    "sd3.5": sd3,
    "sd3-without-t5": lambda folder: sd3(folder, t5=False),
    "flux-dev": flux,
    "flux-schnell": lambda folder: flux(folder, told_guidance=False),
    "flux2-klein": flux2_klein,
    "flux2-klein-base": lambda folder: flux2_klein(folder, distilled=False),
    "z-image": z_image,
    "sana": sana,
    "qwen-image": qwen_image,
}
"""Every model above, by a short name."""


def build(name: str, folder: Path) -> Path:
    """Write one of `FAMILIES` as a diffusers folder."""
    heavy()
    with quiet():
        return FAMILIES[name](folder)


_DYNAMIC_SHIFT = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
_VAE_SHAPE = {
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""A text model of the kind that writes: Qwen, Gemma."""


def _kl_vae(latent_channels: int, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        **_VAE_SHAPE, latent_channels=latent_channels, sample_size=64, **settings
    ).eval()
    _settle_vae(vae, latent_channels, deviation=1 / vae.config.scaling_factor)
    return vae


def _sixteen_vae(**settings: Any) -> Any:
    """A VAE of SD3, Flux and Z-Image."""
    return _kl_vae(16, use_quant_conv=False, use_post_quant_conv=False, **settings)


def _settle_vae(vae: Any, channels: int, *, deviation: float) -> None:
    _settle(vae.decoder.conv_out, lambda: vae.decode(_noise(2, channels, 8, 8)).sample, 0.5)
    moments = vae.quant_conv or vae.encoder.conv_out
    _settle(moments, lambda: vae.encode(_blots()).latent_dist.mean, deviation)
    moments.weight[channels:] *= 0.01  # This half predicts the logarithm of the variance.
    moments.bias[channels:] = -6.0


def _deep_vae() -> Any:
    """A VAE of Sana: 1/32 of the size, 32 channels, no distribution."""
    from diffusers import AutoencoderDC

    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths = (8, 8, 8, 16, 16, 32)
    scales = ((), (), (), (), (5,), (5,))
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    ).eval()
    _settle(vae.decoder.conv_out, lambda: vae.decode(_noise(2, 32, 2, 2)).sample, 0.5)
    return vae


def _clip_text(tokenizer: Any, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _t5_text(tokenizer: Any, *, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def _qwen3_text(tokenizer: Any, *, layers: int, causal: bool = False) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(
        **_DECODER | {"num_hidden_layers": layers},
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    return (Qwen3ForCausalLM if causal else Qwen3Model)(config).eval()


def _gemma_text(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            **_DECODER,
            vocab_size=len(tokenizer),
            query_pre_attn_scalar=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def t5_tokenizer(folder: Path) -> Any:
    """Write and load a tokenizer of T5: pieces with scores, an end and no beginning."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = T5TokenizerFast(pieces, extra_ids=0, model_max_length=512)
    return _reloaded(tokenizer, folder)


def qwen_tokenizer(folder: Path) -> Any:
    """Write and load a tokenizer of Qwen 2 and 3: bytes merged to words, and a chat template."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    words = [*WORDS, *TEMPLATE]
    spaced = ["Ġ" + word for word in words]
    vocabulary, merges = _merged(
        [*words, *spaced, "ĊĊ"], sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = Qwen2TokenizerFast(
        vocabulary,
        merges,
        eos_token="<|im_end|>",  # noqa: S106 - a token of text
        pad_token="<|endoftext|>",  # noqa: S106 - the same
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
        model_max_length=131072,
        chat_template=CHAT,
    )
    return _reloaded(tokenizer, folder)


def gemma_tokenizer(folder: Path) -> Any:
    """Write and load a tokenizer of Gemma: a beginning and no end, bytes for unknown letters."""
    from transformers import GemmaTokenizerFast

    letters = ["▁", "\n", *map(chr, range(33, 127))]
    vocabulary, merges = _merged([*WORDS, *("▁" + word for word in WORDS)], letters)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    numbered = {token: index for index, token in enumerate(tokens)}
    return _reloaded(GemmaTokenizerFast(numbered, merges), folder)


def _merged(words: list[str], letters: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """
    Learn byte-pair merges that make one token of each word (R. Sennrich et al., ACL 2016).

    The most frequent pair is merged first, until nothing is left to merge.
    """
    split = [list(word) for word in dict.fromkeys(words)]
    vocabulary = {letter: index for index, letter in enumerate(dict.fromkeys(letters))}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: dict[tuple[str, str], int] = {}
        for pieces in split:
            for pair in itertools.pairwise(pieces):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            return vocabulary, merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        for pieces in split:
            place = 0
            while place < len(pieces) - 1:
                if (pieces[place], pieces[place + 1]) == best:
                    pieces[place : place + 2] = ["".join(best)]
                place += 1


def _reloaded(tokenizer: Any, folder: Path) -> Any:
    """Write a tokenizer and read it back, so that a model is built with what others will read."""
    tokenizer.save_pretrained(folder)
    return type(tokenizer).from_pretrained(folder)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make weights reproducible, and leave the process's random numbers as they were."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(shape)


def _at(value: float, rows: int) -> Any:
    import torch

    return torch.full((rows,), value)


def _blots() -> Any:
    """Two pictures of soft blots, 64 px, as something to encode."""
    import torch

    return torch.nn.functional.interpolate(_noise(2, 3, 8, 8), scale_factor=8.0) * 0.5


def _amplify(layer: Any, factor: float) -> None:
    """Let more of a layer through: of the prompt, mostly."""
    layer.weight *= factor


def _listen(transformer: Any, factor: float) -> None:
    """Let pixels take more from the prompt where both attend to each other."""
    for name, layer in transformer.named_modules():
        if name.endswith("add_v_proj"):
            _amplify(layer, factor)


def _settle(layer: Any, output: Callable[[], Any], deviation: float = 1.0) -> None:
    """Scale a last layer so that what comes out has this standard deviation."""
    import torch

    values = output()
    if isinstance(values, (list, tuple)):
        values = torch.stack(list(values))
    factor = deviation / values.std()
    layer.weight *= factor
    if layer.bias is not None:
        layer.bias *= factor


def _save(folder: Path, cls: Any, **parts: Any) -> Path:
    cls(**parts).save_pretrained(folder)
    return folder
