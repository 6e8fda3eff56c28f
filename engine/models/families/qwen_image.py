"""Qwen-Image: a language model reads the prompt, and the VAE is one of videos."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from holdfast.engine.models.configs import PackedTransformer
from holdfast.engine.models.families.family import Guidance
from holdfast.engine.models.families.packed import Packed
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.engine.models.configs import Denoiser, Vae

_TOKENS = 1024
_TEMPLATE_END = 5
"""Tokens of the template after the prompt; those before it do not count."""
_NOTHING = " "
"""The negative prompt that stands for none: without one its guidance is off."""


@dataclass(frozen=True)
class QwenImage(Packed):
    """
    Guided by a second inference, of which the first one's length is kept.

    Attributes:
        text_width: Of the prompt's embeddings, which its graph leaves open.
    """

    text_width: int = 3584

    def fitted(self, denoiser: Denoiser, vae: Vae) -> Self:
        """Take over the width of the prompt's embeddings."""
        if not isinstance(denoiser, PackedTransformer):
            return self
        return replace(self, text_width=denoiser.joint_attention_dim)

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """Return embeddings, and a mask where not every place is a token."""
        embeds, mask = pipeline.encode_prompt(
            prompt=prompt or (_NOTHING if negative else prompt),
            device=pipeline.device,
            max_sequence_length=_TOKENS,
        )
        return {"prompt_embeds": embeds} | ({} if mask is None else {"prompt_embeds_mask": mask})

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """The template's beginning does not count, its end does."""
        return {"tokenizer": _TOKENS - _TEMPLATE_END}

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Rows and columns are told as numbers."""
        return {
            "hidden_states": main,
            "timestep": main[:1],
            "encoder_hidden_states": (main[0], -1, self.text_width),
        }

    def probe_value(self, name: str, main: tuple[int, ...]) -> float:
        """As many rows and columns as there are places."""
        if name in ("height", "width"):
            return math.isqrt(main[1])
        return super().probe_value(name, main)


QWEN_IMAGE = QwenImage(
    name="qwen-image",
    denoiser="transformer",
    denoiser_config=PackedTransformer,
    text_encoders=("text_encoder",),
    pipelines={Mode.TXT2IMG: "OVQwenImagePipeline", Mode.IMG2IMG: "OVQwenImageImg2ImgPipeline"},
    default_side=128,
    guidance=Guidance("twice", argument="true_cfg_scale"),
    vae_statistics=("latents_mean", "latents_std"),
    cuts_vae=False,
    has_frames=True,
    reads_whole=True,
    schedulers=("euler", "flow-euler"),
)
