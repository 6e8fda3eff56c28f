"""
Every compiled component: read, fused, shaped, compiled, tried, kept, given up.

The only file that calls ``compile_model``. It does what a `Move` says, in one transaction, and
keeps its own record of what it really did.
"""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast.engine.errors import CompileError, HoldfastError
from holdfast.engine.families import accept_fractional_timesteps
from holdfast.engine.heartbeat import heartbeat
from holdfast.engine.imports import runtime
from holdfast.engine.keys import DYNAMIC, ComponentKey
from holdfast.engine.lora import check, fuse
from holdfast.engine.memory import give_back_pages, packed_bytes, private_bytes
from holdfast.engine.plan import Cost, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import openvino as ov

    from holdfast.engine.diskcache import Costs
    from holdfast.engine.events import Emitter
    from holdfast.engine.lora import LoraFile
    from holdfast.engine.plan import Action, Move

_PROBE_TOKENS = 77


@dataclass(frozen=True, eq=False)
class Component:
    """
    One compiled component.

    Attributes:
        key: Its identity.
        compiled: OpenVINO's compiled model. Whoever runs it wraps it, for infer requests of its
            own: two threads on one object get each other's results.
        bytes: What its packed weights take.
        precision: In force, read back from the compiled model.
        device: In force, read back from the compiled model.
    """

    key: ComponentKey
    compiled: ov.CompiledModel
    bytes: int
    precision: str
    device: str


