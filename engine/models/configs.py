"""
The one reader of the configurations that a model's parts carry, with diffusers' defaults.

A field that is absent or null has the value that diffusers gives it; one of another type, or out of
its range, is an error that names file and field. Nothing else in the engine reads such a file.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models.integrity import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Count = Annotated[int, msgspec.Meta(ge=1, le=2**20)]


class Config(msgspec.Struct, frozen=True):
    """What every configuration has in common."""

    class_name: str = msgspec.field(default="", name="_class_name")

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
                msg = f"{name} is not finite"
                raise ValueError(msg)


class Denoiser(Config, frozen=True):
    """
    What is read of every denoiser.

    Attributes:
        in_channels: Of its input.
        sample_size: Side of the latents that it was trained on, or (height, width).
    """

    in_channels: Count = 4
    # Not tuple[Count, Count]: msgspec 0.22 reads a wrong length for one beside a bounded number.
    sample_size: Count | tuple[Count, ...] | None = None

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it takes."""
        return self.in_channels

    @property
    def patch(self) -> int:
        """Side of what it has one value for, in latent pixels, where it has the most values."""
        return 1

    @property
    def multiple(self) -> int:
        """Sides of its latents are multiples of it."""
        return self.patch

    @property
    def width(self) -> int:
        """Values that it has for each of its places, where it has the most places."""
        raise NotImplementedError

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input."""
        return False

    @property
    def written_out(self) -> dict[str, Any]:
        """What optimum reads of it that older files leave out."""
        return {}


class UNet(Denoiser, frozen=True):
    """
    A ``UNet2DConditionModel``.

    Attributes:
        in_channels: Of its input: 4 for latents alone, 9 with a mask and a masked image.
        out_channels: Of its output.
        sample_size: Side of the latents that it was trained on, or (height, width).
        block_out_channels: Feature maps of each level.
        cross_attention_dim: Width of the prompt's embeddings; one for each level, perhaps.
        time_cond_proj_dim: Width of the embedding that tells it the guidance; None: it is not told.
    """

    out_channels: Count = 4
    block_out_channels: tuple[Count, ...] = (320, 640, 1280, 1280)
    cross_attention_dim: Count | tuple[Count, ...] = 1280
    time_cond_proj_dim: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_levels(self.block_out_channels)
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != len(
            ("height", "width")
        ):
            msg = f"sample_size has {len(self.sample_size)} sides, where it needs one or two"
            raise ValueError(msg)

    @property
    def multiple(self) -> int:
        """Every level but one halves the sides."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def width(self) -> int:
        """Feature maps of the largest level."""
        return self.block_out_channels[0]

    @property
    def embeds_guidance(self) -> bool:
        """Whether it was distilled to be told the guidance."""
        return self.time_cond_proj_dim is not None

    @property
    def written_out(self) -> dict[str, Any]:
        """Every field."""
        said = msgspec.structs.asdict(self)
        del said["class_name"]
        return said


