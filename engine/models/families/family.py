"""
The adapter between the engine and a family of models: the one place that names their parts.

A family is a row: which components each mode needs, which pipeline class serves it, how its prompt
is encoded, what its configurations say, and the shapes that its graphs take. Nothing else in the
engine knows a UNet.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.graphs.feature_reuse import FRESH
from holdfast.engine.models.configs import Denoiser, UNet
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

    from holdfast.engine.models.configs import Vae

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
        guidance: Its scale.
        chunks: Of the prompt, each as long as a text encoder reads at once.
        apart: The prompt and the negative prompt go through it one after the other.
    """

    width: int
    height: int
    images: int = 1
    guidance: float = 7.0
    chunks: int = 1
    apart: bool = False

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Guidance:
    """
    How a denoiser is guided.

    Attributes:
        kind: By a batch of twice the size, by two inferences, by an input of its own, or not.
        above: Scales over this one are guided; others leave the negative prompt out.
        argument: What the pipelines call the scale.
        prompt_first: The first half of a doubled batch is the prompt's, and not the second.
    """

    kind: Literal["doubled", "twice", "embedded", "none"]
    above: float = 1.0
    argument: str = "guidance_scale"
    prompt_first: bool = False


DOUBLED, EMBEDDED, UNGUIDED = Guidance("doubled"), Guidance("embedded"), Guidance("none")


@dataclass(frozen=True)
class Scale:
    """
    How a model's pixels relate to its latents, read from its configuration.

    Attributes:
        factor: Pixels on a latent pixel's side.
        channels: Of the latents.
        multiple: Width and height must be multiples of it, in pixels.
        default: Width and height that the model was trained on, in pixels.
        denoiser_width: Feature maps of the denoiser's largest level.
        patch: Latent pixels on the side of what that level has one value for.
        vae_widths: Feature maps of each of the VAE's levels, the largest first.
        tokens: That its text encoders read at once, beginning and end included.
    """

    factor: int
    channels: int
    multiple: int
    default: tuple[int, int]
    denoiser_width: int
    vae_widths: tuple[int, ...]
    patch: int = 1
    tokens: int = 77


