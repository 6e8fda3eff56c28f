"""One model as the engine uses it: its parts, wherever they lie, and what they share."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from holdfast.engine.errors import InvalidRequest, ModelSourceError
from holdfast.engine.graphs.vae_tiles import SIDE
from holdfast.engine.imports import heavy, quiet, tokenizing
from holdfast.engine.models.configs import Config, TextEncoder, Tokenizer, read_config, read_vae
from holdfast.engine.models.families import VAE_DECODER, VAE_ENCODER, family_of
from holdfast.engine.models.samplers import Samplers
from holdfast.engine.requests.schedulers import flow_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from holdfast.engine.models.configs import Vae
    from holdfast.engine.models.families import Family, Geometry
    from holdfast.engine.models.source import ModelFolder
    from holdfast.states import Mode


class Model:
    """
    A resolved model, with another one's VAE in place of its own where one was given.

    Args:
        folder: The model, as OpenVINO IR.
        vae: A model of which only the VAE is used, or None.

    Raises:
        ModelSourceError: Its family is not supported, or the VAE's latents are of another shape.
    """

    def __init__(self, folder: ModelFolder, vae: ModelFolder | None = None) -> None:
        self.folder = folder
        self._row = row = family_of(folder.class_name).having(folder.config)
        folders = dict.fromkeys(row.all_components, folder)
        if vae is not None:
            folders |= dict.fromkeys((VAE_DECODER, VAE_ENCODER), vae)
        self._folders = {
            name: each for name, each in folders.items() if name in each.component_fingerprints
        }
        self.denoiser = _config(folder, row.denoiser, row.denoiser_config)
        own, self.vae = (read_vae(_place(each, VAE_DECODER)) for each in (folder, vae or folder))
        self.family = row.fitted(self.denoiser, self.vae).without(folders.keys() - self._folders)
        self.scale = row.scale(self.denoiser, self.vae)
        needed = row.scale(self.denoiser, own)
        if (self.scale.factor, self.scale.channels) != (needed.factor, needed.channels):
            msg = (
                f"The VAE in {vae and vae.path} has {self.scale.channels} latent channels at 1/"
                f"{self.scale.factor} of the size, but {folder.path} needs {needed.channels} at 1/"
                f"{needed.factor}. Give a VAE of the same family."
            )
            raise ModelSourceError(msg)
        self.latents = Latents.of(self.vae, row, self._folders[VAE_DECODER].path)
        self.token_limits = {name: self._token_limit(name) for name in self.tokenizer_names}
        self.scale = replace(self.scale, tokens=min(self.token_limits.values()))
        self.parts = folder.path if self._is_explicit() else self._assemble()
        self._tokenizers: dict[str, Any] = {}
        self._samplers = Samplers(self.parts)
        self._text_encoders = {  # now: a cleaner of caches may remove the files while all is held
            name: each.component_config(name)
            for name, each in self._folders.items()
            if name.startswith("text_encoder")
        }

    def text_width(self, encoder: str) -> int:
        """Return the width of a text encoder's vectors."""
        return int(self._text_encoders[encoder]["hidden_size"])

    def source(self, component: str) -> str:
        """Return the fingerprint of a component's graph, weights and configuration."""
        return self._folders[component].component_fingerprint(component)

    @property
    def paths(self) -> frozenset[Path]:
        """The folders that its parts lie in."""
        return frozenset(folder.path for folder in self._folders.values())

    @property
    def is_unchanged(self) -> bool:
        """Whether its parts' files are still those that it was identified by."""
        return all(folder.is_unchanged for folder in self._folders.values())

    @property
    def is_overwritten(self) -> bool:
        """Whether weights were written into, so that nothing that has them mapped may run."""
        return any(folder.is_overwritten for folder in self._folders.values())

    def folder_of(self, component: str) -> ModelFolder:
        """Return the model that a component is taken from."""
        return self._folders[component]

    def probe_side(self, component: str) -> int:
        """Return the side of the small image-like input that a fresh component is tried with."""
        return self.family.probe_side(component, self.scale)

    def overflows(self, component: str) -> bool:
        """Tell whether a component's activations are beyond float16's range."""
        return component in (VAE_DECODER, VAE_ENCODER) and self.family.vae_overflows(
            self.denoiser, self.vae
        )

    @property
    def sees_masks(self) -> bool:
        """Whether its denoiser takes a mask and a masked image as well: it can inpaint alone."""
        return self.family.is_inpainting(self.denoiser, self.scale.channels)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the shape of one image's latents as they stand beside a mask."""
        factor = self.scale.factor
        return (1, self.scale.channels, height // factor, width // factor)

    def check_mode(self, mode: Mode) -> None:
        """
        Make sure that the model has all that a mode needs.

        Raises:
            InvalidRequest: It lacks a component; the text names it.
        """
        if mode in self.family.pipelines:
            return
        if self.sees_masks:
            msg = (
                f"{mode} was asked for, but the model in {self.folder.path} was made to inpaint "
                "and does nothing else. Ask for an Inpaint, or use its plain relative."
            )
            raise InvalidRequest(msg)
        if mode not in self._row.pipelines:
            modes = ", ".join(self._row.pipelines)
            msg = (
                f"{mode} was asked for, but a {self.folder.class_name} makes images by {modes} "
                "alone. Ask for one of these, or use a model of another family."
            )
            raise InvalidRequest(msg)
        needed = self._row.components(mode)
        absent = ", ".join(name for name in needed if name not in self._folders)
        msg = (
            f"{mode} was asked for, but the OpenVINO model in {self.folder.path} has no {absent}, "
            "as exports of before March 2023. Export the model again, or give a whole VAE as vae=."
        )
        raise InvalidRequest(msg)

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """The names that its tokenizers have in the pipeline."""
        index = self.folder.config
        return tuple(
            name
            for name in sorted(index)
            if name.startswith("tokenizer") and index[name][0] is not None
        )

    def tokenizers(self) -> dict[str, Any]:
        """Return transformers' tokenizers by their names in the pipeline; read once."""
        if not self._tokenizers:
            tokenizing()
            import transformers

            with quiet():
                for name in self.tokenizer_names:
                    self._tokenizers[name] = self._tokenizer(transformers, name)
        return self._tokenizers

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        """What the model sets of its pipeline itself, beside its parts."""
        names = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
        return {name: self.folder.config[name] for name in names if name in self.folder.config}

    def scheduler_label(self, name: str | None) -> str:
        """Return what a scheduler is called: a key of `SCHEDULERS`, or the model's own class."""
        return name or self._samplers.own_label

    def scheduler(self, name: str | None, steps: int, strength: float, mode: Mode) -> Any:
        """
        Return a fresh scheduler whose schedule has `strength` in exactly `steps` steps.

        Args:
            name: A key of `SCHEDULERS`, or None for the model's own.
            steps: That a pass is to run.
            strength: Its part of the schedule, over 0 and at most 1.
            mode: Whose pipeline runs it.

        Raises:
            InvalidRequest: There is no such schedule; the text says how many steps have one.
            ModelSourceError: The model's settings make no scheduler.
        """
        heavy()
        with quiet():
            if self.family.schedulers:
                length = flow_length(steps, strength)
                return self._samplers.flow(name, self.family.schedulers, length)
            whole = mode in self.family.runs_whole_schedule
            return self._samplers.scheduler(name, steps, strength, whole=whole)

    def own_scheduler(self) -> Any:
        """
        Return a fresh scheduler of the model's own class and settings.

        Raises:
            ModelSourceError: There is none such.
        """
        heavy()
        with quiet():
            return self._samplers.make(None)

    def vae_bytes(self, width: int, height: int, precision: str, stride: int = 1) -> int:
        """
        Return what decoding or encoding an image of this size takes in scratch memory, in bytes.

        Held against a VAE of Stable Diffusion 1.5's size: nine maps of its largest level. In
        tiles, two in float32 that the halves hand on, and nine of the whole or sixteen of a tile.

        Args:
            width: Of the image, in pixels.
            height: The same.
            precision: Computed in, as OpenVINO names it.
            stride: Of what runs on the whole image, pixels to one of its largest maps, a power of
                two; the rest runs in tiles.
        """
        wide = _FLOAT_BYTES if precision == "f32" else _FLOAT_BYTES // 2
        level = stride.bit_length() - 1
        values = (width // stride) * (height // stride) * self.scale.vae_widths[level]
        whole = values * _VAE_MAPS * wide
        if stride == 1:
            return whole
        tile = min(width * height, _TILE_PIXELS) * self.scale.vae_widths[0] * _TILE_MAPS * wide
        return 2 * values * _FLOAT_BYTES + max(whole, tile)

    def check_size(self, width: int, height: int) -> None:
        """
        Make sure that the model can make an image of exactly this size.

        Raises:
            InvalidRequest: It cannot; the text names the nearest sizes that it can make.
        """
        longest = self.family.longest_side(self.denoiser, self.scale)
        if longest is not None and max(width, height) > longest:
            msg = (
                f"{width}x{height} was asked for, but this model has positions for sides of "
                f"{longest} at most. Ask for a smaller image."
            )
            raise InvalidRequest(msg)
        step = self.scale.multiple
        if width % step == 0 and height % step == 0:
            return
        below, above = (
            tuple(max(step, (side + more) // step * step) for side in (width, height))
            for more in (0, step - 1)
        )
        nearest = " or ".join(f"{width}x{height}" for width, height in (below, above))
        msg = (
            f"{width}x{height} was asked for, but this model makes sides that are multiples of "
            f"{step}; the nearest sizes are {nearest}."
        )
        raise InvalidRequest(msg)

    def check_steps(self, scheduler: str | None, steps: int, strength: float, mode: Mode) -> None:
        """
        Make sure that a scheduler has a schedule of which `strength` is `steps` steps.

        Short ones are not made for it: that needs libraries which can be imported beside a compile,
        and the pass makes its schedule before its first step anyway.

        Raises:
            InvalidRequest: It has none; the text says how many steps have one.
            ModelSourceError: The model's settings make no scheduler.
        """
        if self.family.schedulers or not self._samplers.surely(scheduler, steps, strength):
            self.scheduler(scheduler, steps, strength, mode)

    def check_memory(self, geometry: Geometry, limit: int) -> None:
        """
        Make sure that a step at this geometry can be held in memory at all.

        Raises:
            InvalidRequest: It would take far more than `limit` bytes; the text has the figures.
        """
        side = self.scale.factor * self.scale.patch
        places = (geometry.width // side) * (geometry.height // side)
        rows = self.family.batch(geometry)
        needed = rows * places * self.scale.denoiser_width * _FLOAT_BYTES * _LIVE_ACTIVATIONS
        if needed > limit:
            msg = (
                f"{geometry} was asked for; a step of that size would take about "
                f"{needed / 2**20:.0f} MiB of working memory, but the memory budget is "
                f"{limit / 2**20:.0f} MiB. Ask for a smaller image, or raise memory_budget."
            )
            raise InvalidRequest(msg)

    def _tokenizer(self, transformers: Any, name: str) -> Any:
        """Load a tokenizer, which pads to what its text encoder reads, whatever its file says."""
        class_name = str(self.folder.config[name][1])
        try:
            loaded = getattr(transformers, class_name).from_pretrained(self.parts / name)
        except Exception as error:  # transformers passes on whatever its parsers raise.
            msg = (
                f"{self.parts / name} cannot be read as a {class_name} ({error}). Copy, download "
                "or export the model again."
            )
            raise ModelSourceError(msg) from error
        loaded.model_max_length = self.token_limits[name]
        return loaded

    def _token_limit(self, name: str) -> int:
        """Return how many tokens, marks of beginning and end included, a text encoder reads."""
        file = self.folder.path / name / "tokenizer_config.json"
        said = read_config(file, Tokenizer).model_max_length if file.is_file() else None
        encoder = name.replace("tokenizer", "text_encoder")
        if encoder not in self._folders:
            return int(min(said or _CLIP_TOKENS, sys.maxsize))
        config = _config(self.folder, encoder, TextEncoder)
        readable = config.max_position_embeddings or _CLIP_TOKENS
        if not config.model_type.startswith("clip") and config.max_position_embeddings is None:
            readable = sys.maxsize  # its positions are relative
        return int(min(said or readable, readable))

    def _is_explicit(self) -> bool:
        """Whether its parts lie together, and say all that optimum reads of them."""
        return len(self.paths) == 1 and all(
            self._folders[name].component_config(name).keys() >= config.keys()
            for name, config in self._written_out().items()
        )

    def _written_out(self) -> dict[str, dict[str, Any]]:
        """Return by component the fields that optimum reads, each with its value or default."""
        halves = {VAE_DECODER, VAE_ENCODER} & self._folders.keys()
        said = dict.fromkeys(halves, self.vae.written_out)
        return {self.family.denoiser: self.denoiser.written_out, **said}

    def _assemble(self) -> Path:
        """Lay all parts' configurations side by side, as the pipeline classes read them."""
        target = Path(tempfile.mkdtemp(prefix="holdfast-"))
        weakref.finalize(self, shutil.rmtree, target, ignore_errors=True)
        (target / "model_index.json").write_text(json.dumps(dict(self.folder.config)))
        defaults = self._written_out()
        for name, folder in self._folders.items():
            (target / name).mkdir()
            said = {k: v for k, v in folder.component_config(name).items() if v is not None}
            whole = {**defaults.get(name, {}), **said}
            (target / name / "config.json").write_text(json.dumps(whole))
        for name in self.folder.config:
            shared = name.startswith("tokenizer") or name == "scheduler"
            if shared and (self.folder.path / name).is_dir():
                shutil.copytree(self.folder.path / name, target / name)
        return target


def _place(folder: ModelFolder, component: str) -> Path:
    return folder.path / component / "config.json"


def _config(folder: ModelFolder, component: str, kind: type[_C]) -> _C:
    return read_config(_place(folder, component), kind)


@dataclass(frozen=True)
class Latents:
    """
    How the denoiser's latents and the VAE's are related, by channel.

    Attributes:
        factor: The denoiser's are the VAE's, less `offset`, times this; shape (1, C, 1, 1).
        offset: Of the VAE's; the same shape.
    """

    factor: NDArray[np.float32]
    offset: NDArray[np.float32]

    @classmethod
    def of(cls, vae: Vae, family: Family, place: Path) -> Latents:
        """
        Read them from a VAE's configuration, as far as a family's own pipelines apply that.

        Raises:
            ModelSourceError: It says more than they apply.
        """
        said = {
            name: getattr(vae, name)
            for name in ("shift_factor", "latents_mean", "latents_std")
            if getattr(vae, name) not in (None, 0)
        }
        unknown = sorted(said.keys() - set(family.vae_statistics))
        if unknown:
            msg = (
                f"The VAE in {place} has {', '.join(unknown)}, which a model of this family does "
                "not apply to its latents. Use the VAE of the model itself."
            )
            raise ModelSourceError(msg)
        if ("latents_mean" in said) != ("latents_std" in said):
            msg = (
                f"The VAE in {place} has {', '.join(said)} alone; latents_mean and latents_std "
                "belong together. Complete its config.json."
            )
            raise ModelSourceError(msg)
        shape, shift = (1, vae.latent_channels, 1, 1), vae.shift_factor or 0.0
        deviation = np.reshape(np.array(vae.latents_std or [1.0] * shape[1], np.float32), shape)
        return cls(
            np.float32(vae.scaling_factor) / deviation,
            np.reshape(np.array(vae.latents_mean or [shift] * shape[1], np.float32), shape),
        )


_C = TypeVar("_C", bound=Config)
_CLIP_TOKENS = 77
_FLOAT_BYTES = 4
_VAE_MAPS = 9
_TILE_MAPS = 16
_TILE_PIXELS = (SIDE + 2 * 58) ** 2
"""Of a tile, with what the VAE of Stable Diffusion 1.5 sees of its neighbours, at most."""
_LIVE_ACTIVATIONS = 40
"""Feature maps of the first level's width that live at once, roughly, attention included."""