class Transformer(Denoiser, frozen=True):
    """
    A transformer whose places are patches of latents.

    Attributes:
        patch_size: Side of a patch.
        num_attention_heads: Of each block.
        attention_head_dim: Values of each head.
        guidance_embeds: It is told the guidance.
        pos_embed_max_size: Patches on a side that it has positions for; None: any number.
    """

    patch_size: Count = 2
    num_attention_heads: Count = 24
    attention_head_dim: Count = 128
    guidance_embeds: bool = False
    pos_embed_max_size: Count | None = None

    @property
    def patch(self) -> int:
        """Side of a patch."""
        return self.patch_size

    @property
    def width(self) -> int:
        """Values that it has for each patch."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def embeds_guidance(self) -> bool:
        """Whether it was distilled to be told the guidance."""
        return self.guidance_embeds


class ZImageTransformer(Denoiser, frozen=True):
    """
    A ``ZImageTransformer2DModel``.

    Attributes:
        dim: Values that it has for each patch of two latent pixels' side.
    """

    in_channels: Count = 16
    dim: Count = 3840

    @property
    def patch(self) -> int:
        """Side of a patch."""
        return _PACKED_SIDE

    @property
    def width(self) -> int:
        """Values that it has for each patch."""
        return self.dim


class PackedTransformer(Transformer, frozen=True):
    """
    A transformer that is handed patches, four latent pixels in one place.

    Attributes:
        joint_attention_dim: Width of the prompt's embeddings.
    """

    joint_attention_dim: Count = 3584

    @property
    def patch(self) -> int:
        """Of what it is handed, which it cuts no further."""
        return _PACKED_SIDE

    @property
    def latent_channels(self) -> int:
        """Channels before latents are packed."""
        return self.in_channels // _PACKED_SIDE**2


_PACKED_SIDE = 2


def _need_levels(widths: tuple[int, ...]) -> None:
    if not 1 <= len(widths) <= _MOST_LEVELS:
        msg = f"block_out_channels has {len(widths)} levels, where 1 to {_MOST_LEVELS} are possible"
        raise ValueError(msg)


_MOST_LEVELS = 12


class Vae(Config, frozen=True):
    """
    An ``AutoencoderKL``.

    Attributes:
        block_out_channels: Feature maps of each level; every level but one halves the sides.
        latent_channels: Of the latents.
        scaling_factor: The denoiser's latents are the VAE's times this.
        shift_factor: Taken from the VAE's latents before they are scaled.
        latents_mean: Of each channel, taken off likewise.
        latents_std: Of each channel; the VAE's latents are divided by it.
        force_upcast: Its activations overflow in float16.
    """

    block_out_channels: tuple[Count, ...] = (64,)
    latent_channels: Count = 4
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)] = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[Annotated[float, msgspec.Meta(gt=0)], ...] | None = None
    force_upcast: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_levels(self.block_out_channels)
        for values in (self.latents_mean, self.latents_std):
            if values is not None and len(values) != self.latent_channels:
                msg = f"{len(values)} values were given for {self.latent_channels} latent channels"
                raise ValueError(msg)

    @property
    def factor(self) -> int:
        """Pixels on a latent pixel's side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Feature maps of each level, the largest level first."""
        return self.block_out_channels

    @property
    def written_out(self) -> dict[str, Any]:
        """What optimum reads of it that older files leave out."""
        names = ("block_out_channels", "latent_channels", "scaling_factor")
        return {name: getattr(self, name) for name in names}


class DeepVae(Vae, frozen=True):
    """
    An ``AutoencoderDC``, which has no distribution.

    Attributes:
        encoder_block_out_channels: Feature maps of each level.
    """

    encoder_block_out_channels: tuple[Count, ...] = (128, 256, 512, 512, 1024, 1024)
    latent_channels: Count = 32
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0

    @property
    def factor(self) -> int:
        """Every level but one halves the sides."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Feature maps of each level."""
        return self.encoder_block_out_channels

    @property
    def written_out(self) -> dict[str, Any]:
        """Nothing: there are no older files."""
        return {}


class QwenVae(Vae, frozen=True):
    """
    An ``AutoencoderKLQwenImage``, of videos.

    Attributes:
        latent_channels: Of the latents.
        base_dim: Feature maps of the largest level.
        dim_mult: Those of each level, to one of the largest's.
    """

    latent_channels: Count = msgspec.field(default=16, name="z_dim")
    base_dim: Count = 96
    dim_mult: tuple[Count, ...] = (1, 2, 4, 4)
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0

    @property
    def factor(self) -> int:
        """Every level but one halves the sides."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Feature maps of each level."""
        return tuple(self.base_dim * each for each in self.dim_mult)

    @property
    def written_out(self) -> dict[str, Any]:
        """Nothing: there are no older files."""
        return {}


class Flux2Vae(Vae, frozen=True):
    """
    An ``AutoencoderKLFlux2``; its latents are normalised in patches.

    Attributes:
        batch_norm_eps: Added to each variance.
        bn_running_mean_data: Of each value of a patch; written by the exporter.
        bn_running_var_data: The same.
    """

    latent_channels: Count = 32
    scaling_factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    batch_norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-4
    bn_running_mean_data: tuple[float, ...] = ()
    bn_running_var_data: tuple[float, ...] = ()

    @property
    def written_out(self) -> dict[str, Any]:
        """Nothing: there are no older files."""
        return {}