class ComponentStore:
    """
    Holds compiled components by key, and knows which of them serve.

    All methods are called from the engine's owner thread.

    Args:
        emit: Where events go.
        costs: What reads, fuses and compiles took before, here and in earlier runs.
        checkpoint: Called with the name of what comes next, before each native call; raises
            where the work is to stop.

    Attributes:
        core: OpenVINO's.
        openvino_version: Its version, part of every key.
        done: What was really done, for comparison with the plan; whoever compares empties it.
    """

    def __init__(self, emit: Emitter, costs: Costs, checkpoint: Callable[[str], None]) -> None:
        runtime()
        import openvino as ov

        self.core = ov.Core()
        self.openvino_version: str = ov.get_version()
        self._emit = emit
        self._costs = costs
        self._checkpoint = checkpoint
        self._files: dict[tuple[str, str], Path] = {}
        self._sizes: dict[tuple[Path, str], int] = {}
        self._probe_sides: dict[str, int] = {}
        self._loras: dict[str, LoraFile] = {}
        self._graphs: dict[tuple[str, str], ov.Model] = {}
        self._held: dict[ComponentKey, Component] = {}
        self._service: dict[str, Component] = {}
        self.done: list[Step] = []

    @property
    def service(self) -> Mapping[str, Component]:
        """The component that serves, by name; a new mapping after every move."""
        return self._service

    @property
    def held(self) -> Mapping[ComponentKey, int]:
        """Bytes of every compiled component, least recently used first."""
        return {key: component.bytes for key, component in self._held.items()}

    @property
    def graphs(self) -> frozenset[tuple[str, str]]:
        """Source fingerprint and quantization of each graph that is read."""
        return frozenset(self._graphs)

    def know_source(
        self, fingerprint: str, file: Path, *, quantization: str = "none", probe_side: int = 8
    ) -> None:
        """
        Tell where a source's graph lies.

        Args:
            fingerprint: The source's, as keys name it.
            file: The graph's ``.xml``.
            quantization: Of this graph.
            probe_side: Height and width of the small input that it is tried with.
        """
        self._files[fingerprint, quantization] = file
        self._probe_sides[fingerprint] = probe_side

    def know_lora(self, lora: LoraFile) -> None:
        """Keep a LoRA file's content for keys that name its digest."""
        self._loras[lora.digest] = lora

    def price(self, action: Action, key: ComponentKey) -> Cost:
        """Return what an action is expected to take; the bytes of a compile are exact."""
        known = self._costs.expected(action, key.device, key.component, _bucket(key))
        seconds = None if known is None else known.seconds
        return Cost(seconds, self._bytes(key) if action == "compile" else 0)

    def stage(self, move: Move) -> dict[ComponentKey, Component]:
        """
        Do the steps of a move except for putting anything in service.

        Returns:
            The freshly compiled components. Until `serve` takes them they are nobody's, and
            dropping them is all that undoing takes.

        Raises:
            CompileError: A component could not be read, fused, compiled or tried.
            Cancelled: The checkpoint said so.
        """
        staged: dict[ComponentKey, Component] = {}
        by_digest = {key.digest: key for key in (*move.service.values(), *self._held)}
        todo = [(step, by_digest[step.key]) for step in move.steps]
        for step, key in todo:
            if step.action == "read":
                self._read(key)
        for step, key in todo:
            if step.action == "fuse":
                for use in key.lora:
                    check(self._loras[use.digest], key.component, self._graph(key))
        for step, key in todo:
            if step.action == "evict":
                self.evict(key, step.reason)
            elif step.action == "reuse":
                self._reuse(key, step.reason)
            elif step.action == "compile":
                staged[key] = self._make(key)
        return staged

    def serve(self, move: Move, staged: Mapping[ComponentKey, Component]) -> None:
        """Put exactly the move's components in service, in one assignment."""
        held = {**self._held, **staged}
        for key in move.service.values():
            held[key] = held.pop(key)
        service = {name: held[key] for name, key in move.service.items()}
        self._held, self._service = held, service

    def touch(self) -> None:
        """Mark what serves as the most recently used."""
        serving = {component.key: component for component in self._service.values()}
        idle = {key: part for key, part in self._held.items() if key not in serving}
        self._held = {**idle, **serving}

    def evict(self, key: ComponentKey, why: str) -> None:
        """Give up one component; its memory is free afterwards, where no view holds it."""
        component = self._held[key]
        self._held = {held: part for held, part in self._held.items() if held != key}
        self._service = {n: c for n, c in self._service.items() if c is not component}
        self._note("evict", key)
        self._emit(
            "component.evicted",
            component=key.component, key=key.digest, bytes=component.bytes, why=why,
        )  # fmt: skip
        del component
        gc.collect()

    def restore(self, service: Mapping[str, ComponentKey]) -> None:
        """
        Compile again what of an earlier service was given up, and put it all back.

        Raises:
            CompileError: That failed too. What is held stays held; nothing serves.
        """
        again = {key: self._make(key) for key in service.values() if key not in self._held}
        self._held |= again
        self._service = {name: self._held[key] for name, key in service.items()}

    def release(self, why: str) -> None:
        """Give up everything: components, graphs, and the memory that they took."""
        self._service = {}
        for key in tuple(self._held):
            self.evict(key, why)
        self._graphs = {}
        gc.collect()

    def forget(self, sources: frozenset[str]) -> None:
        """Give up every component and graph of a source that is not among `sources`."""
        for key in tuple(self._held):
            if key.source not in sources:
                self.evict(key, "its model was replaced")
        self._graphs = {where: g for where, g in self._graphs.items() if where[0] in sources}
        gc.collect()

    def _reuse(self, key: ComponentKey, why: str) -> None:
        self._note("reuse", key)
        size = self._held[key].bytes
        self._emit("component.reused", component=key.component, key=key.digest, bytes=size, why=why)

    def _make(self, key: ComponentKey) -> Component:
        with _compile_errors(key):
            graph = self._graph(key)
            return self._compile(self._fuse(graph, key) if key.lora else graph, key)

    def _graph(self, key: ComponentKey) -> ov.Model:
        if (key.source, key.quantization) not in self._graphs:
            self._read(key)
        return self._graphs[key.source, key.quantization]

    def _read(self, key: ComponentKey) -> None:
        self._checkpoint("read")
        file = self._file(key)
        with (
            _compile_errors(key),
            self._emit.span("component.read", component=key.component) as learned,
            self._timed("read", key),
        ):
            graph = self.core.read_model(file)
            accept_fractional_timesteps(graph)
            learned["bytes"] = file.with_suffix(".bin").stat().st_size
        self._graphs[key.source, key.quantization] = graph

    def _fuse(self, graph: ov.Model, key: ComponentKey) -> ov.Model:
        self._checkpoint("fuse")
        loras = [(self._loras[use.digest], use.weight) for use in key.lora]
        names = [str(use) for use in key.lora]
        with (
            self._emit.span("component.fuse", component=key.component, lora=names) as learned,
            self._timed("fuse", key),
        ):
            learned["layers"] = sum(len(lora.layers[key.component]) for lora, _ in loras)
            return fuse(graph, key.component, loras)

    def _compile(self, graph: ov.Model, key: ComponentKey) -> Component:
        self._checkpoint("compile")
        if key.shape != DYNAMIC:
            graph = graph.clone()
            graph.reshape(dict(_static_shapes(graph, key)))
        before = private_bytes()
        span = self._emit.span(
            "component.compile",
            component=key.component, key=key.digest, device_asked=key.device, shape=key.shape,
        )  # fmt: skip
        beat = heartbeat(
            self._emit,
            component=key.component,
            key=key.digest,
            expected_seconds=self.price("compile", key).seconds,
        )
        with span as learned, self._timed("compile", key), beat:
            compiled = self.core.compile_model(graph, key.device, dict(key.properties))
            self._try(compiled, key)
            component = Component(
                key,
                compiled,
                self._bytes(key),
                _property(compiled, "INFERENCE_PRECISION_HINT"),
                _property(compiled, "EXECUTION_DEVICES"),
            )
            learned.update(
                device=component.device,
                precision=component.precision,
                cache="hit" if _property(compiled, "LOADED_FROM_CACHE") == "True" else "miss",
                bytes=component.bytes,
                private_bytes_delta=private_bytes() - before,
            )
        give_back_pages(self._file(key).with_suffix(".bin"))
        return component

    def _try(self, compiled: ov.CompiledModel, key: ComponentKey) -> None:
        """Run one small inference: it packs a dynamic graph's weights, and must be finite."""
        inputs = {
            index: np.zeros(shape, port.get_element_type().to_dtype())
            for index, (port, shape) in enumerate(
                _probe_shapes(compiled, self._probe_sides[key.source])
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

    def _file(self, key: ComponentKey) -> Path:
        return self._files[key.source, key.quantization]

    def _bytes(self, key: ComponentKey) -> int:
        where = (self._file(key), dict(key.properties)["INFERENCE_PRECISION_HINT"])
        if where not in self._sizes:
            self._sizes[where] = packed_bytes(*where)
        return self._sizes[where]

    @contextlib.contextmanager
    def _timed(self, action: Action, key: ComponentKey) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._note(action, key)
        self._costs.record(
            action,
            key.device,
            key.component,
            _bucket(key),
            seconds=time.perf_counter() - began,
            bytes=self._bytes(key),
        )

    def _note(self, action: Action, key: ComponentKey) -> None:
        self.done.append(Step(action, key.component, key.digest))


@contextlib.contextmanager
def _compile_errors(key: ComponentKey) -> Iterator[None]:
    """Turn what OpenVINO raises into a `CompileError` that names component, key and cause."""
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        text = str(error).strip()
        cause = text.splitlines()[-1] if text else type(error).__name__
        msg = (
            f"{key.component} (key {key.digest}) was to be compiled for {key.device}, but OpenVINO "
            f"failed: {cause}. What served before still does; change the setting back or see "
            "`holdfast doctor`."
        )
        raise CompileError(msg, component=key.component, key=key.digest) from error


def _bucket(key: ComponentKey) -> str:
    precision = dict(key.properties)["INFERENCE_PRECISION_HINT"]
    return f"{key.source[:12]} {key.shape} {precision} {key.quantization}"


def _static_shapes(graph: ov.Model, key: ComponentKey) -> Iterator[tuple[str, list[int]]]:
    main = [int(side) for side in key.shape.split("x")]
    for port in graph.inputs:
        shape = port.get_partial_shape()
        if len(shape) == len(main):
            yield port.get_any_name(), main
        elif len(shape) and shape[0].is_dynamic:
            yield port.get_any_name(), [main[0], *(dim.get_length() for dim in list(shape)[1:])]


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


def _property(compiled: ov.CompiledModel, name: str) -> str:
    """Read a property back; virtual devices such as HETERO do not have them all."""
    try:
        value = compiled.get_property(name)
    except RuntimeError:
        return "unknown"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)
