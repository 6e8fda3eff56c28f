"""
Pipelines of optimum-intel as throwaway views on compiled components.

A view costs milliseconds and compiles nothing. It has infer requests of its own, so that two views
never get each other's results, and it is built anew rather than changed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov

from holdfast.engine.compiling.memory import trim
from holdfast.engine.errors import GenerationError
from holdfast.engine.graphs.feature_reuse import FEATURES, FRESH, KEPT
from holdfast.engine.graphs.text_encoder import REPLACED, VECTORS
from holdfast.engine.graphs.vae_tiles import STRIDES, TiledVae
from holdfast.engine.imports import heavy, quiet
from holdfast.states import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from holdfast.engine.compiling.components import Component
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.families import Family
    from holdfast.engine.models.model import Latents, Model

    Checkpoint = Callable[[str], None]


class Port(ov.CompiledModel):  # type: ignore[misc] # OpenVINO publishes no types
    """
    A compiled component with an infer request of its own.

    A job is stopped before an inference and never inside one: after ``InferRequest.cancel()`` a
    dynamic graph on the CPU plugin of OpenVINO 2026.4 fails at the next inference, or computes
    something else without a word.

    Args:
        component: What it runs.
        checkpoint: Called with the component's name before each inference; raises to stop.

    Attributes:
        steer: Called in place of an inference, with what runs one and its inputs; None: nothing is.
    """

    def __init__(self, component: Component, checkpoint: Checkpoint) -> None:
        super().__init__(component.compiled)
        self._name = component.key.component
        self._checkpoint = checkpoint
        self._request = self.create_infer_request()
        self._unused = {
            port.get_any_name(): [
                1 if side.is_dynamic else side.get_length() for side in port.get_partial_shape()
            ]
            for port in self.inputs
            if port.get_any_name() in (VECTORS, REPLACED, KEPT)
        }
        self._deep = {
            port.get_any_name(): np.array(True)  # noqa: FBT003 - what NumPy takes
            for port in self.inputs
            if port.get_any_name() == FRESH
        }
        self.steer: Callable[[Callable[[Any], Any], Any], Any] | None = None

    def __call__(
        self,
        inputs: Any = None,
        share_inputs: bool = True,  # noqa: FBT001, FBT002 - the signature that optimum calls
        share_outputs: bool = False,  # noqa: FBT001, FBT002 - the same
        *,
        decode_strings: bool = True,
    ) -> Any:
        """Run one inference, as ``openvino.CompiledModel`` does."""
        self._checkpoint(self._name)
        zeros = {
            name: np.zeros(shape, np.float32)
            for name, shape in self._unused.items()
            if name not in inputs
        }

        def infer(given: Any) -> Any:
            return self._request.infer(
                {**self._deep, **given} if self._deep else given,
                share_inputs=share_inputs,
                share_outputs=share_outputs,
                decode_strings=decode_strings,
            )

        given = {**inputs, **zeros} if zeros else inputs
        answer = infer(given) if self.steer is None else self.steer(infer, given)
        return _without_features(answer) if self._deep else answer


def _without_features(outputs: Any) -> Any:
    """Return an inference's outputs as the pipelines know them."""
    known = {port: value for port, value in outputs.items() if FEATURES not in port.get_names()}
    return type(outputs)(known)


