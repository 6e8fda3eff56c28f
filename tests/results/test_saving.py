"""Images as bytes and as files, what they tell, and reading it back."""

from __future__ import annotations

import io
import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from holdfast.engine import (
    Hires,
    Img2Img,
    InvalidRequest,
    Lora,
    Request,
    Result,
    Txt2Img,
    request_from_image,
)
from holdfast.engine.results.saving import read_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from holdfast.engine import Engine

    Open = Callable[..., Engine]

INFOTEXT = "a größe 😀\nNegative prompt: bad\nSteps: 1, Seed: 3"
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".AVIF": "AVIF"}
FORMATS = sorted(set(ENDINGS.values()))


def noise(seed: int = 0, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def made(request: Request | None = None, images: int = 1, side: int = 64) -> Result:
    request = request or Txt2Img(prompt="a größe 😀", batch=images)
    return Result(
        images=tuple(noise(index, side) for index in range(images)),
        first_pass=(),
        seeds=tuple(range(3, 3 + images)),
        request=request,
        timings={},
        degradations=(),
        infotexts=(INFOTEXT,) * images,
        provenance={"model": "m", "loras": []},
    )


def comment(image: Image.Image) -> str:
    """Read infotext as A1111 does."""
    if "parameters" in image.info:
        return str(image.info["parameters"])
    raw = image.getexif().get_ifd(0x8769)[0x9286]
    assert raw.startswith(b"UNICODE\0")
    return str(raw[8:].decode("utf-16-be"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_is_meant(tmp_path: Path, ending: str) -> None:
    """Each ending gives its format, with infotext for others and the request for Holdfast."""
    [file] = made().save(tmp_path / f"x{ending}")
    with Image.open(file) as image:
        assert image.format == ENDINGS[ending]
        assert comment(image) == INFOTEXT
    assert request_from_image(file) == Txt2Img(prompt="a größe 😀", seed=3)


@pytest.mark.parametrize("name", ["x", "x.gif", "x.tiff", ".png"])
def test_an_ending_that_means_nothing_is_refused(tmp_path: Path, name: str) -> None:
    """The error names the endings there are, and nothing is written."""
    with pytest.raises(InvalidRequest, match=r"none of \.png, \.jpg"):
        made().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_bytes_in_memory_are_what_a_file_holds(tmp_path: Path) -> None:
    """A host gets each image of a batch as bytes, and an open file takes a single one."""
    result = made(images=2)
    files = result.save(tmp_path / "x.png")
    assert [file.name for file in files] == ["x.png", "x-2.png"]
    assert [file.read_bytes() for file in files] == [result.png(0), result.png(1)]
    with Image.open(io.BytesIO(result.png(1))) as image:
        assert image.tobytes() == result.images[1].tobytes()
    for encoded, form in ((result.jpeg(), "JPEG"), (result.webp(), "WEBP")):
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.format == form
    assert len(result.jpeg(quality=20)) < len(result.jpeg(quality=90))
    stream = io.BytesIO()
    assert made().save(stream) == ()
    assert stream.getvalue() == made().png()
    with pytest.raises(InvalidRequest, match="2 images do not go into one file"):
        result.save(io.BytesIO())
    with pytest.raises(InvalidRequest, match="a file open for bytes is needed, not int"):
        result.save(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_a_picture_gives_nothing_away(tmp_path: Path, form: str) -> None:
    """By default neither the picture it began with nor a path; on demand all, or nothing."""
    secret = tmp_path / "users" / "alice"
    began = Img2Img(image=noise(7, 96), width=64)
    styled = Hires(hires_lora=(Lora(secret / "ink.safetensors", 0.5),))
    for request in (began, styled):
        file = tmp_path / f"x.{form}"
        made(request).save(file)
        with Image.open(file) as image:
            private = read_private(image)
        assert private is not None
        assert "alice" not in str(private)
        assert "data:" not in str(private)
        assert file.stat().st_size < 30_000
        made(request).save(file, metadata="none")
        with Image.open(file) as image:
            assert read_private(image) is None
            assert not image.info.get("parameters")
            assert not image.getexif()
    made(began).save(tmp_path / "full.png", metadata="full")
    assert request_from_image(tmp_path / "full.png") == began.but(seed=3)
    made(styled).save(tmp_path / "full.png", metadata="full")
    assert request_from_image(tmp_path / "full.png") == styled.but(seed=3)


def test_a_picture_that_is_needed_again_is_asked_for(tmp_path: Path) -> None:
    """A request that began with a picture is made again with that picture, and with no other."""
    began = noise(7, 96)
    [file] = made(Img2Img(image=began, strength=0.4)).save(tmp_path / "x.png")
    began.save(tmp_path / "began.png")
    with pytest.raises(InvalidRequest, match="began with a picture of 96x96, which is not in"):
        request_from_image(file)
    with pytest.raises(InvalidRequest, match="is another picture"):
        request_from_image(file, image=noise(8, 96))
    again = request_from_image(file, image=tmp_path / "began.png")
    assert again == Img2Img(image=began, strength=0.4, seed=3)


@pytest.mark.parametrize("what", ["missing", "text", "foreign"])
def test_a_file_that_tells_nothing_is_refused(tmp_path: Path, what: str) -> None:
    """What is no image, or none of Holdfast's, is told."""
    file = tmp_path / "x.png"
    if what == "text":
        file.write_text("hello")
    if what == "foreign":
        noise().save(file)
    with pytest.raises(InvalidRequest, match=r"cannot be read as an image|does not tell"):
        request_from_image(file)


def test_metadata_that_has_no_room_is_refused() -> None:
    """A JPEG holds 64 KB of metadata; the error names the formats that hold more."""
    with pytest.raises(InvalidRequest, match="no room in a JPEG"):
        made(Img2Img(image=noise(7, 300))).jpeg(metadata="full")
    assert made(Img2Img(image=noise(7, 300))).webp(metadata="full")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"metadata": "all"}, "'full', 'public' or 'none'"), ({"quality": 0}, "1 to 100")],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    """An option out of its range is told, and nothing is written."""
    with pytest.raises(InvalidRequest, match=says):
        made().save(tmp_path / "x.jpg", **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Without room for the second image, both older files are whole and no other is left."""
    made(images=2).save(tmp_path / "x.png")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    later = replace(made(images=2), images=(noise(5, 16), noise(6, 128)))
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(InvalidRequest, match="cannot be written: File too large"):
            later.save(tmp_path / "x.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    """A missing folder, an unknown home, a folder in the file's place; a link stays a link."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "real.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    for target, says in (
        (tmp_path / "no" / "x.png", "there is no folder"),
        (tmp_path / "folder.png", "that is no file"),
        ("~nosuchuser/x.png", "~nosuchuser"),
        ("a\0.png", "null byte"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            made().save(target)
    made().save(tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == made().png()


def test_a_notebook_shows_the_images() -> None:
    """All images of a batch stand side by side."""
    with Image.open(io.BytesIO(made(images=3)._repr_png_())) as shown:
        assert shown.size == (192, 64)


@pytest.mark.parametrize("hires_seed", [None, 100])
def test_each_image_of_a_batch_is_made_again(
    open_engine: Open, tmp_path: Path, hires_seed: int | None
) -> None:
    """From the result as from its file, to the bit, also where the second pass has its own seed."""
    engine = open_engine()
    request = Hires(
        prompt="a red circle", width=64, height=64, steps=1, scale=1, seed=3, batch=2,
        hires_seed=hires_seed,
    )  # fmt: skip
    batch = engine.run(request)
    assert batch.hires_seeds == ((3, 4) if hires_seed is None else (100, 100))
    files = batch.save(tmp_path / "x.png")
    assert request_from_image(files[1]) == batch.request_of(1)
    again = engine.run(request_from_image(files[1]))
    assert again.images[0].tobytes() == batch.images[1].tobytes()
    assert again.first_pass[0].tobytes() == batch.first_pass[1].tobytes()
