"""The LoRA files that an engine knows: identified once, in memory only while they are needed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from holdfast.engine.errors import LoraError
from holdfast.engine.lora.files import SETTINGS, read_lora
from holdfast.engine.lora.fusion import Strength

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from holdfast.engine.lora.files import LoraFile


@dataclass(frozen=True)
class LoraUse:
    """
    One LoRA in force.

    Attributes:
        name: As logs show it; two uses are equal whatever they are called.
        digest: Of the file's content, so that a renamed copy is the same LoRA.
        weight: Factor on its change of the weights.
        components: Names of the components that it changes; content and blocks decide them.
        blocks: Patterns of layers, each with a further factor; see `Strength`.
    """

    name: str = field(compare=False)
    digest: str
    weight: float
    components: frozenset[str] = field(compare=False)
    blocks: tuple[tuple[str, float], ...] = ()

    @property
    def strength(self) -> Strength:
        """How strongly each of its layers works."""
        return Strength(self.weight, self.blocks)

    def on(self, component: str) -> LoraUse:
        """Return what matters of it to one component."""
        blocks = (each for each in self.blocks if each[0].startswith(f"{component}."))
        return replace(self, blocks=tuple(blocks))

    def __str__(self) -> str:
        return f"{self.name}@{self.strength}"


class LoraLibrary:
    """Remembers what each file holds for as long as it does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...] | None, tuple[str, frozenset[str]]] = {}
        self._places: dict[str, tuple[Path, frozenset[str]]] = {}
        self._contents: dict[str, LoraFile] = {}

    def use(
        self,
        path: Path,
        weight: float,
        components: Collection[str],
        blocks: tuple[tuple[str, float], ...] = (),
    ) -> LoraUse:
        """
        Identify a LoRA file; it is read only where it is new or has changed.

        Args:
            path: The file.
            weight: Factor on its change of the weights.
            components: Of the model, those that a LoRA can change.
            blocks: Patterns of layers, each with a further factor.

        Raises:
            LoraError: The file is refused, see `read_lora`, or a pattern names a component that it
                does not change.
        """
        # A link is judged and shown by its own name: the hub's cache calls its target by a hash.
        where, parts = path.absolute(), frozenset(components)
        stamp = _stamp(where, parts)
        if stamp not in self._known:
            file = read_lora(where, parts)
            self._known[stamp] = (file.digest, frozenset(file.layers))
            self._contents[file.digest] = file
        digest, changed = self._known[stamp]
        for pattern, _ in blocks:
            if pattern.partition(".")[0] not in changed:
                msg = (
                    f"LoRA {path.name} was asked for with blocks {pattern!r}, and changes "
                    f"{', '.join(sorted(changed))} only. Begin the pattern with one of those."
                )
                raise LoraError(msg)
        self._places[digest] = (where, parts)
        use = LoraUse(path.stem, digest, weight, changed, blocks)
        silent = {name for name in changed if use.on(name).blocks[:1] == ((f"{name}.*", 0.0),)}
        return replace(use, components=changed - silent)

    def content(self, use: LoraUse) -> LoraFile:
        """
        Return a file's layers, read again where they are not in memory any more.

        Raises:
            LoraError: The file is gone, or is not what it was when it was identified.
        """
        if use.digest not in self._contents:
            where, components = self._places[use.digest]
            file = read_lora(where, components)
            if file.digest != use.digest:
                msg = (
                    f"LoRA {use.name} was to be fused again, but {where} has changed since it was "
                    "put in force. Put the old file back, or configure the LoRA set anew."
                )
                raise LoraError(msg)
            self._contents[use.digest] = file
        return self._contents[use.digest]

    def place(self, use: LoraUse) -> Path:
        """Return where the file lay when it was identified last."""
        return self._places[use.digest][0]

    def clear(self) -> None:
        """Let go of the layers of all files; what identifies them stays known."""
        self._contents.clear()


def _stamp(path: Path, components: frozenset[str]) -> tuple[object, ...] | None:
    """Return what a file's content cannot change without; None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    facts = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return (path, components, facts, _stamp(path.with_name(SETTINGS), components))
