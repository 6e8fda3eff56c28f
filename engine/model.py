"""One model as the engine uses it: its parts, wherever they lie, and what they share."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import weakref
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import InvalidRequest, ModelSourceError
from holdfast.engine.families import VAE_DECODER, VAE_ENCODER, family_of
from holdfast.engine.imports import heavy, quiet, tokenizing
from holdfast.engine.integrity import read_json
from holdfast.engine.schedulers import SCHEDULERS, make_scheduler, short_name
from holdfast.engine.tiling import SIDE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.engine.families import Geometry
    from holdfast.engine.source import ModelFolder


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
        self.family = family_of(folder.class_name)
        self._folders = dict.fromkeys(self.family.all_components, folder)
        self.parts = folder.path
        if vae is not None:
            self._folders |= dict.fromkeys((VAE_DECODER, VAE_ENCODER), vae)
            self.parts = self._assemble()
        configs = {name: each.component_config(name) for name, each in self._folders.items()}
        self.scale = self.family.scale(configs)
        own = self.family.scale({n: folder.component_config(n) for n in self._folders})
        if (self.scale.factor, self.scale.channels) != (own.factor, own.channels):
            msg = (
                f"The VAE in {vae and vae.path} has {self.scale.channels} latent channels at 1/"
                f"{self.scale.factor} of the size, but {folder.path} needs {own.channels} at 1/"
                f"{own.factor}. Give a VAE of the same family."
            )
            raise ModelSourceError(msg)
        self.denoiser_width = int(configs[self.family.denoiser]["block_out_channels"][0])
        self.vae_widths = tuple(map(int, configs[VAE_DECODER]["block_out_channels"]))
        self._tokenizers: dict[str, Any] = {}
        self._schedulers: dict[str | None, Any] = {}

    def source(self, component: str) -> str:
        """Return the fingerprint of a component's graph, weights and configuration."""
        return self._folders[component].component_fingerprint(component)

    @property
    def paths(self) -> frozenset[Path]:
        """The folders that its parts lie in."""
        return frozenset(folder.path for folder in self._folders.values())

    def folder_of(self, component: str) -> ModelFolder:
        """Return the model that a component is taken from."""
        return self._folders[component]

    def probe_side(self, component: str) -> int:
        """
        Return the side of the small image-like input that a fresh component is tried with.

        Not the smallest possible one: OpenVINO 2026.4 on CPU packs a dynamic graph's convolutions
        at the first inference, and where that leaves 1x1 at the deepest level of a UNet, every
        later inference of another size is wrong without a word. After a first one that leaves
        2x2, all sizes are right.
        """
        if component == self.family.denoiser:
            return 2 * self.scale.multiple // self.scale.factor
        return 8 * self.scale.factor if component == VAE_ENCODER else 8

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
                self._tokenizers = {
                    name: getattr(transformers, self.folder.config[name][1]).from_pretrained(
                        self.parts / name
                    )
                    for name in self.tokenizer_names
                }
        return self._tokenizers

    @property
    def pipeline_settings(self) -> dict[str, Any]:
        """What the model sets of its pipeline itself, beside its parts."""
        names = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
        return {name: self.folder.config[name] for name in names if name in self.folder.config}

    @property
    def scheduler_name(self) -> str | None:
        """The key in `SCHEDULERS` of the model's own scheduler; None where it has none."""
        return short_name(self._scheduler_settings["_class_name"])

    @cached_property
    def _scheduler_settings(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = read_json(self.parts / "scheduler" / "scheduler_config.json")
        return settings

    def scheduler(self, name: str | None) -> Any:
        """
        Return a fresh scheduler; its tables are computed once.

        Args:
            name: A key of `SCHEDULERS`, or None for the model's own.
        """
        if name not in self._schedulers:
            heavy()
            with quiet():
                self._schedulers[name] = make_scheduler(self.parts, name)
        return copy.deepcopy(self._schedulers[name])

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
        values = (width // stride) * (height // stride) * self.vae_widths[level]
        whole = values * _VAE_MAPS * wide
        if stride == 1:
            return whole
        tile = min(width * height, _TILE_PIXELS) * self.vae_widths[0] * _TILE_MAPS * wide
        return 2 * values * _FLOAT_BYTES + max(whole, tile)

    def check_size(self, width: int, height: int) -> None:
        """
        Make sure that the model can make an image of exactly this size.

        Raises:
            InvalidRequest: It cannot; the text names the nearest sizes that it can make.
        """
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

    def check_steps(self, scheduler: str | None, steps: int, strength: float) -> None:
        """
        Make sure that a scheduler has a schedule of which `strength` is `steps` steps.

        Args:
            scheduler: A key of `SCHEDULERS`, or None for one of the model's own that is not there.
            steps: That a pass is to run.
            strength: Its part of the schedule, over 0 and at most 1.

        Raises:
            InvalidRequest: It has none; the text says how many steps there may be.
        """
        longest = None if scheduler is None else SCHEDULERS[scheduler].longest
        if longest is None:
            return
        length = self._scheduler_settings.get(*longest)
        most = int(length * strength)
        if steps <= most:
            return
        msg = (
            f"{steps} steps were asked for, but the scheduler {scheduler!r} has {length} of them "
            f"on this model, of which a strength of {strength:g} is {most}. Ask for {most} at "
            "most, or use another scheduler, such as 'euler'."
        )
        raise InvalidRequest(msg)

    def check_memory(self, geometry: Geometry, limit: int) -> None:
        """
        Make sure that a step at this geometry can be held in memory at all.

        Raises:
            InvalidRequest: It would take far more than `limit` bytes; the text has the figures.
        """
        pixels = (geometry.width // self.scale.factor) * (geometry.height // self.scale.factor)
        rows = self.family.batch(geometry)
        needed = rows * pixels * self.denoiser_width * _FLOAT_BYTES * _LIVE_ACTIVATIONS
        if needed > limit:
            msg = (
                f"{geometry} was asked for; a step of that size would take about "
                f"{needed / 2**20:.0f} MiB of working memory, but the memory budget is "
                f"{limit / 2**20:.0f} MiB. Ask for a smaller image, or raise memory_budget."
            )
            raise InvalidRequest(msg)

    def _assemble(self) -> Path:
        """Lay all parts' configurations side by side, as the pipeline classes read them."""
        target = Path(tempfile.mkdtemp(prefix="holdfast-"))
        weakref.finalize(self, shutil.rmtree, target, ignore_errors=True)
        (target / "model_index.json").write_text(json.dumps(dict(self.folder.config)))
        for name, folder in self._folders.items():
            (target / name).mkdir()
            shutil.copy(folder.path / name / "config.json", target / name)
        for name in self.folder.config:
            shared = name.startswith("tokenizer") or name == "scheduler"
            if shared and (self.folder.path / name).is_dir():
                shutil.copytree(self.folder.path / name, target / name)
        return target


_FLOAT_BYTES = 4
_VAE_MAPS = 9
_TILE_MAPS = 16
_TILE_PIXELS = (SIDE + 2 * 58) ** 2
"""Of a tile, with what the VAE of Stable Diffusion 1.5 sees of its neighbours, at most."""
_LIVE_ACTIVATIONS = 40
"""Feature maps of the first level's width that live at once, roughly, attention included."""
