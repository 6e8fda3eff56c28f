"""Images with what made them, as bytes and as files, and read back from there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import uuid
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.infotext import request_from_fields
from holdfast.engine.requests.told import public
from holdfast.engine.requests.values import locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from holdfast.engine.requests.kinds import Request

INFOTEXT = "parameters"
"""The text chunk of a PNG that A1111 and its like read; in other formats EXIF's UserComment."""

PRIVATE = "holdfast"
"""The text chunk of a PNG with the request, as JSON; in other formats EXIF's MakerNote."""

Metadata = Literal["full", "public", "none"]
"""
What a picture tells of how it was made.

``"public"``: infotext, and the request without the pictures that it began with (their digests
instead) and without folders. ``"full"``: the whole request. ``"none"``: nothing.
"""

QUALITY = 95
"""Of lossy formats, 1 to 100."""

_EXIF_MOST = 65_533 - len("Exif\0\0")
"""Bytes of EXIF that a JPEG can hold."""


_ENCODINGS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii"}
"""Of EXIF's UserComment (CIPA DC-008, 4.6.6), by its first eight bytes."""


@dataclass(frozen=True, slots=True)
class Format:
    """
    One kind of image file.

    Attributes:
        name: Pillow's.
        lossy: Whether `QUALITY` holds for it.
    """

    name: str
    lossy: bool = True


FORMATS: Mapping[str, Format] = MappingProxyType({
    ".png": Format("PNG", lossy=False),
    ".jpg": Format("JPEG"),
    ".jpeg": Format("JPEG"),
    ".webp": Format("WEBP"),
    ".avif": Format("AVIF"),
})  # fmt: skip
"""By the endings of files, in lower case."""


@dataclass(frozen=True, slots=True)
class Telling:
    """
    What one image tells of how it was made.

    Attributes:
        infotext: A1111's generation parameters.
        request: Of this image alone.
        provenance: What else identifies how it was made.
    """

    infotext: str
    request: Request
    provenance: Mapping[str, Any]

    def private(self, metadata: Metadata) -> str:
        """Return what Holdfast writes for itself, as JSON."""
        request = self.request
        fields = request.model_dump(mode="json") if metadata == "full" else public(request)
        return json.dumps({"request": fields, "seed": request.seed, **self.provenance})


def format_of(path: Path) -> Format:
    """
    Return the format that a file's ending means.

    Raises:
        InvalidRequest: It means none that can be written here.
    """
    form = FORMATS.get(path.suffix.lower())
    Image.init()
    if form is not None and form.name in Image.SAVE:
        return form
    endings = ", ".join(ending for ending, each in FORMATS.items() if each.name in Image.SAVE)
    msg = f"The image was to go to {path}, but that ending is none of {endings}: name one of them."
    raise InvalidRequest(msg)


def encode(
    image: Image.Image, form: Format, telling: Telling, metadata: Metadata, quality: int
) -> bytes:
    """
    Return an image as the content of a file.

    Args:
        image: RGB.
        form: One of `FORMATS`.
        telling: What it tells.
        metadata: How much of that.
        quality: 1 to 100, of lossy formats.

    Raises:
        InvalidRequest: The format has no room for the metadata, or an argument is out of range.
    """
    if metadata not in {"full", "public", "none"}:
        msg = f"The metadata was to be {metadata!r}; give 'full', 'public' or 'none'."
        raise InvalidRequest(msg)
    if not 1 <= quality <= 100:  # noqa: PLR2004 - percent
        msg = f"The quality was to be {quality!r}; give 1 to 100."
        raise InvalidRequest(msg)
    options: dict[str, Any] = {"quality": quality} if form.lossy else {}
    if metadata != "none":
        private = telling.private(metadata)
        if form.name == "PNG":
            options["pnginfo"] = _chunks(telling.infotext, private)
        else:
            options["exif"] = _exif(telling.infotext, private)
            if form.name == "JPEG" and len(options["exif"]) > _EXIF_MOST:
                msg = (
                    "The metadata has no room in a JPEG, which holds 64 KB: save it as PNG or "
                    "WebP, or with metadata='public' and a shorter prompt."
                )
                raise InvalidRequest(msg)
    buffer = io.BytesIO()
    image.save(buffer, form.name, **options)
    return buffer.getvalue()


def write_files(files: Mapping[Path, bytes]) -> None:
    """
    Write files so that each is there whole, or none is and what was there before still is.

    Raises:
        InvalidRequest: A folder does not exist, or a file cannot be written there.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            target = path.resolve()  # a link stays one
            if not target.parent.is_dir():
                msg = (
                    f"The image was to go to {path}, but there is no folder {path.parent}: make it."
                )
                raise InvalidRequest(msg)
            if target.exists() and not target.is_file():
                msg = f"The image was to go to {path}, but that is no file: name another."
                raise InvalidRequest(msg)
            with _explained(path):
                staged[target] = target.with_name(f".{uuid.uuid4().hex}.tmp")
                with staged[target].open("xb") as scratch:
                    scratch.write(content)
                    scratch.flush()
                    os.fsync(scratch.fileno())
        for target, scratch_file in staged.items():
            with _explained(target):
                scratch_file.replace(target)
    finally:
        for scratch_file in staged.values():
            scratch_file.unlink(missing_ok=True)


def read_private(image: Image.Image) -> dict[str, Any] | None:
    """Return what Holdfast wrote for itself into an image; None where there is nothing."""
    text = getattr(image, "text", {}).get(PRIVATE)
    if text is None:
        text = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
    try:
        told = json.loads(text) if text else None
    except ValueError:
        return None  # another program's
    return told if isinstance(told, dict) and "request" in told else None


def read_infotext(image: Image.Image) -> str | None:
    """Return what A1111 and its like write of a picture; None where there is nothing."""
    text = image.info.get(INFOTEXT)
    if isinstance(text, str):
        return text
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or comment[:8] not in _ENCODINGS:
        return comment if isinstance(comment, str) else None
    return comment[8:].decode(_ENCODINGS[comment[:8]], errors="replace")


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[Image.Image]:
    """
    Open a picture's file, to read what it tells.

    Raises:
        InvalidRequest: It is no image, or cannot be read; also where the block finds that.
    """
    try:
        with Image.open(locate(file)) as image:
            yield image
    except Exception as error:  # whatever a decoder raises
        msg = f"{file} cannot be read as an image ({type(error).__name__})."
        raise InvalidRequest(msg) from error


def request_from_image(file: str | Path, **given: Any) -> Request:
    """
    Read the request that made an image from its file, to make it again.

    Args:
        file: Written by `Result.save`.
        given: Fields in place of those in the file: ``image``, where the request began with a
            picture (only ``metadata="full"`` keeps it), and any other.

    Raises:
        InvalidRequest: The file tells of no request, or a picture is needed and is not given, or
            is another one.
    """
    with opened(file) as image:
        told = read_private(image)
    if told is None or not isinstance(told["request"], dict):
        msg = f"{file} does not tell how it was made: it is not Holdfast's, or has no metadata."
        raise InvalidRequest(msg)
    return request_from_fields(told["request"], given)


def _chunks(infotext: str, private: str) -> PngInfo:
    chunks = PngInfo()
    chunks.add_itxt(INFOTEXT, infotext)
    chunks.add_itxt(PRIVATE, private)
    return chunks


def _exif(infotext: str, private: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.UserComment: b"UNICODE\0" + infotext.encode("utf-16-be"),
        ExifTags.Base.MakerNote: private.encode(),
    }
    return exif.tobytes()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"The image was to go to {path}, but that cannot be written: {error.strerror}."
        raise InvalidRequest(msg) from error
