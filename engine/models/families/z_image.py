"""Z-Image, and its turbo model, which is run without guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.engine.models.configs import ZImageTransformer
from holdfast.engine.models.families.family import Family, Guidance
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOKENS = 512
_TEMPLATE_TOKENS = 8
"""Of what stands around a prompt: begin, "user", a line's end, end, a line's end, begin, ..."""
_GROUP = 32
"""Places are filled up to a multiple of it."""


class ZImage(Family):
    """Takes prompts of any length, as a list of rows; guidance begins over 0."""

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """Return a list with rows (tokens, width)."""
        embeds, _ = pipeline.encode_prompt(
            prompt=prompt,
            device=pipeline.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
        )
        return {"prompt_embeds": embeds}

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """The template counts, and its end is cut off with that of the prompt."""
        return {"tokenizer": _TOKENS - _TEMPLATE_TOKENS}

    def adapt(self, pipeline: Any) -> None:
        """Have the transformer take lists, as the pipeline hands them to it."""
        from optimum.intel.openvino.modeling_diffusion import _OVZImageTransformerAdapter

        pipeline.transformer = _OVZImageTransformerAdapter(pipeline.transformer)

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Places are patches of two latent pixels' side, filled up."""
        batch, _, height, width = main
        places = (height // 2) * (width // 2)
        filled = -(-places // _GROUP) * _GROUP
        return {"hidden_states": main, "timestep": (batch,), "img_ids": (batch, filled, 3)}

    def probe_value(self, name: str, main: tuple[int, ...]) -> float:
        """Its denoiser's mask is added, so that nothing is masked by 0."""
        return 0.0 if name == "encoder_attention_mask" else super().probe_value(name, main)


Z_IMAGE = ZImage(
    name="z-image",
    denoiser="transformer",
    denoiser_config=ZImageTransformer,
    text_encoders=("text_encoder",),
    pipelines={Mode.TXT2IMG: "OVZImagePipeline", Mode.IMG2IMG: "OVZImageImg2ImgPipeline"},
    default_side=128,
    guidance=Guidance("doubled", above=0.0, prompt_first=True),
    vae_statistics=("shift_factor",),
    probe_tokens=2 * _GROUP,
    reads_whole=True,
    schedulers=("euler", "flow-euler"),
)
