"""
Pictures on their way in: read, set upright, brought to 8 bits and copied when a request is made.

What a request holds after that is RGB, or RGBA where something may be transparent, and nobody
else's: the host may close or repaint what it gave.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image, ImageOps
from pydantic import BeforeValidator, PlainSerializer

from holdfast.engine.requests.values import Reading, locate, reading

if TYPE_CHECKING:
    from pathlib import Path

_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[^,;]*)*;base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")
_WHITE_8, _WHITE_16 = 255, 65535
_TEXT = 80
"""Most characters of a decoder's words in an error."""

_SCANS = 100
"""Most scans of a JPEG by value: each costs time for the whole picture, and a few bytes."""


def read_picture(value: object) -> Image.Image:
    """
    Return a picture of a request's own.

    Args:
        value: A PIL image, the path of an image file, or a data URL; where no file may be named
            (`Reading`), base64 alone too.

    Returns:
        RGB or RGBA, 8 bits, upright as its EXIF tag says, without anything else from its file.
        Grey of 16 bits keeps its range. Grey of 32 bits and floats have no range of their own:
        0 to 1 (floats), 0 to 255 or 0 to 65535 is taken by the highest value there is.

    Raises:
        ValueError: It is no picture, is too large or cannot be read; the text says which.
    """
    if isinstance(value, Image.Image):
        return _taken(value, reading())
    source = _source(value, reading())
    try:
        opened = Image.open(source, formats=reading().formats)
    except Exception as error:
        raise ValueError(_unreadable(error)) from error
    with opened:
        return _taken(opened, reading())


def read_mask(value: object) -> Image.Image:
    """
    Return a mask of a request's own: grey (L), where white is what it selects.

    Args:
        value: What `read_picture` takes. What is transparent in it selects nothing.

    Raises:
        ValueError: As `read_picture`.
    """
    if isinstance(value, Image.Image) and value.mode == "1":
        value = value.convert("L")
    picture = read_picture(value)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("L")


def write_picture(image: Image.Image) -> str:
    """Return a picture as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_digest(image: Image.Image) -> str:
    """Return 16 hexadecimal digits that tell a request's picture from others."""
    whole = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=8)
    whole.update(image.tobytes())
    return whole.hexdigest()


Picture = Annotated[
    Image.Image,
    BeforeValidator(read_picture, json_schema_input_type=str),
    PlainSerializer(write_picture, return_type=str),
]
"""A PIL image as `read_picture` makes it."""

Mask = Annotated[
    Image.Image,
    BeforeValidator(read_mask, json_schema_input_type=str),
    PlainSerializer(write_picture, return_type=str),
]
"""A PIL image as `read_mask` makes it."""


def several(value: object) -> Sequence[object]:
    """Take one value of several for a sequence of one."""
    return value if isinstance(value, (list, tuple)) else (value,)


Pictures = Annotated[
    tuple[Picture, ...],
    BeforeValidator(several, json_schema_input_type=Picture | Sequence[Picture]),
]
"""One picture, or several."""


def _source(value: object, how: Reading) -> Path | io.BytesIO:
    """Return what Pillow opens: a file that is one, or bytes."""
    if isinstance(value, str) and (url := _DATA_URL.match(value)):
        return _decoded(value[url.end() :], how)
    if not how.files:
        if isinstance(value, str) and _BASE64.fullmatch(value):
            return _decoded(value, how)
        msg = (
            "a picture stands in JSON by value, as a data URL or in base64; give the path of a "
            "file to the request itself"
        )
        raise ValueError(msg)
    if isinstance(value, str) and value.startswith("data:"):
        msg = "a data URL of a picture begins with 'data:image/png;base64,' or the like"
        raise ValueError(msg)
    jpeg = isinstance(value, str) and value.startswith("/9j/")  # which looks like a path
    if isinstance(value, str) and _BASE64.fullmatch(value) and (jpeg or not value.startswith("/")):
        msg = "this is base64: put 'data:image/png;base64,' before it"
        raise ValueError(msg)
    if value is None or isinstance(value, (bytes, bytearray)):
        msg = f"a PIL image or the path of an image file is needed, not {type(value).__name__}"
        raise ValueError(msg)
    return _file(locate(value))


def _file(path: Path) -> Path:
    try:
        regular, exists = path.is_file(), path.exists()
    except OSError as error:
        raise ValueError(_unreadable(error)) from error
    if not exists:
        msg = "there is no such image file; check the path"
        raise ValueError(msg)
    if not regular:  # a pipe would wait for somebody who writes
        msg = "this is no file of an image but a folder, a device or a pipe"
        raise ValueError(msg)
    return path


def _decoded(text: str, how: Reading) -> io.BytesIO:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        msg = "this is no valid base64: it is cut off, or holds other characters"
        raise ValueError(msg) from error
    if how.pixels is not None and data.count(b"\xff\xda") > _SCANS and data[:2] == b"\xff\xd8":
        msg = f"this JPEG has more than {_SCANS} scans; save it anew"
        raise ValueError(msg)
    return io.BytesIO(data)


def _taken(image: Image.Image, how: Reading) -> Image.Image:
    width, height = image.size
    if not width * height:
        msg = f"the picture has no pixels ({width}x{height})"
        raise ValueError(msg)
    if how.pixels is not None and width * height > how.pixels:
        msg = f"the picture is {width}x{height}; {how.pixels} pixels are allowed: make it smaller"
        raise ValueError(msg)
    try:
        image.load()
        flat = _in_8_bits(_upright(image))
    except _NoRangeError:
        raise
    except Exception as error:
        raise ValueError(_unreadable(error)) from error
    return Image.frombytes(flat.mode, flat.size, flat.tobytes())


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - a broken EXIF block names no turn, and the pixels are whole
        return image


class _NoRangeError(ValueError):
    """Numbers of which nobody can say which of them is white."""


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return a loaded image as RGB, or as RGBA where it may be transparent."""
    if image.mode.startswith("I;16"):
        return _grey(image, _WHITE_16).convert("RGB")
    if image.mode in {"I", "F"}:
        return _grey(image, _white(image)).convert("RGB")
    transparent = image.has_transparency_data or image.mode in {"PA", "La", "RGBa"}
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA" if transparent else "RGB")


def _white(image: Image.Image) -> int:
    """Return the value that is white in a grey image whose mode does not say it."""
    import numpy as np

    values: Any = np.asarray(image)
    lowest, highest = float(values.min()), float(values.max())
    for white in (1, _WHITE_8, _WHITE_16):
        if lowest >= 0 and highest <= white and (white > 1 or image.mode == "F"):
            return white
    msg = (
        f"the picture has values from {lowest:g} to {highest:g}, and nothing says which of them is "
        "white: scale it to 0 to 255 and convert it to 'L'"
    )
    raise _NoRangeError(msg)


def _grey(image: Image.Image, white: int) -> Image.Image:
    import numpy as np

    levels = np.asarray(image, dtype=np.float64) * (_WHITE_8 / white)
    return Image.fromarray(levels.round().clip(0, _WHITE_8).astype(np.uint8))


def _unreadable(error: Exception) -> str:
    """Say that Pillow cannot read something, in a few of its words: some quote the whole input."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (
        "this is not an image that Pillow can read: it is cut off, closed, too large or none "
        f"({type(error).__name__}: {str(said)[:_TEXT]})"
    )