@dataclass(frozen=True)
class Family:
    """
    One family of diffusion models.

    Attributes:
        name: Short name; a LoRA file must be of the same.
        denoiser: The component that each step runs.
        text_encoders: In the order in which they run.
        pipelines: optimum-intel's pipeline class for each mode.
        denoiser_config: What the denoiser's ``config.json`` is read as.
        default_side: Of the latents, where the configuration says nothing of it.
        prompt_outputs: What its pipelines take of prompts, by the names of their arguments.
        settings: What every call of its pipelines is given besides.
        vae_statistics: What its pipelines apply to latents, of what a VAE's configuration says.
        text_layer: The layer that the denoiser reads of a text encoder, counted from the end; 1:
            the last one, normalised.
        guidance: How its denoiser is guided.
        runs_whole_schedule: Modes whose pipeline fits a schedule of as many steps as it is told
            into the strength, where others run that share of the steps.
        denoiser_channels: Of the denoiser's input; None: those of the latents.
        probe_tokens: Length of the prompt that a fresh denoiser is tried with.
        schedulers: Names of those that it runs with, where it learned a flow; empty: any. Its
            img2img is then txt2img from a later place of the schedule.
        cuts_vae: Its VAE runs in exact tiles where memory is short.
        has_frames: Its VAE is one of videos: latents and pixels have an axis for frames.
        optional: Text encoders that a model may do without.
        reads_whole: A prompt goes through the text encoders as it stands, once; others read it in
            chunks, with weights and embeddings.
    """

    name: str
    denoiser: str
    text_encoders: tuple[str, ...]
    pipelines: Mapping[Mode, str]
    denoiser_config: type[Denoiser] = UNet
    default_side: int = 64
    prompt_outputs: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    vae_statistics: tuple[str, ...] = ()
    text_layer: int = 1
    guidance: Guidance = DOUBLED
    runs_whole_schedule: frozenset[Mode] = frozenset()
    denoiser_channels: int | None = None
    probe_tokens: int = 77
    schedulers: tuple[str, ...] = ()
    cuts_vae: bool = True
    has_frames: bool = False
    optional: frozenset[str] = frozenset()
    reads_whole: bool = False

    def components(self, mode: Mode) -> tuple[str, ...]:
        """Return the names of the components that `mode` needs, in the order of their use."""
        encoder = () if mode is Mode.TXT2IMG else (VAE_ENCODER,)  # all others begin with an image
        return (*self.text_encoders, self.denoiser, VAE_DECODER, *encoder)

    @property
    def takes_loras(self) -> bool:
        """Whether the layers that LoRA files name are found in its denoiser."""
        return self.denoiser_config is UNet

    @property
    def all_components(self) -> tuple[str, ...]:
        """Names of the components of every mode."""
        return tuple(
            dict.fromkeys(name for mode in self.pipelines for name in self.components(mode))
        )

    def without(self, absent: Collection[str]) -> Family:
        """Return the same family with the modes alone that need nothing of what is absent."""
        modes = {
            mode: name
            for mode, name in self.pipelines.items()
            if not set(absent).intersection(self.components(mode))
        }
        return replace(self, pipelines=modes)

    def refusal(self, index: Mapping[str, Any]) -> str:
        """Return why the parts that ``model_index.json`` names cannot run; empty where they can."""
        absent = [
            name
            for name in self.text_encoders
            if name not in self.optional and index.get(name, [""])[0] is None
        ]
        return f"a model without {', '.join(absent)}" if absent else ""

    def having(self, index: Mapping[str, Any]) -> Family:
        """Return the row with the text encoders alone that ``model_index.json`` names."""
        present = tuple(
            name
            for name in self.text_encoders
            if name not in self.optional or index.get(name, [None])[0] is not None
        )
        return replace(self, text_encoders=present)

    def is_inpainting(self, denoiser: Denoiser, latent_channels: int) -> bool:
        """Tell whether a denoiser takes a mask and a masked image as well."""
        return denoiser.latent_channels == 2 * latent_channels + 1

    def denoiser_refusal(self, denoiser: Denoiser, latent_channels: int) -> str:
        """Return why a denoiser of this configuration cannot run; empty where it can."""
        if self.is_inpainting(denoiser, latent_channels) and Mode.INPAINT in self.pipelines:
            return ""
        if denoiser.latent_channels != latent_channels:
            return (
                f"a model whose denoiser takes {denoiser.latent_channels} channels, where its "
                f"VAE's latents have {latent_channels}"
            )
        return ""

    def fitted(self, denoiser: Denoiser, vae: Vae) -> Family:
        """Return the row as it holds for one model, by what its parts say."""
        fitted = replace(self, guidance=EMBEDDED) if denoiser.embeds_guidance else self
        if not self.is_inpainting(denoiser, vae.latent_channels):
            return fitted
        inpaint = {Mode.INPAINT: self.pipelines[Mode.INPAINT]}
        return replace(fitted, pipelines=inpaint, denoiser_channels=denoiser.latent_channels)

    def scale(self, denoiser: Denoiser, vae: Vae) -> Scale:
        """Return how pixels relate to latents."""
        sides = denoiser.sample_size or self.default_side
        height, width = sides if isinstance(sides, tuple) else (sides, sides)
        return Scale(
            factor=vae.factor,
            channels=vae.latent_channels,
            multiple=vae.factor * denoiser.multiple,
            default=(width * vae.factor, height * vae.factor),
            denoiser_width=denoiser.width,
            vae_widths=vae.widths,
            patch=denoiser.patch,
        )

    def longest_side(self, denoiser: Denoiser, scale: Scale) -> int | None:
        """Return the longest side that the denoiser can make, in pixels; None: it has no limit."""
        return None

    def vae_overflows(self, denoiser: Denoiser, vae: Vae) -> bool:
        """Tell whether the VAE's activations are beyond float16's range."""
        return False

    def guides(self, geometry: Geometry) -> bool:
        """Whether the denoiser sees a negative prompt beside the prompt."""
        negative = self.guidance.kind in ("doubled", "twice")
        return negative and geometry.guidance > self.guidance.above

    def encode_prompt(self, pipeline: Any, prompt: str, *, negative: bool) -> dict[str, Any]:
        """
        Run the text encoders of a family that reads a prompt whole, as its own pipeline does.

        Args:
            pipeline: optimum's.
            prompt: Its text.
            negative: It is what to keep away from.

        Returns:
            What the pipeline takes of a prompt, by the names of its arguments, a row of each.
        """
        raise NotImplementedError

    def prompt_limits(self, readable: Mapping[str, int]) -> dict[str, int]:
        """
        Return how many tokens are read of a prompt that is read whole, by tokenizer.

        Args:
            readable: Tokens that each tokenizer's text encoder reads, marks of its beginning and
                end included. A tokenizer that is not returned decides nothing.
        """
        return {name: limit - _MARKS for name, limit in readable.items()}

    def adapt(self, pipeline: Any) -> None:
        """Set what optimum leaves unset on a pipeline that was just built."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents (B, C, h, w) into what the pipelines work on."""
        return latents

    def unpack(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Turn what the pipelines work on into latents (B, C, h, w)."""
        return latents

    def unpack_output(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Turn what a pipeline returns as latents into latents (B, C, h, w)."""
        return self.unpack(latents, height, width)

    def noise_shape(self, latents: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the noise that the pipelines draw for latents (B, C, h, w)."""
        return latents

    def pack_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Turn such noise into what the pipelines work on."""
        return self.pack(noise)

    def batch(self, geometry: Geometry) -> int:
        """Return the denoiser's batch for this geometry."""
        doubled = self.guidance.kind == "doubled" and self.guides(geometry)
        return geometry.images * (2 if doubled and not geometry.apart else 1)

    def static_shape(self, component: str, geometry: Geometry, scale: Scale) -> tuple[int, ...]:
        """
        Return the shape of a component's main input; empty for a text encoder, which stays dynamic.

        A text encoder knows no width or height, and reshaping it has given other images
        (openvino#29113).
        """
        height, width = geometry.height // scale.factor, geometry.width // scale.factor
        if component == self.denoiser:
            channels = self.denoiser_channels or scale.channels
            return self.denoiser_shape(self.batch(geometry), channels, height, width)
        frame = (1,) if self.has_frames else ()
        if component == VAE_DECODER:
            return (1, scale.channels, *frame, height, width)
        if component == VAE_ENCODER:
            return (1, 3, *frame, geometry.height, geometry.width)
        return ()

    def denoiser_shape(self, batch: int, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the denoiser's main input for latents of this size."""
        return (batch, channels, height, width)

    def input_shapes(self, component: str, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """
        Return the shape of a component's inputs by name, for one of its main input.

        -1 is an axis of any length. Inputs that are not named have the main one's batch.
        """
        if component in (VAE_DECODER, VAE_ENCODER):
            return {"latent_sample": main, "sample": main}
        return self.denoiser_inputs(main) if component == self.denoiser else {}

    def denoiser_inputs(self, main: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return what `input_shapes` does for the denoiser."""
        return {"sample": main, "timestep": (1,)}

    def probe_shape(self, component: str, scale: Scale) -> tuple[int, ...]:
        """Return the shape of the main input that a fresh component is tried with."""
        side = self.probe_side(component, scale)
        pixels = side if component == VAE_ENCODER else side * scale.factor
        return self.static_shape(component, Geometry(pixels, pixels, guidance=0.0), scale)

    def probe_value(self, name: str, main: tuple[int, ...]) -> float:
        """Return what fills an input of a component that is tried: no part of it is left out."""
        return 1.0 if "mask" in name or name == FRESH else 0.0

    def probe_side(self, component: str, scale: Scale) -> int:
        """
        Return the side of the small image-like input that a fresh component is tried with.

        Not the smallest possible one: OpenVINO 2026.4 on CPU packs a dynamic graph's convolutions
        at the first inference, and where that leaves 1x1 at the deepest level of a UNet, every
        later inference of another size is wrong without a word. After a first one that leaves
        2x2, all sizes are right.
        """
        if component == self.denoiser:
            return 2 * scale.multiple // scale.factor
        return 8 * scale.factor if component == VAE_ENCODER else 8


def refuse(what: str, why: str) -> ModelSourceError:
    """Return the error for a model of a kind that cannot run."""
    return ModelSourceError(
        f"{what} is {why}, which Holdfast cannot run. Use a model that makes images from a prompt."
    )


_MARKS = 2
"""Of the beginning and the end, that CLIP's tokenizer puts around every prompt."""
