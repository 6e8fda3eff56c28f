"""Sana: few latents, each for 32 pixels' side."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from holdfast.engine.models.configs import Transformer
from holdfast.engine.models.families.family import Family
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOKENS = 300
_MARKS = 2


class Sana(Family):
    """Puts an instruction before every prompt, as its own pipeline does."""

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """Encode as a call of the pipeline would, which alone knows the instruction."""
        known = inspect.signature(type(pipeline).auto_model_class.__call__).parameters
        instruction = known["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt=prompt,
            device=pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
            complex_human_instruction=None if negative else instruction,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """The instruction does not count."""
        return {"tokenizer": _TOKENS - _MARKS}

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Each image has a timestep of its own."""
        return {"hidden_states": main, "timestep": main[:1]}


SANA = Sana(
    name="sana",
    denoiser="transformer",
    denoiser_config=Transformer,
    text_encoders=("text_encoder",),
    pipelines={Mode.TXT2IMG: "OVSanaPipeline", Mode.IMG2IMG: "OVSanaImg2ImgPipeline"},
    default_side=32,
    # Binning makes another size than was asked for, and an empty text is refused beside embeddings.
    settings={"use_resolution_binning": False, "negative_prompt": None},
    cuts_vae=False,
    reads_whole=True,
    schedulers=("euler", "flow-euler", "dpm++2m", "dpm++2s", "unipc", "deis"),
)
