"""Requests of strangers: what they may bring along, and how much they may cost."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from PIL import Image

from holdfast.engine import (
    Bounds,
    Hires,
    Img2Img,
    InvalidRequest,
    Txt2Img,
    request_from_untrusted_json,
)
from tests.requests.test_pictures import bomb, encoded, three_colours

ORDINARY = (
    Txt2Img(prompt="a red circle", width=1024, height=1024, steps=50, seed=3),
    Txt2Img(),
    Img2Img(image=three_colours(), strength=0.1),
    Hires(prompt="a red circle", scale=2),
    Hires(width=512, height=768, scale=2, hires_steps=20, batch=4),
)


@pytest.mark.parametrize("request_", ORDINARY, ids=lambda each: each.kind)
def test_ordinary_requests_are_taken(request_: Any) -> None:
    """What a person asks for is the same request as in the host's own code."""
    assert request_from_untrusted_json(request_.to_json()) == request_


def url(image: Image.Image, form: str) -> str:
    return f"data:image/{form.lower()};base64,{encoded(image, form)}"


def scans() -> str:
    """A JPEG that goes over its whole picture again and again, in a few bytes each time."""
    import base64

    head, marker, data = base64.b64decode(encoded(three_colours(), "JPEG")).partition(b"\xff\xda")
    whole = head + (marker + data[:-2]) * 200 + data[-2:]
    return "data:image/jpeg;base64," + base64.b64encode(whole).decode()


def as_url(data: bytes) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(data).decode()


PICTURES = {
    "a path": ("/etc/passwd", "by value"),
    "a relative path": ("photo.png", "by value"),
    "a home": ("~/photo.png", "by value"),
    "a GIF": (url(three_colours(), "GIF"), "not an image"),
    "a TIFF": (url(three_colours(), "TIFF"), "not an image"),
    "25 megapixels": (url(Image.new("1", (5000, 5000)), "PNG"), "16777216 pixels are allowed"),
    "a header alone": (as_url(bomb(16_000, 1000)), "cut off"),
    "a bomb": (as_url(bomb(20_000, 20_000)), "too large"),
    "scans": (scans(), "more than 100 scans"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures_are_bounded_and_by_value(case: str) -> None:
    """No path, PNG, JPEG and WebP alone, of bounded pixels: refused shortly and at once."""
    value, says = PICTURES[case]
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=says) as refused:
        request_from_untrusted_json(json.dumps({"kind": "img2img", "image": value}))
    assert len(str(refused.value)) < 500
    assert time.process_time() - began < 10


BOX: dict[str, Any] = {"boxes": [[0, 0, 9, 9]]}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "an endless schedule": ({"kind": "hires", "strength": 1e-6}, "schedule .* 1000 steps"),
    "many pixels": ({"kind": "txt2img", "width": 4096, "height": 4096}, "4194304 pixels"),
    "many pixels later": ({"kind": "hires", "width": 512, "height": 512, "scale": 8}, "pixels"),
    "a size left open": ({"kind": "hires", "scale": 8}, "pixels"),
    "many images": ({"kind": "txt2img", "batch": 64, "steps": 50}, "in all"),
    "many steps": ({"kind": "txt2img", "steps": 1000}, "in all"),
    "a long prompt": ({"kind": "txt2img", "prompt": "x" * 20_000}, "10000 characters"),
    "a long hires prompt": ({"kind": "hires", "hires_prompt": "x" * 20_000}, "10000 characters"),
    "a LoRA": ({"kind": "hires", "hires_lora": [{"path": "/etc/hostname"}]}, "may not name LoRA"),
    "a model": ({"kind": "hires", "hires_model": "/etc"}, "may not name .* models"),
    "a LoRA of a detail": (
        {"kind": "txt2img", "detail": {**BOX, "lora": [{"path": "/etc/hostname"}]}},
        "may not name LoRA",
    ),
    "a long prompt of a detail": (
        {"kind": "txt2img", "detail": [{**BOX, "prompt": "x" * 20_000}]},
        "10000 characters",
    ),
    "many regions": (
        {"kind": "txt2img", "detail": {"boxes": BOX["boxes"] * 99}},
        "in all",
    ),
    "a wide margin": (
        {"kind": "inpaint", "image": url(three_colours(), "PNG"), "outpaint": 4096},
        "pixels",
    ),
    "half a character": ({"kind": "txt2img", "prompt": "\ud83d"}, "half of a character"),
    "a huge seed": ({"kind": "txt2img", "seed": 10**4000}, "less than"),
    "no kind": ({"prompt": "x"}, "kind"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_what_a_request_costs_is_bounded(case: str) -> None:
    """Cost is looked at over all passes, and not each field's range alone."""
    fields, says = FIELDS[case]
    with pytest.raises(InvalidRequest, match=says) as refused:
        request_from_untrusted_json(json.dumps(fields))
    assert len(str(refused.value)) < 500


def test_a_host_sets_its_own_bounds() -> None:
    """Bounds are settings, and the text itself has one."""
    text = Txt2Img(width=512, height=512).to_json()
    assert request_from_untrusted_json(text, Bounds(pixels=512 * 512))
    with pytest.raises(InvalidRequest, match="An image may have 1000 pixels, but this has 262144"):
        request_from_untrusted_json(text, Bounds(pixels=1000))
    with pytest.raises(InvalidRequest, match="JSON may have 10 characters"):
        request_from_untrusted_json(text.encode(), Bounds(text=10))
    for text in (None, 3, b"\xff", "[]", "[" * 100_000):  # type: ignore[assignment]
        with pytest.raises(InvalidRequest, match="cannot be read"):
            request_from_untrusted_json(text)
