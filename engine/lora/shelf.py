"""The LoRA files that an engine knows: identified once, in memory only while they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.errors import LoraError
from holdfast.engine.keys import LoraUse
from holdfast.engine.lora.files import read_lora

if TYPE_CHECKING:
    from pathlib import Path

    from holdfast.engine.lora.files import LoraFile


class LoraShelf:
    """Remembers what each file holds for as long as it does not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...] | None, tuple[str, frozenset[str]]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._contents: dict[str, LoraFile] = {}

    def use(self, path: Path, weight: float, family: str) -> LoraUse:
        """
        Identify a LoRA file; it is read only where it is new or has changed.

        Args:
            path: The file.
            weight: Factor on its change of the weights.
            family: Of the model, see `read_lora`.

        Raises:
            LoraError: The file is refused, see `read_lora`.
        """
        where = path.expanduser().resolve()
        stamp = _stamp(where, family)
        if stamp not in self._known:
            file = read_lora(where, family)
            self._known[stamp] = (file.digest, frozenset(file.layers))
            self._contents[file.digest] = file
        digest, components = self._known[stamp]
        self._places[digest] = (where, family)
        return LoraUse(path.stem, digest, weight, components)

    def content(self, use: LoraUse) -> LoraFile:
        """
        Return a file's layers, read again where they are not in memory any more.

        Raises:
            LoraError: The file is gone, or is not what it was when it was identified.
        """
        if use.digest not in self._contents:
            where, family = self._places[use.digest]
            file = read_lora(where, family)
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


def _stamp(path: Path, family: str) -> tuple[object, ...] | None:
    """Return what a file's content cannot change without; None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (path, family, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
