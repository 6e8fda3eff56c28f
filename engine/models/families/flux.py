"""Flux 1: dev, which is told the guidance, and schnell, which has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.engine.models.configs import PackedTransformer
from holdfast.engine.models.families.family import UNGUIDED
from holdfast.engine.models.families.packed import Packed
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

_T5_TOKENS = 512
"""That its pipelines hand to T5, an end included."""


class Flux(Packed):
    """Reads a prompt with T5; of CLIP it takes the gist."""

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """Give both text encoders the same prompt."""
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt=prompt,
            prompt_2=None,
            device=pipeline.device,
            max_sequence_length=_T5_TOKENS,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """CLIP's end is no end: T5 reads on."""
        return {"tokenizer_2": min(_T5_TOKENS, readable["tokenizer_2"]) - 1}

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Places have numbers, the same for all images."""
        batch, places, _ = main
        return {
            "hidden_states": main,
            "timestep": (batch,),
            "guidance": (batch,),
            "img_ids": (places, 3),
            "txt_ids": (-1, 3),
        }


FLUX = Flux(
    name="flux",
    denoiser="transformer",
    denoiser_config=PackedTransformer,
    text_encoders=("text_encoder", "text_encoder_2"),
    pipelines={Mode.TXT2IMG: "OVFluxPipeline", Mode.IMG2IMG: "OVFluxImg2ImgPipeline"},
    default_side=128,
    guidance=UNGUIDED,
    vae_statistics=("shift_factor",),
    reads_whole=True,
    schedulers=("euler", "flow-euler", "dpm++2m", "dpm++2s", "unipc", "deis"),
)
