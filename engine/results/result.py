"""What a request gave: the images, how they came about, and everything to make them again."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import Image

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.kinds import alone
from holdfast.engine.requests.values import locate
from holdfast.engine.results.saving import FORMATS, QUALITY, Telling, encode, format_of, write_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from holdfast.engine.requests.cadence import Evaluations
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.results.saving import Format, Metadata


@dataclass(frozen=True)
class Degradation:
    """
    Something that was done otherwise than asked, because the host allowed it (``strict=False``).

    Attributes:
        kind: ``"embedding_unknown"``, ``"tags_unused"``, ``"vae_tiled"``, ...
        asked: What was asked.
        given: What was done.
        words: The part of a prompt that was not used as it was written.
    """

    kind: str
    asked: str
    given: str
    words: str = ""


@dataclass(frozen=True)
class Result:
    """
    The result of a request.

    Attributes:
        images: One for each seed.
        first_pass: The first pass's, of a `Hires`; else empty.
        seeds: The seed of each image, in its first pass: see `request_of`.
        request: As it was asked.
        timings: Seconds by phase: ``"prepare"``, ``"pass 1"``, ``"decode"``, ..., ``"total"``.
        degradations: Empty unless the engine is not strict.
        infotexts: A1111's generation parameters of each image.
        provenance: What else identifies how the images were made: versions, model, LoRAs.
        evaluations: Of the denoiser, for each image, in each pass: how many were whole and cheap.
    """

    images: tuple[Image.Image, ...]
    first_pass: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    request: Request
    timings: Mapping[str, float]
    degradations: tuple[Degradation, ...]
    infotexts: tuple[str, ...] = field(repr=False)
    provenance: Mapping[str, Any] = field(repr=False)
    evaluations: tuple[Evaluations, ...] = ()

    @property
    def infotext(self) -> str:
        """A1111's generation parameters of the first image."""
        return self.infotexts[0]

    @property
    def hires_seeds(self) -> tuple[int, ...]:
        """The seed of each image in its second pass; empty where there is none."""
        if not isinstance(self.request, Hires):
            return ()
        fixed = self.request.hires_seed
        return self.seeds if fixed is None else (fixed,) * len(self.seeds)

    def request_of(self, index: int) -> Request:
        """Return the request that makes image `index` of the batch again, alone, to the bit."""
        return alone(self.request, self.seeds, index)

    def png(self, index: int = 0, *, metadata: Metadata = "public") -> bytes:
        """
        Return an image as a PNG file, with its generation parameters.

        Args:
            index: Of the image in its batch.
            metadata: What it tells of how it was made: see `save`.
        """
        return self._encoded(index, FORMATS[".png"], metadata, QUALITY)

    def jpeg(
        self, index: int = 0, *, quality: int = QUALITY, metadata: Metadata = "public"
    ) -> bytes:
        """Return an image as a JPEG file of a quality from 1 to 100; otherwise as `png`."""
        return self._encoded(index, FORMATS[".jpg"], metadata, quality)

    def webp(
        self, index: int = 0, *, quality: int = QUALITY, metadata: Metadata = "public"
    ) -> bytes:
        """Return an image as a WebP file of a quality from 1 to 100; otherwise as `png`."""
        return self._encoded(index, FORMATS[".webp"], metadata, quality)

    def save(
        self,
        target: str | Path | IO[bytes],
        *,
        metadata: Metadata = "public",
        quality: int = QUALITY,
    ) -> tuple[Path, ...]:
        """
        Write every image with its generation parameters.

        Args:
            target: Path of the first image; further ones of a batch get ``-2``, ``-3``, ... before
                the ending, which says the format: ``.png``, ``.jpg``, ``.webp``, ``.avif``. Or a
                file that is open for bytes, which gets the only image as PNG.
            metadata: ``"public"``: infotext and the request, with digests in place of pictures and
                names in place of paths. ``"full"``: the whole request, with the picture that an
                `Img2Img` began with and the paths of LoRAs. ``"none"``: nothing.
            quality: Of JPEG, WebP and AVIF, 1 to 100.

        Returns:
            The files written; none for an open file.

        Raises:
            InvalidRequest: The folder does not exist, the ending is unknown, or a file cannot be
                written. Files that were there before are then as they were.
        """
        if not isinstance(target, (str, Path)):
            self._stream(target, metadata)
            return ()
        try:
            first = locate(target)
        except ValueError as error:
            msg = f"The image was to go to {str(target)!r}, but {error}."
            raise InvalidRequest(msg) from error
        form = format_of(first)
        files = {
            first.with_stem(f"{first.stem}-{index + 1}") if index else first: self._encoded(
                index, form, metadata, quality
            )
            for index in range(len(self.images))
        }
        write_files(files)
        return tuple(files)

    def _stream(self, target: IO[bytes], metadata: Metadata) -> None:
        if not callable(getattr(target, "write", None)):
            msg = f"A path or a file open for bytes is needed, not {type(target).__name__}."
            raise InvalidRequest(msg)
        if len(self.images) > 1:
            msg = f"{len(self.images)} images do not go into one file: write each with png(index)."
            raise InvalidRequest(msg)
        target.write(self.png(metadata=metadata))

    def _encoded(self, index: int, form: Format, metadata: Metadata, quality: int) -> bytes:
        telling = Telling(self.infotexts[index], self.request_of(index), self.provenance)
        return encode(self.images[index], form, telling, metadata, quality)

    def _repr_png_(self) -> bytes:
        """Show the images, side by side, in a notebook."""
        strip = Image.new("RGB", (sum(each.width for each in self.images), self.images[0].height))
        left = 0
        for each in self.images:
            strip.paste(each, (left, 0))
            left += each.width
        buffer = io.BytesIO()
        strip.save(buffer, "PNG")
        return buffer.getvalue()
