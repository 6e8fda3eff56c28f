"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.engine.models.configs import Denoiser, Transformer
from holdfast.engine.models.families.family import Family, Scale
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

_T5_TOKENS = 256
"""That its pipelines hand to T5, an end included."""


class StableDiffusion3(Family):
    """A transformer on latents, with two CLIPs and a T5 that it can do without."""

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """Give all text encoders the same prompt."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            prompt_3=None,
            device=pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """T5 reads on where CLIP ends; where it is missing, CLIP's limit is all."""
        if "tokenizer_3" in readable:
            return {"tokenizer_3": _T5_TOKENS - 1}
        return super().prompt_limits(readable)

    def longest_side(self, denoiser: Denoiser, scale: Scale) -> int | None:
        """Tell how far its positions reach."""
        patches = denoiser.pos_embed_max_size if isinstance(denoiser, Transformer) else None
        return None if patches is None else patches * denoiser.patch * scale.factor

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Each image has a timestep of its own."""
        return {"hidden_states": main, "timestep": main[:1]}


STABLE_DIFFUSION_3 = StableDiffusion3(
    name="sd3",
    denoiser="transformer",
    denoiser_config=Transformer,
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    optional=frozenset({"text_encoder_3"}),
    pipelines={
        Mode.TXT2IMG: "OVStableDiffusion3Pipeline",
        Mode.IMG2IMG: "OVStableDiffusion3Img2ImgPipeline",
    },
    default_side=128,
    vae_statistics=("shift_factor",),
    reads_whole=True,
    schedulers=("euler", "flow-euler", "dpm++2m", "dpm++2s", "unipc", "deis"),
)
