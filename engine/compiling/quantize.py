"""
The denoiser in 8 bits: computed once into the cache, from what the model itself computes.

``"int8"`` quantizes weights and activations; their ranges are observed while the model denoises
images of its own. ``"int8-weights"`` stores the weights of linear layers in 8 bits and computes as
before.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from holdfast.engine.errors import LoraError, ModelSourceError
from holdfast.engine.graphs.timesteps import accept_fractional_timesteps
from holdfast.engine.imports import heavy, quiet
from holdfast.engine.lora import Strength, fuse, read_lora
from holdfast.engine.models.atomic_files import discard
from holdfast.engine.models.child_process import ChildError, Progress, receive, run_child
from holdfast.engine.models.diskcache import build_once
from holdfast.engine.models.export import export_told
from holdfast.engine.models.families import family_of
from holdfast.engine.models.integrity import Digests, read_json
from holdfast.engine.models.source import GRAPH, INDEX, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from holdfast.engine.lora import LoraFile
    from holdfast.engine.models.families import Family
    from holdfast.engine.models.source import ModelFolder
    from holdfast.states import Emit

Kind = Literal["int8", "int8-weights"]
KINDS: tuple[Kind, ...] = ("int8", "int8-weights")

PROMPTS = (
    "a large red circle on a blue background",
    "a photo of a black dog in front of a white house",
    "a painting of a green tree at night, detailed",
)
STEPS = 4
# Where pixels become features and features pixels, and where the timestep comes in: small layers
# that every other one depends on.
KEPT = r".*\.(conv_in|conv_out|time_embedding|add_embedding|time_emb_proj)\b.*"
# Of these OpenVINO 2026.4 on CPU makes float32 again when it compiles, and holds that as well: of a
# UNet of Stable Diffusion 1.5's size 3.6 GB in place of 1.5.
EXPANDED = "Convolution"
# Without VNNI a CPU adds products of 8 bits in 16, which overflow. Weights of half the range cost
# little, and make images of one quality on every CPU.
OVERFLOW_FIX = "enable"
_SEAL = "digest"
"""A file beside the graph, with the digest of what was computed."""


class FusedLora(msgspec.Struct, frozen=True):
    """
    A LoRA that is fused into the denoiser before it is quantized.

    Attributes:
        path: The file.
        digest: Of its content.
        weight: Factor on its change of the weights.
        blocks: Patterns of layers, each with a further factor.
    """

    path: str
    digest: str
    weight: float
    blocks: tuple[tuple[str, float], ...] = ()

    @property
    def strength(self) -> Strength:
        """How strongly each of its layers works."""
        return Strength(self.weight, self.blocks)


class Order(msgspec.Struct, frozen=True):
    """
    What is to be quantized.

    Attributes:
        model: The model's folder, as OpenVINO IR.
        kind: To what.
        loras: Fused before.
        prompts: Denoised to observe activations.
        steps: For each of them.
    """

    model: str
    kind: Kind
    loras: tuple[FusedLora, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    steps: int = STEPS

    def fingerprint(self, denoiser: str) -> str:
        """Return what the result is known by; `denoiser` is the fingerprint of the model's."""
        loras = [(lora.digest, lora.weight, *lora.blocks) for lora in self.loras]
        how = (KEPT, OVERFLOW_FIX) if self.kind == "int8" else (EXPANDED,)
        recipe = repr((denoiser, self.kind, self.prompts, self.steps, how, loras))
        return hashlib.sha256(recipe.encode()).hexdigest()[:32]


def quantized_graph(
    model: ModelFolder, kind: Kind, loras: tuple[FusedLora, ...], cache_dir: Path
) -> Path:
    """Return where the ``.xml`` that `quantize` makes lies, or will."""
    order = Order(str(model.path), kind, loras)
    denoiser = model.component_fingerprint(family_of(model.class_name).denoiser)
    return cache_dir / "exports" / order.fingerprint(denoiser) / GRAPH


def is_whole(graph: Path, digests: Digests) -> bool:
    """
    Tell whether a graph that `quantize` made is there, as it was made.

    Args:
        graph: Its ``.xml``.
        digests: Of the same cache: what did not change since is not read again.
    """
    try:
        return (graph.parent / _SEAL).read_bytes() == _digest(graph.parent, digests)
    except OSError:
        return False


def _digest(folder: Path, digests: Digests) -> bytes:
    return digests.of((folder / GRAPH, folder / WEIGHTS), folder).encode()


