"""
From a file on disk to a compiled component: read, fused, shaped, compiled, and tried.

The only file that calls ``compile_model``.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.compiling.devices import PRECISION, in_force, is_physical
from holdfast.engine.compiling.faults import compile_errors, last_line
from holdfast.engine.compiling.heartbeat import heartbeat
from holdfast.engine.compiling.keys import DYNAMIC, ComponentKey, GraphKey
from holdfast.engine.compiling.memory import compiled_bytes, giving_back_pages, private_bytes
from holdfast.engine.compiling.plan import Cost
from holdfast.engine.compiling.quantize import (
    KINDS,
    FusedLora,
    is_whole,
    quantize,
    quantized_graph,
)
from holdfast.engine.errors import CompileError, ModelSourceError
from holdfast.engine.graphs.feature_reuse import FEATURES, FRESH, KEPT, reuse_features
from holdfast.engine.graphs.geglu import split_gates
from holdfast.engine.graphs.prompt_length import PROMPT, accept_any_prompt_length
from holdfast.engine.graphs.scaled_norms import WITHOUT_SNIPPETS, has_scaled_norms
from holdfast.engine.graphs.text_encoder import give_earlier_layers, take_vectors
from holdfast.engine.graphs.timesteps import accept_fractional_timesteps, embed_timesteps_exactly
from holdfast.engine.graphs.vae_tiles import STRIDES
from holdfast.engine.imports import runtime
from holdfast.engine.lora import LoraLibrary, check, fuse
from holdfast.engine.models.integrity import Digests
from holdfast.engine.models.source import is_overwritten, stamp_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import openvino as ov

    from holdfast.engine.compiling.plan import Action
    from holdfast.engine.compiling.quantize import Kind
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.diskcache import DiskCache
    from holdfast.engine.models.families import Family, Scale
    from holdfast.engine.models.source import ModelFolder, Stamp


@dataclass(frozen=True)
class Source:
    """
    Where a component's graph comes from.

    Attributes:
        folder: The model that it is a part of.
        component: Its name there.
        family: Knows the shapes of its inputs.
        scale: Of the model.
    """

    folder: ModelFolder
    component: str
    family: Family
    scale: Scale


@dataclass(frozen=True, eq=False)
class Component:
    """
    One compiled component.

    Attributes:
        key: Its identity.
        compiled: OpenVINO's compiled model. Whoever runs it wraps it, for infer requests of its
            own: two threads on one object get each other's results.
        bytes: What it takes in memory.
        precision: In force, read back from the compiled model.
        device: In force, read back from the compiled model.
    """

    key: ComponentKey
    compiled: ov.CompiledModel
    bytes: int
    precision: str
    device: str


class Compiler:
    """
    Makes compiled components. Keeps the graphs that it has read, and none of what it made.

    Args:
        emit: Where events go.
        cache: What quantizing, reading, fusing and compiling took before, quantized graphs, and
            compiled blobs.
        checkpoint: Called with the name of what comes next, before each native call; raises
            where the work is to stop.
        note: Told each action that was done.

    Attributes:
        core: OpenVINO's.
        openvino_version: Its version, part of every key.
        loras: The LoRA files that keys name.
        keeps_blobs: Whether compiled blobs are kept on disk. None: where the device gains by it.
    """

    def __init__(
        self,
        emit: Emitter,
        cache: DiskCache,
        checkpoint: Callable[[str], None],
        note: Callable[[Action, ComponentKey], None],
    ) -> None:
        runtime()
        import openvino as ov

        self.core = ov.Core()
        self.openvino_version: str = ov.get_version()
        self.loras = LoraLibrary()
        self.keeps_blobs: bool | None = None
        self._emit = emit
        self._cache = cache
        self._checkpoint = checkpoint
        self._note = note
        self._sources: dict[str, Source] = {}
        self._sizes: dict[tuple[Path, int], int] = {}
        self._graphs: dict[GraphKey, ov.Model] = {}
        self._digests = Digests(cache.root / "digests.json", emit)
        self._whole: dict[GraphKey, Stamp] = {}
        self._holds = cache.holds()

    @property
    def graphs(self) -> frozenset[GraphKey]:
        """The graphs that are read, and may be used."""
        return frozenset(key for key in self._graphs if not self._is_damaged(key))

    def know_source(self, fingerprint: str, source: Source) -> None:
        """Tell where the graph of the source that keys name so comes from."""
        self._sources[fingerprint] = source

    def is_absent(self, key: ComponentKey) -> bool:
        """Tell whether a component's graph must be quantized before it can be read."""
        if not _is_cached(key.graph):
            return False
        return not key.is_seen or not self._is_whole(key.graph)

    def price(self, action: Action, key: ComponentKey) -> Cost:
        """Return what an action is expected to take; nothing is known of what is not here yet."""
        if not key.is_seen:
            return Cost()
        known = self._cache.costs.expected(action, key.device, key.component, _bucket(key))
        seconds = None if known is None else known.seconds
        return Cost(seconds, self.bytes(key) if action == "compile" else 0)

    def bytes(self, key: ComponentKey) -> int:
        """Return what a component takes in memory once it is compiled."""
        width = 4 if dict(key.properties)[PRECISION] == "f32" else 2
        where = (self._file(key.graph), width)
        if where not in self._sizes:
            if self.is_absent(key):  # until it is quantized: as if all of it were
                return compiled_bytes(self._file(GraphKey(key.source)), 1)
            self._sizes[where] = compiled_bytes(*where)
        return self._sizes[where]

    def quantize(self, key: ComponentKey) -> None:
        """
        Compute a component's 8-bit graph, LoRAs included, unless that was done before.

        Raises:
            LoraError: A LoRA does not fit the graph, or its file is gone. Nothing was computed.
            ModelSourceError: The quantization failed.
            Cancelled: The job was stopped.
        """
        self._checkpoint("quantize")
        with compile_errors(key):
            graph = self.core.read_model(self._file(GraphKey(key.source)))
            for use in key.lora:
                check(self.loras.content(use), key.component, graph, use.strength)
        self._graphs.pop(key.graph, None)
        self._hold(key.graph)
        with self._timed("quantize", key):
            quantize(*self._recipe(key.graph), self._cache.root, self._emit)
        self._cache.prune()

    def read(self, key: ComponentKey) -> None:
        """
        Read a component's graph; its weights stay mapped from the file.

        Raises:
            CompileError: The file cannot be read.
            ModelSourceError: It was changed since it was planned for.
            Cancelled: The checkpoint said so.
        """
        self._checkpoint("read")
        self._hold(key.graph)
        file = self._file(key.graph)
        with (
            compile_errors(key),
            self._emit.span("component.read", component=key.component) as learned,
            self._timed("read", key),
        ):
            self._check_unchanged(key)
            graph = self.core.read_model(file)
            accept_fractional_timesteps(graph)
            embed_timesteps_exactly(graph)
            if not self._sources[key.source].family.reads_whole:
                accept_any_prompt_length(graph)
                take_vectors(graph)
                give_earlier_layers(graph)
            learned["bytes"] = file.with_suffix(".bin").stat().st_size
            self._graphs[key.graph] = graph

    def check_loras(self, key: ComponentKey) -> None:
        """
        Make sure that every LoRA of a key fits its graph.

        Raises:
            LoraError: One does not, or its file is gone.
        """
        began = time.perf_counter()
        for use in key.fused:
            check(self.loras.content(use), key.component, self._graph(key), use.strength)
        self._emit(
            "lora.checked",
            component=key.component,
            lora=[str(use) for use in key.fused],
            seconds=round(time.perf_counter() - began, 6),
        )

    def make(self, key: ComponentKey) -> Component:
        """
        Compile a component and try it with one small inference.

        Raises:
            CompileError: It could not be fused, compiled or tried.
            Cancelled: The checkpoint said so.
        """
        with compile_errors(key):
            graph = self._graph(key)
            self.check_mapped(key)
            return self._compile(self._fuse(graph, key) if key.fused else graph, key)

    def check_mapped(self, key: ComponentKey) -> None:
        """
        Make sure that the weights of a graph that was read, which lie in the file, are the same.

        Raises:
            ModelSourceError: They were written into.
        """
        source = self._sources[key.source]
        if not _is_cached(key.graph):
            source.folder.check_mapped(source.component)
        elif self._is_damaged(key.graph):
            msg = (
                f"{self._file(key.graph).parent}, the 8-bit {key.component}, was written into "
                "while the engine read from it. Call unload(), and ask again: it is computed anew."
            )
            raise ModelSourceError(msg)

    def forget(self, sources: frozenset[str] = frozenset()) -> None:
        """Give up every graph of a source that is not among `sources`."""
        self._graphs = {key: g for key, g in self._graphs.items() if key.source in sources}
        self._holds.keep(self._file(key).parent for key in self._graphs if _is_cached(key))

    def _hold(self, graph: GraphKey) -> None:
        """Keep a graph that is of the cache from being pruned until `forget`."""
        if _is_cached(graph):
            self._holds.add(self._file(graph).parent)

    def _graph(self, key: ComponentKey) -> ov.Model:
        if key.graph not in self._graphs:
            self.read(key)
        return self._graphs[key.graph]

    def _fuse(self, graph: ov.Model, key: ComponentKey) -> ov.Model:
        self._checkpoint("fuse")
        names = [str(use) for use in key.fused]
        with (
            self._emit.span("component.fuse", component=key.component, lora=names) as learned,
            self._timed("fuse", key),
        ):
            loras = [(self.loras.content(use), use.strength) for use in key.fused]
            learned["layers"] = sum(len(lora.layers[key.component]) for lora, _ in loras)
            return fuse(graph, key.component, loras)

    def _compile(self, graph: ov.Model, key: ComponentKey) -> Component:
        self._checkpoint("compile")
        before = private_bytes()
        span = self._emit.span(
            "component.compile",
            component=key.component, key=key.digest, device_asked=key.device, shape=key.shape,
            lora=[str(use) for use in key.lora],
        )  # fmt: skip
        beat = heartbeat(
            self._emit,
            component=key.component,
            key=key.digest,
            expected_seconds=self.price("compile", key).seconds,
        )
        pages = giving_back_pages(self._file(key.graph).with_suffix(".bin"))
        with span as learned, self._timed("compile", key), beat, pages:
            shaped = _shaped(graph, key, self._sources[key.source].family)
            compiled, cached = self._compiled(shaped, key)
            self._checkpoint("check")
            self._try(compiled, key)
            self.check_mapped(key)
            component = Component(
                key,
                compiled,
                self.bytes(key),
                in_force(compiled, PRECISION),
                in_force(compiled, "EXECUTION_DEVICES"),
            )
            learned.update(
                device=component.device,
                precision=component.precision,
                cache="hit" if cached else "miss",
                bytes=component.bytes,
                private_bytes_delta=_grown(before, private_bytes()),
            )
        return component

    def _compiled(self, graph: ov.Model, key: ComponentKey) -> tuple[ov.CompiledModel, bool]:
        """Return the compiled model, and whether its blob was on disk."""
        properties = dict(key.properties)
        if _is_static(key) and properties[PRECISION] == "f32" and has_scaled_norms(graph):
            _check_hands_on(key)
            properties |= WITHOUT_SNIPPETS if key.device == "CPU" else {}
        if not self._blobs_for(key.device):
            compiled = self.core.compile_model(graph, key.device, properties)
            return compiled, in_force(compiled, "LOADED_FROM_CACHE") == "True"
        name = self._blob_name(key)
        blob = self._cache.read_blob(name)
        if blob is not None:
            try:
                return self.core.import_model(blob, key.device, properties), True
            except RuntimeError as error:
                self._cache.drop_blob(name, f"OpenVINO refused it: {last_line(error)}")
        compiled = self.core.compile_model(graph, key.device, properties)
        self.check_mapped(key)
        self._cache.write_blob(name, compiled.export_model().getvalue())
        return compiled, False

    def _check_unchanged(self, key: ComponentKey) -> None:
        """Refuse a graph that is no longer the one that the key names."""
        source = self._sources[key.source]
        if not _is_cached(key.graph):
            source.folder.check_unchanged(source.component)
            return
        self.check_mapped(key)
        if not self._is_whole(key.graph):
            msg = (
                f"{self._file(key.graph).parent}, the 8-bit {key.component}, was changed since it "
                "was computed. Ask again: it is computed anew."
            )
            raise ModelSourceError(msg)

    def _is_whole(self, graph: GraphKey) -> bool:
        """Tell whether a graph of the cache is there as it was computed."""
        file = self._file(graph)
        stamp = stamp_of(file.parent)
        if self._whole.get(graph) == stamp:
            return True
        if is_whole(file, self._digests):
            self._whole[graph] = stamp
            return True
        return False

    def _is_damaged(self, graph: GraphKey) -> bool:
        """Tell whether what was read of the cache and is mapped since was written into."""
        return is_overwritten(self._whole.get(graph, {}), self._file(graph).parent) and (
            not self._is_whole(graph)
        )

    def _blobs_for(self, device: str) -> bool:
        if not is_physical(device):
            return False
        wanted = device != "CPU" if self.keeps_blobs is None else self.keeps_blobs
        return wanted and "EXPORT_IMPORT" in self.core.get_property(
            device, "OPTIMIZATION_CAPABILITIES"
        )

    def _blob_name(self, key: ComponentKey) -> str:
        hardware = self.core.get_property(key.device, "FULL_DEVICE_NAME")
        return hashlib.blake2b(f"{key.digest} {hardware}".encode(), digest_size=16).hexdigest()

    def _try(self, compiled: ov.CompiledModel, key: ComponentKey) -> None:
        """Run a small inference each way: it packs a dynamic graph's weights; all is finite."""
        request = compiled.create_infer_request()
        inputs = _probe(compiled, key, self._sources[key.source])
        names = {port.get_any_name(): index for index, port in enumerate(compiled.inputs)}
        answers = [request.infer(inputs)]
        if FRESH in names:
            inputs[names[FRESH]] = np.array(False)  # noqa: FBT003 - what NumPy takes
            inputs[names[KEPT]] = answers[0][FEATURES]
            answers.append(request.infer(inputs))
        if all(np.isfinite(value).all() for each in answers for value in each.values()):
            return
        precision = in_force(compiled, PRECISION)
        advice = (
            "its weights are damaged; get the model again"
            if precision == "f32"
            else "try precision='f32'"
        )
        msg = (
            f"{key.component} (key {key.digest}) compiles for {key.device} but computes "
            f"values that are not finite in {precision}; {advice}."
        )
        raise CompileError(msg, component=key.component, key=key.digest)

    def _file(self, graph: GraphKey) -> Path:
        if not _is_cached(graph):
            source = self._sources[graph.source]
            return source.folder.component_path(source.component)
        return quantized_graph(*self._recipe(graph), self._cache.root)

    def _recipe(self, graph: GraphKey) -> tuple[ModelFolder, Kind, tuple[FusedLora, ...]]:
        (kind,) = (kind for kind in KINDS if kind == graph.quantization)
        loras = (
            FusedLora(str(self.loras.place(use)), use.digest, use.weight, use.blocks)
            for use in graph.loras
        )
        return self._sources[graph.source].folder, kind, tuple(loras)

    @contextlib.contextmanager
    def _timed(self, action: Action, key: ComponentKey) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._note(action, key)
        self._cache.costs.record(
            action,
            key.device,
            key.component,
            _bucket(key),
            seconds=time.perf_counter() - began,
            bytes=self.bytes(key),
        )