VAES: Mapping[str, type[Vae]] = MappingProxyType({
    "": Vae,
    "AutoencoderKL": Vae,
    "AutoencoderDC": DeepVae,
    "AutoencoderKLFlux2": Flux2Vae,
    "AutoencoderKLQwenImage": QwenVae,
})  # fmt: skip
"""How the configuration of each class is read."""
VAE_GRAPH_FIELDS = frozenset({
    "act_fn", "attention_head_dim", "down_block_types", "in_channels", "layers_per_block",
    "mid_block_add_attention", "model_max_length", "norm_num_groups", "out_channels",
    "sample_size", "up_block_types", "use_post_quant_conv", "use_quant_conv",
    # Of an AutoencoderDC.
    "decoder_act_fns", "decoder_block_out_channels", "decoder_block_types",
    "decoder_conv_act_fn", "decoder_in_shortcut", "decoder_layers_per_block", "decoder_norm_types",
    "decoder_qkv_multiscales", "downsample_block_type", "encoder_block_types",
    "encoder_layers_per_block", "encoder_out_shortcut", "encoder_qkv_multiscales",
    "upsample_block_type",
    # Of an AutoencoderKLQwenImage.
    "attn_scales", "dropout", "input_channels", "is_residual", "num_res_blocks",
    "temperal_downsample",
    # Of an AutoencoderKLFlux2.
    "batch_norm_momentum", "bn_eps", "patch_size",
    # Both halves of what an exporter writes once more.
    "latents_mean_data", "latents_std_data",
})  # fmt: skip
"""What an exported graph holds already, or what bears on no image."""


class TextEncoder(Config, frozen=True):
    """
    A text encoder of transformers.

    Attributes:
        model_type: Which kind it is; empty in old files, which are CLIP's.
        max_position_embeddings: Tokens that it can read; None: CLIP's 77, or any number.
    """

    model_type: str = "clip_text_model"
    max_position_embeddings: Count | None = None


class Tokenizer(Config, frozen=True):
    """
    ``tokenizer_config.json``.

    Attributes:
        model_max_length: Tokens that are handed to the text encoder; a huge number where whoever
            wrote it did not know.
    """

    model_max_length: Annotated[float, msgspec.Meta(ge=1)] | None = None


class Scheduler(Config, frozen=True):
    """The fields of ``scheduler_config.json`` that every scheduler reads alike."""

    num_train_timesteps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    original_inference_steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 50
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


_C = TypeVar("_C", bound=Config)


def read_config(path: Path, kind: type[_C]) -> _C:
    """
    Read a configuration.

    Raises:
        ModelSourceError: The file is missing or damaged, or a field cannot be what it is.
    """
    return as_config(read_json(path), path, kind)


def as_config(content: Mapping[str, Any], path: Path, kind: type[_C]) -> _C:
    """
    Check what was read from `path`.

    Raises:
        ModelSourceError: A field cannot be what it is; the text names it.
    """
    try:
        return msgspec.convert({k: v for k, v in content.items() if v is not None}, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        msg = (
            f"{path} does not say what Holdfast can use: {error}. Correct it, or copy, download or "
            "export the model again."
        )
        raise ModelSourceError(msg) from error


def read_vae(path: Path) -> Vae:
    """
    Read a VAE's configuration; what it says of its latents is known, or it is refused.

    Raises:
        ModelSourceError: It is no ``AutoencoderKL``, or has a field that nothing here applies.
    """
    content = read_json(path)
    class_name = as_config(content, path, Config).class_name
    if class_name not in VAES:
        known = ", ".join(name for name in VAES if name)
        msg = (
            f"{path} is of a {class_name}, which Holdfast cannot run; it runs {known}. Use a model "
            "with such a VAE, or give one with vae=."
        )
        raise ModelSourceError(msg)
    vae = as_config(content, path, VAES[class_name])
    fields = {field.encode_name for field in msgspec.structs.fields(type(vae))} | VAE_GRAPH_FIELDS
    unknown = sorted(
        name
        for name, value in content.items()
        if value is not None and name not in fields and not name.startswith("_")
    )
    if unknown:
        msg = (
            f"{path} has {', '.join(unknown)}, which Holdfast does not know how to apply; the "
            "image could be wrong. Remove what is only a note, or use another VAE."
        )
        raise ModelSourceError(msg)
    return vae


def _is_pair(entry: list[Any]) -> bool:
    """Whether an entry is a library and a class, both of them perhaps null."""
    pair = len(entry) == len(("library", "class"))
    return pair and all(each is None or isinstance(each, str) for each in entry)


def read_index(path: Path) -> dict[str, Any]:
    """
    Read ``model_index.json``: ``_class_name``, and library and class of each part.

    Raises:
        ModelSourceError: It is missing or damaged, or its entries are not such pairs.
    """
    content = read_json(path)
    as_config(content, path, Config)
    for name, entry in content.items():
        if isinstance(entry, list) and not _is_pair(entry):
            msg = f"{path} says of {name} {str(entry)[:80]}, where a library and a class belong."
            raise ModelSourceError(f"{msg} Copy, download or export the model again.")
    return content