def quantize(
    model: ModelFolder, kind: Kind, loras: tuple[FusedLora, ...], cache_dir: Path, emit: Emit
) -> Path:
    """
    Return the 8-bit graph of a model's denoiser; the first time this takes minutes.

    One that was cut or changed since is thrown away, and computed again.

    Args:
        model: Of any family.
        kind: ``"int8"`` or ``"int8-weights"``.
        loras: Fused before: what is quantized, and observed, is the denoiser with them.
        cache_dir: Where it is kept, below ``exports``, under a digest of the denoiser, `kind`,
            `loras` and how its ranges are observed.
        emit: Told ``export.*`` where there is work to do, and ``cache.discarded``.

    Returns:
        The graph's ``.xml``.

    Raises:
        ModelSourceError: The quantization failed, or this is a frozen application.
        Cancelled: The job that this is done for was asked to stop.
    """
    graph = quantized_graph(model, kind, loras, cache_dir)
    digests = Digests(cache_dir / "digests.json", emit)
    names = "".join(f" + {Path(lora.path).stem}@{lora.strength}" for lora in loras)

    def build(scratch: Path) -> None:
        source = f"{model.path}{names} ({kind})"
        with export_told(source, graph.parent.name, scratch, emit) as tell:
            try:
                order = Order(str(model.path), kind, loras)
                run_child(__name__, order, scratch, offline=True, on_progress=tell)
            except ChildError as error:
                msg = (
                    f"precision={kind!r} was asked for, but quantizing the denoiser of "
                    f"{model.path}{names} {error}. Use another precision; see `holdfast doctor` "
                    "for free memory."
                )
                raise ModelSourceError(msg) from error
            (scratch / _SEAL).write_bytes(_digest(scratch, digests))

    if graph.parent.is_dir() and not is_whole(graph, digests):
        why = "not the 8-bit graph that was computed, or damaged"
        emit("cache.discarded", level="warning", entry=graph.parent.name, why=why)
        discard(graph.parent)
    build_once(graph.parent, build)
    return graph


def _main(target: Path) -> None:
    order, tell = receive(Order)
    heavy()
    import nncf
    import openvino as ov

    index = read_json(Path(order.model) / INDEX)
    family = family_of(index["_class_name"])
    loras = [_lora(lora, family) for lora in order.loras]
    graph = ov.Core().read_model(Path(order.model) / family.denoiser / GRAPH)
    accept_fractional_timesteps(graph)
    graph = fuse(graph, family.denoiser, loras)
    if order.kind == "int8-weights":
        graph = nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT8_SYM,
            ignored_scope=nncf.IgnoredScope(types=[EXPANDED], validate=False),
        )
    else:
        samples = list(_trajectories(order, family, loras, tell))
        graph = nncf.quantize(
            graph,
            nncf.Dataset(samples, _counted(len(samples), tell)),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(patterns=[KEPT], validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix(OVERFLOW_FIX)
            ),
        )
    ov.save_model(graph, target / GRAPH, compress_to_fp16=False)


def _lora(wanted: FusedLora, family: Family) -> tuple[LoraFile, Strength]:
    file = read_lora(Path(wanted.path), (*family.text_encoders, family.denoiser))
    if file.digest != wanted.digest:
        msg = f"LoRA {wanted.path} has changed since it was identified. Configure it anew."
        raise LoraError(msg)
    return file, wanted.strength


def _trajectories(
    order: Order,
    family: Family,
    loras: Sequence[tuple[LoraFile, Strength]],
    tell: Callable[[Progress], None],
) -> Iterator[dict[str, Any]]:
    """Yield each input of the denoiser while it makes images, with its LoRAs."""
    import optimum.intel.openvino as optimum_openvino
    import torch

    cls = getattr(optimum_openvino, next(iter(family.pipelines.values())))
    with quiet():
        pipeline = cls.from_pretrained(order.model, compile=False)
        pipeline.set_progress_bar_config(disable=True)
        for name in (*family.text_encoders, family.denoiser):
            part = getattr(pipeline, name)
            part.model = fuse(part.model, name, loras)
        denoiser = getattr(pipeline, family.denoiser)
        denoiser.compile()
        recorder = denoiser.request = _Recorder(denoiser.request)
        for index, prompt in enumerate(order.prompts):
            tell(Progress("denoise", index, len(order.prompts)))
            pipeline(
                prompt,
                num_inference_steps=order.steps,
                generator=torch.Generator().manual_seed(index),
                output_type="latent",
            )
            yield from recorder.taken()


class _Recorder:
    """A compiled denoiser that keeps a copy of what it was given."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._inputs: list[dict[str, Any]] = []

    def __call__(self, inputs: dict[str, Any], share_inputs: bool = True) -> Any:  # noqa: FBT001, FBT002 - optimum's call
        self._inputs.append({name: np.array(value) for name, value in inputs.items()})
        return self._compiled(inputs, share_inputs=share_inputs)

    def taken(self) -> list[dict[str, Any]]:
        """Return what was recorded since the last time."""
        inputs, self._inputs = self._inputs, []
        return inputs


def _counted(total: int, tell: Callable[[Progress], None]) -> Callable[[Any], Any]:
    """Hand samples on, and tell of each; they are gone through once for each of nncf's stages."""
    handed = itertools.count()

    def hand(sample: Any) -> Any:
        tell(Progress("observe", next(handed) % total, total))
        return sample

    return hand


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
