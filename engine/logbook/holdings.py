"""Which compiled components an engine held, and which of them served, as far as its log tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def lora_set(loras: Iterable[str]) -> frozenset[str]:
    """Return the LoRAs, written ``name@weight``, that change anything."""
    return frozenset(each for each in loras if not each.endswith("@0"))


class Holdings:
    """
    The components of one engine.

    What is compiled or reused is staged until a move commits it: what a failed move has staged
    is dropped by the engine without a further event.

    Attributes:
        held: Component of each key that is held.
        service: Key in service for each component.
    """

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.service: dict[str, str] = {}
        self._loras: dict[str, frozenset[str]] = {}
        self._staged: dict[str, str] = {}
        self._given_up: set[str] = set()

    @property
    def loras(self) -> frozenset[str] | None:
        """The LoRAs fused into what serves; None where the log does not tell of all of it."""
        serving = self.service | {component: key for key, component in self._staged.items()}
        if not serving or any(key not in self._loras for key in serving.values()):
            return None
        return frozenset().union(*(self._loras[key] for key in serving.values()))

    def compile(self, event: Mapping[str, Any]) -> None:
        """Take in ``component.compile.completed``."""
        component, key = str(event.get("component")), str(event.get("key"))
        self._staged[key] = component
        self._loras.pop(key, None)
        if "lora" in event:
            self._loras[key] = lora_set(event["lora"] or ())

    def reuse(self, event: Mapping[str, Any]) -> None:
        """Take in ``component.reused``."""
        self._staged[str(event.get("key"))] = str(event.get("component"))

    def evict(self, event: Mapping[str, Any]) -> None:
        """Take in ``component.evicted``."""
        key = str(event.get("key"))
        self.held.pop(key, None)
        self._loras.pop(key, None)
        self._given_up.add(key)

    def commit(self) -> None:
        """Put what is staged in service: a move is over, or what it staged is used."""
        self.held |= self._staged
        self.service |= {component: key for key, component in self._staged.items()}
        self._staged, self._given_up = {}, set()

    def roll_back(self) -> None:
        """Keep of what is staged only what had been given up in the same move: it was restored."""
        restored = {key: name for key, name in self._staged.items() if key in self._given_up}
        self._staged, self._given_up = {}, set()
        self.held |= restored

    def drop_staged(self) -> None:
        """Forget what a failed move has staged."""
        self._staged = {}
