"""Pictures on their way in: every mode and form, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import threading
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from holdfast.engine import Img2Img, InvalidRequest, request_from_json
from holdfast.engine.passes.images import as_rgb

if TYPE_CHECKING:
    from pathlib import Path

TURNED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def three_colours() -> Image.Image:
    """Flat areas, so that every turn, mirror and loss of colour shows."""
    pixels = np.empty((64, 96, 3), np.uint8)
    pixels[:32], pixels[32:], pixels[:, :8] = (220, 40, 40), (40, 80, 220), (40, 170, 60)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose data is short."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def lab(image: Image.Image) -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    changed = ImageCms.applyTransform(
        image, ImageCms.buildTransform(*profiles, inMode="RGB", outMode="LAB")
    )
    assert changed is not None
    return changed


MODES = {
    **{
        mode: lambda mode=mode: three_colours().convert(mode)
        for mode in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA")
    },
    "LAB": lambda: lab(three_colours()),
    "RGBa": lambda: three_colours().convert("RGBA").convert("RGBa"),
    "La": lambda: three_colours().convert("LA").convert("La"),
    "I;16": lambda: Image.fromarray(np.full((64, 96), 30_000, np.uint16)),
    "I": lambda: Image.fromarray(np.full((64, 96), 30_000, np.int32)),
    "F": lambda: Image.fromarray(np.full((64, 96), 99.0, np.float32)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_taken_and_written(mode: str) -> None:
    """A picture of any mode becomes 8 bits, and is the same request after JSON."""
    request = Img2Img(image=MODES[mode]())
    assert request.image.mode in {"RGB", "RGBA"}
    again = request_from_json(request.to_json())
    assert again == request
    assert hash(again) == hash(request)
    if mode in {"RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "RGBa"}:
        off = np.abs(np.asarray(as_rgb(request.image), int) - np.asarray(three_colours(), int))
        assert off.max() <= 12


RAMP = np.tile(np.arange(64, dtype=np.float64) * 4, (64, 1))
DEEP = {
    "floats from 0 to 1": (RAMP / 255).astype(np.float32),
    "floats from 0 to 255": RAMP.astype(np.float32),
    "32 bits from 0 to 255": RAMP.astype(np.int32),
    "32 bits from 0 to 65535": (RAMP * 257).astype(np.int32),
    "16 bits": (RAMP * 257).astype(np.uint16),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_greys_keep_their_range(kind: str) -> None:
    """White is white and the rest in proportion, whatever number stands for it."""
    seen = np.asarray(as_rgb(Img2Img(image=Image.fromarray(DEEP[kind])).image))[..., 0]
    assert np.abs(seen - RAMP).max() <= 1


@pytest.mark.parametrize(
    "values",
    [np.full((8, 8), -1, np.int32), np.full((8, 8), 2**20, np.int32), np.full((8, 8), np.nan)],
    ids=["negative", "over 16 bits", "NaN"],
)
def test_greys_without_a_range_are_refused(values: np.ndarray[Any, Any]) -> None:
    """Where nothing says what white is, the error says how to say it."""
    image = Image.fromarray(values.astype(np.float32) if values.dtype == float else values)
    with pytest.raises(InvalidRequest, match="nothing says which of them is white"):
        Img2Img(image=image)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", TURNED)
def test_a_photograph_stands_upright_also_after_json(tmp_path: Path, form: str, tag: int) -> None:
    """The EXIF tag is heeded once, when the request is made."""
    file = tmp_path / f"turned.{form.lower()}"
    exif = Image.Exif()
    exif[0x0112] = tag
    three_colours().transpose(TURNED[tag]).save(file, form, exif=exif)
    request = Img2Img(image=file)
    assert request.image.size == (96, 64)
    assert np.abs(np.asarray(request.image, int) - np.asarray(three_colours(), int)).mean() < 4
    assert request_from_json(request.to_json()) == request


def test_a_picture_is_copied_when_it_is_taken(tmp_path: Path) -> None:
    """What the host does to its image or file afterwards changes no request."""
    file = tmp_path / "photo.png"
    three_colours().save(file)
    with Image.open(file) as lazy:
        from_block = Img2Img(image=lazy)
    with file.open("rb") as stream:
        from_stream = Img2Img(image=Image.open(stream))
    given = three_colours()
    given.info["exif"] = b"broken"
    from_memory = Img2Img(image=given)
    given.paste("black", (0, 0, 96, 64))
    file.unlink()
    assert from_block == from_stream == from_memory
    assert from_memory.image.info == {}
    assert len({from_block, from_stream, from_memory}) == 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_data_urls_of_every_type_are_taken(form: str) -> None:
    """Parameters and line breaks do not matter; JSON takes base64 alone as well."""
    text = encoded(three_colours(), form)
    broken = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    urls = (
        f"data:image/{form.lower()};base64,{text}",
        f"data:image/{form.lower()};charset=utf-8;base64,{text}",
        f"data:image/{form.lower()};base64,{broken}",
    )
    requests = {Img2Img(image=url) for url in urls}
    for value in (*urls, text, broken):
        requests.add(request_from_json(json.dumps({"kind": "img2img", "image": value})))  # type: ignore[arg-type]
    assert len(requests) == 1


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def cut(folder: Path) -> Path:
    whole = base64.b64decode(encoded(three_colours(), "JPEG"))
    (folder / "cut.jpg").write_bytes(whole[:-40])
    return folder / "cut.jpg"


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
REFUSED: dict[str, tuple[Any, str]] = {
    "no such file": (lambda f: f / "none.png", "there is no such image file"),
    "a folder": (lambda f: f, "this is no file of an image but a folder"),
    "a pipe": (pipe, "or a pipe"),
    "text": (lambda f: written(f, "a.png", b"hello"), "not an image that Pillow can read"),
    "cut off": (cut, "cut off"),
    "cut off, opened": (lambda f: Image.open(io.BytesIO(cut(f).read_bytes())), "cut off"),
    "400 megapixels": (lambda f: written(f, "b.png", bomb(20_000, 20_000)), "too large"),
    "no pixels": (lambda _: Image.new("RGB", (0, 0)), r"no pixels \(0x0\)"),
    "unknown user": (lambda _: "~nosuchuser/x.png", "~nosuchuser"),
    "null byte": (lambda _: "a\0.png", "null byte"),
    "a long name": (lambda _: "x" * 5000 + ".png", "not an image"),
    "bare base64": (lambda _: encoded(three_colours(), "PNG"), "put 'data:image/png;base64,'"),
    "long base64": (lambda _: encoded(Image.fromarray(NOISE), "PNG"), "put 'data:image"),
    "a JPEG as bare base64": (lambda _: encoded(three_colours(), "JPEG"), "put 'data:image"),
    "bad base64": (lambda _: "data:image/png;base64,iVBORw0=!", "no valid base64"),
    "other data URL": (lambda _: "data:text/plain,hello", "a data URL of a picture"),
    "bytes": (lambda _: b"\x89PNG", "not bytes"),
    "None": (lambda _: None, "not NoneType"),
    "an array": (lambda _: NOISE, "not ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused_shortly(tmp_path: Path, case: str) -> None:
    """The error is Holdfast's own, says what is wrong, and does not quote what was given."""
    given, says = REFUSED[case]
    value, errors = given(tmp_path), []

    def make() -> None:
        try:
            Img2Img(image=value)
        except InvalidRequest as error:
            errors.append(str(error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(60)
    assert len(errors) == 1
    assert re.search(says, errors[0])
    assert len(errors[0]) < 500


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/nothere", "photo.png", 3, None, {"a": 1}])
def test_json_opens_no_file(path: object) -> None:
    """A path in JSON is refused in the same words whether there is such a file or not."""
    with pytest.raises(InvalidRequest, match="a picture stands in JSON by value"):
        request_from_json(json.dumps({"kind": "img2img", "image": path}))
    with pytest.raises(InvalidRequest, match="a picture stands in JSON by value"):
        Img2Img.from_json(json.dumps({"image": path}))


def test_a_request_of_no_kind_is_refused() -> None:
    """The error names the kinds there are, and no class of Holdfast's own."""
    for kind in ("img3img", None, [], {"a": 1}):
        with pytest.raises(
            InvalidRequest, match="give one of txt2img, img2img, inpaint, hires"
        ) as refused:
            request_from_json(json.dumps({"kind": kind}))
        assert "_" not in str(refused.value)
