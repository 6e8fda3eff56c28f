"""
The adapter between the engine and a family of models: the one place that names their parts.

A family is a row: which components each mode needs, which pipeline class serves it, how its prompt
is encoded, and the shapes that its static graphs take. Nothing else in the engine knows a UNet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import ModelSourceError
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"


@dataclass(frozen=True)
class Geometry:
    """
    What a static shape depends on.

    Attributes:
        width: Pixels.
        height: Pixels.
        images: How many images go through the denoiser at once.
        guided: Whether classifier-free guidance doubles the denoiser's batch.
    """

    width: int
    height: int
    images: int = 1
    guided: bool = True

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Scale:
    """
    How a model's pixels relate to its latents, read from its configuration.

    Attributes:
        factor: Pixels on a latent pixel's side.
        channels: Of the latents.
        multiple: Width and height must be multiples of it, in pixels.
        default: Width and height that the model was trained on, in pixels.
    """

    factor: int
    channels: int
    multiple: int
    default: int


@dataclass(frozen=True)
class Family:
    """
    One family of diffusion models.

    Attributes:
        name: Short name; a LoRA file must be of the same.
        denoiser: The component that each step runs.
        text_encoders: In the order in which they run.
        pipelines: optimum-intel's pipeline class for each mode.
        prompt_outputs: What ``encode_prompt`` returns, in order, by the pipeline's argument names.
        guided_by_embedding: Guidance is an input of the denoiser: its batch is never doubled.
        runs_whole_schedule: The img2img pipeline fits a schedule of as many steps as it is told
            into the strength, where others run that share of the steps.
    """

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]
    pipelines: Mapping[Mode, str]
    prompt_outputs: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    guided_by_embedding: bool = False
    runs_whole_schedule: bool = False
    _extra: Mapping[Mode, tuple[str, ...]] = field(
        default_factory=lambda: {Mode.TXT2IMG: (), Mode.IMG2IMG: (VAE_ENCODER,)}
    )

    def components(self, mode: Mode) -> tuple[str, ...]:
        """Return the names of the components that `mode` needs, in the order of their use."""
        return (*self.text_encoders, self.denoiser, VAE_DECODER, *self._extra[mode])

    @property
    def all_components(self) -> tuple[str, ...]:
        """Names of the components of every mode."""
        return tuple(
            dict.fromkeys(name for mode in self.pipelines for name in self.components(mode))
        )

    def scale(self, configs: Mapping[str, Mapping[str, Any]]) -> Scale:
        """Read from the parts' configurations how pixels relate to latents."""
        denoiser = configs[self.denoiser]
        blocks = configs[VAE_DECODER].get("block_out_channels", (1, 1, 1, 1))
        factor = 2 ** (len(blocks) - 1)
        depth = len(denoiser.get("block_out_channels", (1, 1)))
        return Scale(
            factor=factor,
            channels=int(configs[VAE_DECODER].get("latent_channels", 4)),
            multiple=factor * 2 ** (depth - 1),
            default=factor * int(denoiser.get("sample_size", 64)),
        )

    def batch(self, geometry: Geometry) -> int:
        """Return the denoiser's batch for this geometry."""
        doubled = geometry.guided and not self.guided_by_embedding
        return geometry.images * (2 if doubled else 1)

    def static_shape(self, component: str, geometry: Geometry, scale: Scale) -> tuple[int, ...]:
        """
        Return the shape of a component's main input; empty for a text encoder, which stays dynamic.

        A text encoder knows no width or height, and reshaping it has given other images
        (openvino#29113).
        """
        height, width = geometry.height // scale.factor, geometry.width // scale.factor
        if component == self.denoiser:
            return (self.batch(geometry), scale.channels, height, width)
        if component == VAE_DECODER:
            return (1, scale.channels, height, width)
        if component == VAE_ENCODER:
            return (1, 3, geometry.height, geometry.width)
        return ()


_CLIP = ("text_encoder",)
_SDXL_PROMPT = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "StableDiffusionPipeline": Family(
        "sd", "unet", _CLIP,
        {
            Mode.TXT2IMG: "OVStableDiffusionPipeline",
            Mode.IMG2IMG: "OVStableDiffusionImg2ImgPipeline",
        },
    ),
    "StableDiffusionXLPipeline": Family(
        "sdxl", "unet", (*_CLIP, "text_encoder_2"),
        {
            Mode.TXT2IMG: "OVStableDiffusionXLPipeline",
            Mode.IMG2IMG: "OVStableDiffusionXLImg2ImgPipeline",
        },
        prompt_outputs=_SDXL_PROMPT,
    ),
    "LatentConsistencyModelPipeline": Family(
        "sd", "unet", _CLIP,
        {
            Mode.TXT2IMG: "OVLatentConsistencyModelPipeline",
            Mode.IMG2IMG: "OVLatentConsistencyModelImg2ImgPipeline",
        },
        guided_by_embedding=True,
        runs_whole_schedule=True,
    ),
})  # fmt: skip


def family_of(class_name: str) -> Family:
    """
    Return the family of a model by its pipeline class.

    Args:
        class_name: ``_class_name`` of ``model_index.json``; img2img and inpaint classes count too.

    Raises:
        ModelSourceError: No such family is supported; the text lists those that are.
    """
    plain = class_name.removeprefix("OV").replace("Img2Img", "").replace("Inpaint", "")
    if plain not in FAMILIES:
        known = ", ".join(FAMILIES)
        msg = f"The model is a {class_name}, which Holdfast cannot run; it runs {known}."
        raise ModelSourceError(msg)
    return FAMILIES[plain]