@dataclass(frozen=True, eq=False)
class View:
    """
    One mode's pipeline on the components in service.

    Attributes:
        mode: What it was built for.
        pipeline: optimum-intel's pipeline object.
        components: What it runs, by name.
        ports: What it runs them by: the infer requests of its own.
        denoiser: Name of the component that each step runs.
        tiled: Those among them that run in tiles.
        model: That the components are of.
    """

    mode: Mode
    pipeline: Any
    components: Mapping[str, Component]
    ports: Mapping[str, Port]
    denoiser: str
    tiled: Mapping[str, TiledVae]
    model: Model

    @property
    def latents(self) -> Latents:
        """How the denoiser's latents are related to the VAE's."""
        return self.model.latents

    @property
    def has_frames(self) -> bool:
        """Whether the VAE's latents and pixels have an axis for frames."""
        return self.model.family.has_frames

    @property
    def class_name(self) -> str:
        """The pipeline's class, which decides what a call of it really does."""
        return type(self.pipeline).__name__

    def serves(self, components: Mapping[str, Component]) -> bool:
        """Whether it runs exactly these components."""
        return self.components == components

    def relax(self) -> None:
        """
        Give back the scratch memory of every component; the next inference takes it again.

        Activations of a large image take hundreds of megabytes, and no two components run at once.
        """
        family = self.model.family
        # On OpenVINO 2026.4 the text encoder of Z-Image ends the process at a long prompt after
        # that ("double free or corruption").
        kept = family.text_encoders if family.reads_whole else ()
        for name, component in self.components.items():
            if name not in kept:
                component.compiled.release_memory()
        trim()

    def __call__(self, **arguments: Any) -> Any:
        """Call the pipeline as diffusers does; its latents are returned."""
        # optimum's own __call__ forces the size of a static graph on pipelines that take none.
        with quiet():
            call = type(self.pipeline).auto_model_class.__call__
            return call(self.pipeline, output_type="latent", return_dict=False, **arguments)[0]


def make_view(
    model: Model,
    mode: Mode,
    components: Mapping[str, Component],
    checkpoint: Checkpoint,
    emit: Emitter,
) -> View:
    """
    Build the pipeline of `mode` on compiled components. Compiles nothing.

    Args:
        model: Names the pipeline class, and has its configurations and tokenizers.
        mode: What the view is for.
        components: Those that the mode needs, by name.
        checkpoint: See `Port`.
        emit: Told ``view.created``.
    """
    heavy(emit)
    began = time.perf_counter()

    with quiet():
        cls = _pipeline_class(model.family, mode)
        ports = {name: Port(component, checkpoint) for name, component in components.items()}
        denoiser = ports[model.family.denoiser]
        pipeline = cls(
            **ports,
            **model.tokenizers(),
            scheduler=model.own_scheduler(),
            **model.pipeline_settings,
            compile_only=True,
            dynamic_shapes=any(port.get_partial_shape().is_dynamic for port in denoiser.inputs),
            model_save_dir=model.parts,
        )
        pipeline.set_progress_bar_config(disable=True)
        model.family.adapt(pipeline)
    seconds = round(time.perf_counter() - began, 6)
    emit("view.created", mode=str(mode), pipeline=cls.__name__, compiles=0, seconds=seconds)
    tiled = {
        name: TiledVae(ports[name], STRIDES[component.key.shape])
        for name, component in components.items()
        if component.key.shape in STRIDES
    }
    return View(mode, pipeline, dict(components), ports, model.family.denoiser, tiled, model)


def _pipeline_class(family: Family, mode: Mode) -> Any:
    """Return optimum's class; where a flow begins late, that of txt2img under the mode's name."""
    import optimum.intel.openvino as optimum_openvino

    name = family.pipelines[mode]
    if not family.schedulers or mode is Mode.TXT2IMG:
        return getattr(optimum_openvino, name)
    return type(name, (getattr(optimum_openvino, family.pipelines[Mode.TXT2IMG]),), {})


def check_view(view: View, family: Family, mode: Mode, number: int, emit: Emitter) -> None:
    """
    Make sure, right before a pass, that the pipeline is the one that the request asked for.

    Raises:
        GenerationError: It is another one. Not a step was run.
    """
    expected = family.pipelines[mode]
    if (view.mode, view.class_name) != (mode, expected):
        emit(
            "view.refused",
            mode=str(mode),
            pipeline=view.class_name,
            expected=expected,
            **dict[str, Any]({"pass": number}),
        )
        msg = (
            f"Pass {number} was asked for as {mode} ({expected}), but the pipeline at hand is "
            f"{view.class_name}, built for {view.mode}: it was stopped before its first step. "
            "This is a fault of Holdfast; please report it with the log."
        )
        raise GenerationError(msg)
