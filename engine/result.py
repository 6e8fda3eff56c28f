"""What a request gave: the images, how they came about, and everything to make them again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.metadata import png_chunks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from holdfast.engine.requests import Request


@dataclass(frozen=True)
class Degradation:
    """
    Something that was done otherwise than asked, because the host allowed it (``strict=False``).

    Attributes:
        kind: ``"prompt_truncated"``, ...
        asked: What was asked.
        given: What was done.
        words: For a prompt that was too long: the words that the model did not see.
    """

    kind: str
    asked: str
    given: str
    words: str = ""


@dataclass(frozen=True)
class Result:
    """
    What a request gave.

    Attributes:
        images: One for each seed.
        first_pass: The first pass's, of a `Hires`; else empty.
        seeds: The seed of each image: ``request.but(seed=seeds[i], batch=1)`` makes image i again.
        request: As it was asked.
        timings: Seconds by phase: ``"prepare"``, ``"pass 1"``, ``"decode"``, ..., ``"total"``.
        degradations: Empty unless the engine is not strict.
        infotexts: A1111's generation parameters of each image.
        provenance: What else identifies how the images were made: versions, model, LoRAs.
    """

    images: tuple[Image.Image, ...]
    first_pass: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    request: Request
    timings: Mapping[str, float]
    degradations: tuple[Degradation, ...]
    infotexts: tuple[str, ...] = field(repr=False)
    provenance: Mapping[str, Any] = field(repr=False)

    @property
    def infotext(self) -> str:
        """A1111's generation parameters of the first image."""
        return self.infotexts[0]

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """
        Write every image as PNG with its generation parameters.

        Args:
            path: Of the first image; further ones of a batch get ``-2``, ``-3``, ... before the
                ending.

        Returns:
            The files written.

        Raises:
            InvalidRequest: The folder does not exist, or the file cannot be written there.
        """
        first = Path(path).expanduser()
        if not first.parent.is_dir():
            msg = f"The image was to go to {first}, but there is no folder {first.parent}: make it."
            raise InvalidRequest(msg)
        files = []
        for index, image in enumerate(self.images):
            file = first if index == 0 else first.with_stem(f"{first.stem}-{index + 1}")
            private = {
                "request": json.loads(self.request.to_json()),
                "seed": self.seeds[index],
                **self.provenance,
            }
            try:
                image.save(file, "PNG", pnginfo=png_chunks(self.infotexts[index], private))
            except OSError as error:
                msg = f"The image was to go to {file}, but that cannot be written: {error}."
                raise InvalidRequest(msg) from error
            files.append(file)
        return tuple(files)
