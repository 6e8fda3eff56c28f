"""Requests describe themselves to web frameworks: JSON schemas, and faults as they report them."""

from __future__ import annotations

from typing import Annotated, get_args

import pytest
from fastapi import Body, FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from holdfast.engine import EngineConfig, Lora, Request
from holdfast.engine.requests.pictures import write_picture

KINDS = (*get_args(Request), EngineConfig, Lora)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_everything_that_may_be_given_has_a_schema(kind: type[EngineConfig], mode: str):
    """Each kind of request, and the settings, have a JSON schema with all their fields."""
    assert set(kind.model_json_schema(mode=mode)["properties"]) == set(kind.model_fields)


@pytest.mark.parametrize("kind", get_args(Request), ids=lambda kind: kind.__name__)
def test_a_web_service_can_take_it(kind: type[EngineConfig]):
    """FastAPI documents a service that takes it, reads one, and answers 422 for a bad one."""
    service = FastAPI()

    async def draw(request: object) -> str:
        return request.prompt  # type: ignore[attr-defined]

    draw.__annotations__["request"] = Annotated[kind, Body()]
    service.post("/draw")(draw)
    client = TestClient(service)
    page = client.get("/openapi.json")
    assert page.status_code == 200
    assert kind.__name__ in page.json()["components"]["schemas"]
    needed = {name: each for name, each in NEEDED.items() if name in kind.model_fields}
    assert client.post("/draw", json={"prompt": "a dog", **needed}).json() == "a dog"
    assert client.post("/draw", json={"prompt": "a dog", "steps": 0, **needed}).status_code == 422


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ"
    "/pLvAAAAAElFTkSuQmCC"
)
"""A PNG of one red pixel."""

WHITE = write_picture(Image.new("L", (1, 1), 255))
NEEDED = {"image": PIXEL, "mask": WHITE, "boxes": [[0, 0, 1, 1]]}