def _shaped(graph: ov.Model, key: ComponentKey, family: Family) -> ov.Model:
    """Return a graph as it is compiled: for its device, and in its shape."""
    if key.device == "CPU":
        graph = split_gates(graph)
        if key.component == family.denoiser and key.shape == DYNAMIC and key.quantization == "none":
            graph = reuse_features(graph)
    if key.shape in STRIDES:
        from holdfast.engine.graphs.vae_cut import cut

        return cut(graph, STRIDES[key.shape])
    if key.shape != DYNAMIC:
        graph = graph.clone()
        graph.reshape(dict(_static_shapes(graph, key, family)))
    return graph


def _is_static(key: ComponentKey) -> bool:
    """Whether it is for one size alone."""
    return key.shape != DYNAMIC and key.shape not in STRIDES


def _check_hands_on(key: ComponentKey) -> None:
    """Refuse a device that chooses the CPU by itself, and hands no such property on to it."""
    if not is_physical(key.device):
        msg = (
            f"{key.component} (key {key.digest}) has normalizations that OpenVINO cannot compile "
            f"on {key.device} for one size in float32: it would end the process. Use "
            "device='CPU', shapes='dynamic', or precision='bf16' where the CPU has it."
        )
        raise CompileError(msg, component=key.component, key=key.digest)


