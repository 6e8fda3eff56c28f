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

from holdfast.engine.devices import PRECISION, in_force, is_physical
from holdfast.engine.errors import CompileError
from holdfast.engine.faults import compile_errors, last_line
from holdfast.engine.gates import split_gates
from holdfast.engine.heartbeat import heartbeat
from holdfast.engine.imports import runtime
from holdfast.engine.keys import DYNAMIC, ComponentKey, GraphKey
from holdfast.engine.lora import LoraShelf, check, fuse
from holdfast.engine.memory import compiled_bytes, giving_back_pages, private_bytes
from holdfast.engine.plan import Cost
from holdfast.engine.quantize import KINDS, FusedLora, quantize, quantized_graph
from holdfast.engine.tiling import STRIDES
from holdfast.engine.timesteps import accept_fractional_timesteps, embed_timesteps_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import openvino as ov

    from holdfast.engine.diskcache import DiskCache
    from holdfast.engine.events import Emitter
    from holdfast.engine.plan import Action
    from holdfast.engine.quantize import Kind
    from holdfast.engine.source import ModelFolder

_PROBE_TOKENS = 77


@dataclass(frozen=True)
class Source:
    """
    Where a component's graph comes from.

    Attributes:
        folder: The model that it is a part of.
        component: Its name there.
        probe_side: Height and width of the small input that it is tried with.
    """

    folder: ModelFolder
    component: str
    probe_side: int = 8


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
        self.loras = LoraShelf()
        self.keeps_blobs: bool | None = None
        self._emit = emit
        self._cache = cache
        self._checkpoint = checkpoint
        self._note = note
        self._sources: dict[str, Source] = {}
        self._sizes: dict[tuple[Path, int], int] = {}
        self._graphs: dict[GraphKey, ov.Model] = {}
        self._holds = cache.holds()

    @property
    def graphs(self) -> frozenset[GraphKey]:
        """The graphs that are read."""
        return frozenset(self._graphs)

    def know_source(self, fingerprint: str, source: Source) -> None:
        """Tell where the graph of the source that keys name so comes from."""
        self._sources[fingerprint] = source

    def is_absent(self, key: ComponentKey) -> bool:
        """Tell whether a component's graph must be quantized before it can be read."""
        if not _is_cached(key.graph):
            return False
        return not key.is_seen or not self._file(key.graph).is_file()

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
                check(self.loras.content(use), key.component, graph)
        self._hold(key.graph)
        with self._timed("quantize", key):
            quantize(*self._recipe(key.graph), self._cache.root, self._emit)
        self._cache.prune()

    def read(self, key: ComponentKey) -> None:
        """
        Read a component's graph; its weights stay mapped from the file.

        Raises:
            CompileError: The file cannot be read.
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
            graph = self.core.read_model(file)
            accept_fractional_timesteps(graph)
            embed_timesteps_exactly(graph)
            learned["bytes"] = file.with_suffix(".bin").stat().st_size
            self._graphs[key.graph] = graph

    def check_loras(self, key: ComponentKey) -> None:
        """
        Make sure that every LoRA of a key fits its graph.

        Raises:
            LoraError: One does not, or its file is gone.
        """
        for use in key.fused:
            check(self.loras.content(use), key.component, self._graph(key))

    def make(self, key: ComponentKey) -> Component:
        """
        Compile a component and try it with one small inference.

        Raises:
            CompileError: It could not be fused, compiled or tried.
            Cancelled: The checkpoint said so.
        """
        with compile_errors(key):
            graph = self._graph(key)
            return self._compile(self._fuse(graph, key) if key.fused else graph, key)

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
            loras = [(self.loras.content(use), use.weight) for use in key.fused]
            learned["layers"] = sum(len(lora.layers[key.component]) for lora, _ in loras)
            return fuse(graph, key.component, loras)

    def _compile(self, graph: ov.Model, key: ComponentKey) -> Component:
        self._checkpoint("compile")
        if key.device == "CPU":
            graph = split_gates(graph)
        if key.shape in STRIDES:
            from holdfast.engine.cutting import cut

            graph = cut(graph, STRIDES[key.shape])
        elif key.shape != DYNAMIC:
            graph = graph.clone()
            graph.reshape(dict(_static_shapes(graph, key)))
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
            compiled, cached = self._compiled(graph, key)
            self._checkpoint("check")
            self._try(compiled, key)
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
                private_bytes_delta=private_bytes() - before,
            )
        return component

    def _compiled(self, graph: ov.Model, key: ComponentKey) -> tuple[ov.CompiledModel, bool]:
        """Return the compiled model, and whether its blob was on disk."""
        properties = dict(key.properties)
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
        try:
            self._cache.write_blob(name, compiled.export_model().getvalue())
        except OSError as error:
            self._cache.drop_blob(name, f"it could not be written: {error}")
        return compiled, False

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
        """Run one small inference: it packs a dynamic graph's weights, and must be finite."""
        inputs = {
            index: np.zeros(shape, port.get_element_type().to_dtype())
            for index, (port, shape) in enumerate(
                _probe_shapes(compiled, self._sources[key.source].probe_side)
            )
        }
        request = compiled.create_infer_request()
        request.infer(inputs)
        for port in compiled.outputs:
            if not np.isfinite(request.get_tensor(port).data).all():
                msg = (
                    f"{key.component} (key {key.digest}) compiles for {key.device} but computes "
                    "values that are not finite; try precision='f32'."
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
            FusedLora(str(self.loras.place(use)), use.digest, use.weight) for use in graph.loras
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


def _is_cached(graph: GraphKey) -> bool:
    """Whether it lies in the cache, and not in the model's own folder."""
    return graph.quantization != "none"


def _bucket(key: ComponentKey) -> str:
    precision = dict(key.properties)[PRECISION]
    return f"{key.source[:12]} {key.shape} {precision} {key.quantization}"


def _static_shapes(graph: ov.Model, key: ComponentKey) -> Iterator[tuple[str, ov.PartialShape]]:
    """Yield the shape of each input: all but the one timestep have the main input's batch."""
    import openvino as ov

    main = [int(side) for side in key.shape.split("x")]
    for port in graph.inputs:
        shape = port.get_partial_shape()
        if len(shape) == len(main):
            shape = ov.PartialShape(main)
        elif len(shape):
            shape[0] = 1 if len(shape) == 1 else main[0]
        yield port.get_any_name(), shape


def _probe_shapes(compiled: ov.CompiledModel, side: int) -> Iterator[tuple[Any, list[int]]]:
    image_rank = 4
    for port in compiled.inputs:
        shape = list(port.get_partial_shape())
        fill = [1, *([side] * len(shape) if len(shape) == image_rank else [_PROBE_TOKENS] * 3)]
        yield (
            port,
            [
                fill[min(axis, 1)] if dim.is_dynamic else dim.get_length()
                for axis, dim in enumerate(shape)
            ],
        )
