"""Flux.2 Klein, the base model and the distilled one, which has no guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from holdfast.engine.models.configs import Flux2Vae, PackedTransformer
from holdfast.engine.models.families.family import UNGUIDED, Guidance, refuse
from holdfast.engine.models.families.packed import SIDE, Packed, grid
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from holdfast.engine.models.configs import Denoiser, Vae

_TOKENS = 512
_TEMPLATE_TOKENS = 12
"""Of what stands around a prompt, an empty thought included."""
_LAYERS = (9, 18, 27)
"""Of the text encoder, whose states are the prompt."""


@dataclass(frozen=True)
class Flux2Klein(Packed):
    """
    Its latents are the VAE's; patches of them are normalised for the denoiser.

    Attributes:
        mean: Of each value of a patch.
        deviation: Of the same.
    """

    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def having(self, index: Mapping[str, Any]) -> Self:
        """Leave guidance out where the model was distilled to do without."""
        return replace(self, guidance=UNGUIDED) if index.get("is_distilled") else self

    def fitted(self, denoiser: Denoiser, vae: Vae) -> Self:
        """Take over the norm between the denoiser and the VAE."""
        if not isinstance(vae, Flux2Vae):
            what = "The VAE of this Flux.2 Klein"
            raise refuse(what, f"an {vae.class_name}, and no AutoencoderKLFlux2")
        variances = vae.bn_running_var_data
        deviation = tuple((each + vae.batch_norm_eps) ** 0.5 for each in variances)
        return replace(self, mean=vae.bn_running_mean_data, deviation=deviation)

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """
        Read three of the text encoder's layers.

        optimum-intel 2.2 exports their outputs misnamed by one: it leaves the first one out.
        """
        encoder = pipeline.text_encoder
        names = {name for port in encoder.request.outputs for name in port.get_names()}
        states = sum(name.startswith("hidden_states.") for name in names)
        shift = encoder.config.num_hidden_layers + 1 - states
        embeds, _ = pipeline.encode_prompt(
            prompt=prompt,
            device=pipeline.device,
            max_sequence_length=_TOKENS,
            text_encoder_out_layers=tuple(layer - shift for layer in _LAYERS),
        )
        return {"prompt_embeds": embeds}

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """The template counts, and its end is cut off with that of the prompt."""
        return {"tokenizer": _TOKENS - _TEMPLATE_TOKENS}

    def adapt(self, pipeline: Any) -> None:
        """Tell the pipeline whether it is guided, which optimum forgets."""
        pipeline.register_to_config(is_distilled=self.guidance is UNGUIDED)

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Stack the pixels of each patch as channels, and normalise these."""
        batch, channels, height, width = latents.shape
        rows, columns = height // SIDE, width // SIDE
        patches = latents.reshape(batch, channels, rows, SIDE, columns, SIDE)
        stacked = patches.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, rows, columns)
        mean, deviation = self._norm(latents)
        return (stacked - mean) / deviation

    def unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Undo the norm, and put the pixels of each patch back."""
        batch, places, _ = latents.shape
        rows, columns = grid(places, height, width)
        mean, deviation = self._norm(latents)
        stacked = latents.permute(0, 2, 1).reshape(batch, -1, rows, columns) * deviation + mean
        patches = stacked.reshape(batch, -1, SIDE, SIDE, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return patches.reshape(batch, -1, rows * SIDE, columns * SIDE)

    def unpack_output(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Its pipeline has done so."""
        return latents

    def noise_shape(self, latents: tuple[int, ...]) -> tuple[int, ...]:
        """It is drawn for packed latents."""
        batch, channels, height, width = latents
        return (batch, channels * SIDE**2, height // SIDE, width // SIDE)

    def pack_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """It is packed."""
        return noise

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Places have numbers, for each image."""
        batch, places, _ = main
        return {"hidden_states": main, "timestep": (batch,), "img_ids": (batch, places, 4)}

    def _norm(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(  # type: ignore[return-value] # of two
            like.new_tensor(each).reshape(1, -1, 1, 1) for each in (self.mean, self.deviation)
        )


FLUX_2_KLEIN = Flux2Klein(
    name="flux2-klein",
    denoiser="transformer",
    denoiser_config=PackedTransformer,
    text_encoders=("text_encoder",),
    pipelines={Mode.TXT2IMG: "OVFlux2KleinPipeline", Mode.IMG2IMG: "OVFlux2KleinImg2ImgPipeline"},
    default_side=128,
    guidance=Guidance("twice"),
    reads_whole=True,
    schedulers=("euler", "flow-euler", "dpm++2m", "dpm++2s", "unipc", "deis"),
)
