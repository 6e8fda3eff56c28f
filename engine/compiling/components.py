"""
Every compiled component that an engine holds: which there are, which serve, which go.

It does what a `Move` says, in one transaction, and keeps its own record of what it really did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.compiling.compiler import Compiler, Component
from holdfast.engine.compiling.faults import compile_errors
from holdfast.engine.compiling.plan import Step
from holdfast.engine.errors import let_go

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from holdfast.engine.compiling.keys import ComponentKey
    from holdfast.engine.compiling.plan import Action, Move
    from holdfast.engine.logbook.events import Emitter
    from holdfast.engine.models.diskcache import DiskCache

__all__ = ["Component", "ComponentStore"]


class ComponentStore:
    """
    Holds compiled components by key, and knows which of them serve.

    All methods are called from the engine's worker thread; the properties may be read from any.

    Args:
        emit: Where events go.
        cache: For the `Compiler`.
        checkpoint: For the `Compiler`.

    Attributes:
        compiler: Makes the components.
        done: What was really done, for comparison with the plan; whoever compares empties it.
    """

    def __init__(self, emit: Emitter, cache: DiskCache, checkpoint: Callable[[str], None]) -> None:
        self.compiler = Compiler(emit, cache, checkpoint, self._note)
        self.done: list[Step] = []
        self._emit = emit
        # Both are replaced and never changed, so that other threads may look at them.
        self._held: Mapping[ComponentKey, Component] = {}
        self._service: Mapping[str, Component] = {}
        self._untold: list[tuple[ComponentKey, int, str]] = []

    @property
    def service(self) -> Mapping[str, Component]:
        """The component that serves, by name; a new mapping after every move."""
        return self._service

    @property
    def held(self) -> Mapping[ComponentKey, int]:
        """Bytes of every compiled component, least recently used first."""
        return {key: component.bytes for key, component in self._held.items()}

    def stage(self, move: Move) -> dict[ComponentKey, Component]:
        """
        Do the steps of a move except for putting anything in service.

        Returns:
            The freshly compiled components. Until `serve` takes them they are nobody's, and
            dropping them is all that undoing takes.

        Raises:
            LoraError: A LoRA does not fit. Nothing was given up or compiled.
            ModelSourceError: A component could not be quantized. The same.
            CompileError: A component could not be read, fused, compiled or tried.
            Cancelled: The checkpoint said so.
        """
        by_digest = {key.digest: key for key in (*move.service.values(), *self._held)}
        todo = [(step, by_digest[step.key]) for step in move.steps]
        staged: dict[ComponentKey, Component] = {}
        try:
            for step, key in todo:
                if step.action == "quantize":
                    self.compiler.quantize(key)
                elif step.action == "read":
                    self.compiler.read(key)
            for step, key in todo:
                if step.action == "fuse":
                    with compile_errors(key):
                        self.compiler.check_loras(key)
            self.evict((key, step.reason) for step, key in todo if step.action == "evict")
            for step, key in todo:
                if step.action == "reuse":
                    self._reuse(key, step.reason)
                elif step.action == "compile":
                    staged[key] = self.compiler.make(key)
        except BaseException as error:
            staged.clear()
            let_go(error)
            raise
        return staged

    def serve(
        self, service: Mapping[str, ComponentKey], staged: Mapping[ComponentKey, Component]
    ) -> None:
        """Hold what is staged, and put exactly `service` in service, in one assignment."""
        held = {**self._held, **staged}
        for key in service.values():
            held[key] = held.pop(key)  # what serves is the most recently used
        serving = {name: held[key] for name, key in service.items()}
        self._held, self._service = held, serving

    def evict(self, leaving: Iterable[tuple[ComponentKey, str]]) -> None:
        """
        Give up components, each for a reason; their memory is free afterwards.

        A view that runs one of them would keep it: drop it first.
        """
        for key, why in dict(leaving).items():
            size = self._held[key].bytes
            held = {each: part for each, part in self._held.items() if each != key}
            service = {n: part for n, part in self._service.items() if part.key != key}
            self._untold.append((key, size, why))
            self._held, self._service = held, service
            self._note("evict", key)
            self.tell()

    def tell(self) -> None:
        """Log what was given up and is not told of yet, as where the telling was broken into."""
        while self._untold:
            key, size, why = self._untold[0]
            if key not in self._held:
                self._emit(
                    "component.evicted",
                    component=key.component, key=key.digest, bytes=size, why=why,
                )  # fmt: skip
            self._untold.pop(0)

    def restore(self, service: Mapping[str, ComponentKey]) -> None:
        """
        Compile again what of an earlier service was given up, and put it all back.

        Raises:
            HoldfastError: That failed too. What is held stays held.
        """
        gone = [key for key in service.values() if key not in self._held]
        self.serve(service, {key: self.compiler.make(key) for key in gone})

    def release(self, why: str) -> None:
        """Give up every component."""
        self.evict((key, why) for key in self._held)

    def forget(self, sources: frozenset[str], why: str) -> None:
        """Give up every component and graph of a source that is not among `sources`."""
        self.evict((key, why) for key in self._held if key.source not in sources)
        self.compiler.forget(sources)

    def _reuse(self, key: ComponentKey, why: str) -> None:
        self._note("reuse", key)
        size = self._held[key].bytes
        self._emit("component.reused", component=key.component, key=key.digest, bytes=size, why=why)

    def _note(self, action: Action, key: ComponentKey) -> None:
        self.done.append(Step(action, key.component, key.digest))