def _grown(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _is_cached(graph: GraphKey) -> bool:
    """Whether it lies in the cache, and not in the model's own folder."""
    return graph.quantization != "none"


def _bucket(key: ComponentKey) -> str:
    precision = dict(key.properties)[PRECISION]
    return f"{key.source[:12]} {key.shape} {precision} {key.quantization}"


def _static_shapes(
    graph: ov.Model, key: ComponentKey, family: Family
) -> Iterator[tuple[str, ov.PartialShape]]:
    """Yield the shape of each input for the main input's, which the key has."""
    import openvino as ov

    main = _main_shape(key)
    for port in graph.inputs:
        sides = _sides(port, key.component, main, family)
        if key.tokens and PROMPT in port.get_names():
            sides[1] = key.tokens
        yield port.get_any_name(), ov.PartialShape(sides)


def _probe(compiled: ov.CompiledModel, key: ComponentKey, source: Source) -> dict[int, np.ndarray]:
    """Return small inputs, as they belong together."""
    family, component = source.family, source.component
    is_free = key.shape == DYNAMIC or key.shape in STRIDES
    main = family.probe_shape(component, source.scale) if is_free else _main_shape(key)
    inputs = {}
    for index, port in enumerate(compiled.inputs):
        sides = _sides(port, component, main, family)
        shape = [
            (family.probe_tokens if axis or main else 1) if side < 0 else side
            for axis, side in enumerate(sides)
        ]
        value = max(family.probe_value(name, main) for name in port.get_names())
        inputs[index] = np.full(shape, value, port.get_element_type().to_dtype())
    return inputs


def _main_shape(key: ComponentKey) -> tuple[int, ...]:
    return tuple(int(side) for side in key.shape.split("x"))


def _sides(port: Any, component: str, main: tuple[int, ...], family: Family) -> list[int]:
    """Return the sides of an input for the main input's shape, -1 where any length goes."""
    sides = [-1 if side.is_dynamic else side.get_length() for side in port.get_partial_shape()]
    known = family.input_shapes(component, main)
    named = next((known[name] for name in port.get_names() if name in known), None)
    if named is not None and len(named) == len(sides):
        return [wanted if side < 0 else side for side, wanted in zip(sides, named, strict=True)]
    if sides and main and sides[0] < 0:
        sides[0] = main[0]
    return sides
