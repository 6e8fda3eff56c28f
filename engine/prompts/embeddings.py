"""Textual inversion: files of learned vectors that a prompt calls by name."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

MOST_VECTORS = 75
"""Of one file; more would not stand in one chunk of a prompt."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """
    What one file holds.

    Attributes:
        name: What a prompt calls it by: the file's name without its ending.
        digest: Of the file's content.
        vectors: (count, width) by the name in the file: ``"clip_l"`` and ``"clip_g"`` for the two
            text encoders of SDXL, else of no meaning.
    """

    name: str
    digest: str
    vectors: Mapping[str, NDArray[np.float32]]

    def fitting(self, encoder: str, width: int) -> NDArray[np.float32] | None:
        """Return the vectors for a text encoder of this name and width; None where it has none."""
        rows = self.vectors.get(_NAMES.get(encoder, ""))
        of_this_width = (each for each in (rows, *self.vectors.values()) if each is not None)
        return next((each for each in of_this_width if each.shape[1] == width), None)


_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class EmbeddingLibrary:
    """Finds embeddings by name; a file is read again only where it has changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Embedding] = {}

    def find(self, places: Sequence[Path]) -> dict[str, Embedding]:
        """
        Return the embeddings in these files and folders by name, in lower case.

        Raises:
            InvalidRequest: A place does not exist, or a file is refused, see `read_embedding`.
        """
        found = {}
        for file in _files(places):
            stat = file.stat()
            stamp = (file, stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if stamp not in self._known:
                self._known[stamp] = read_embedding(file)
            found[file.stem.lower()] = self._known[stamp]
        return found


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(place.glob("**/*.safetensors"))
        elif place.is_file():
            yield place
        else:
            msg = f"embeddings names {place}, but there is no such file or folder. Check the path."
            raise InvalidRequest(msg)


def read_embedding(file: Path) -> Embedding:
    """
    Read a ``.safetensors`` file of textual inversion, in the layout of A1111 or of diffusers.

    Raises:
        InvalidRequest: It is none; the text says what it is instead.
    """
    import safetensors
    from safetensors.numpy import load

    try:
        content = file.read_bytes()
        tensors = load(content)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        msg = (
            f"The embedding {file.name} cannot be read ({error}). Give a .safetensors file of "
            "textual inversion; .pt and .bin files may hold programs and are not opened."
        )
        raise InvalidRequest(msg) from error
    vectors = {}
    for name, values in tensors.items():
        rows = values[None] if values.ndim == 1 else values
        if rows.ndim != 2 or not 1 <= rows.shape[0] <= MOST_VECTORS:  # noqa: PLR2004 - a table
            msg = (
                f"{file.name} is no embedding: it holds {name!r} of shape {list(values.shape)}, "
                f"where 1 to {MOST_VECTORS} vectors are needed. Give a file of textual inversion."
            )
            raise InvalidRequest(msg)
        vectors[name] = rows.astype("float32")
    if not vectors or not all(abs(rows).max() < float("inf") for rows in vectors.values()):
        msg = f"The embedding {file.name} holds no vectors, or ones that are not finite."
        raise InvalidRequest(msg)
    return Embedding(file.stem, hashlib.blake2b(content, digest_size=8).hexdigest(), vectors)


def split_at_names(text: str, embeddings: Mapping[str, Embedding]) -> Iterator[str | Embedding]:
    """Yield a text's parts in order: what is text, and the embeddings that it calls by name."""
    place = 0
    if embeddings:
        names = "|".join(re.escape(name) for name in sorted(embeddings, key=len, reverse=True))
        pattern = rf"(?<!\w)(?:embedding:)?({names})(?:\.safetensors)?(?!\w)"
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield text[place : match.start()]
            yield embeddings[match[1].lower()]
            place = match.end()
    yield text[place:]


def unknown_names(text: str, embeddings: Mapping[str, Embedding]) -> list[str]:
    """Return each ``embedding:name`` of a text of which there is no file."""
    parts = (part for part in split_at_names(text, embeddings) if isinstance(part, str))
    return [
        name for part in parts for name in re.findall(r"(?<!\w)embedding:[^\s,()\[\]:|]+", part)
    ]
