from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from fastapi import FastAPI, HTTPException

from holdfast.engine import CompileError, Engine
from holdfast.engine.server import Access, Studio, application, sdapi
from holdfast.engine.server import openai as images
from holdfast.engine.server.access import LARGEST_BODY, bounded
from holdfast.engine.server.answers import refusal_of

from .conftest import PATIENCE, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACCESS = Access(users={"ann": "paß:word"}, keys=("key-1",))
PAGE = "https://page.example"
DOORS = ("/sdapi/v1/options", "/v1/models", "/v3/models", "/internal/ping")


@pytest.fixture(scope="module")
def narrow(tiny_ir: Path, tiny_cache: Path) -> Iterator[Studio]:
    """A studio in whose queue one job may wait."""
    with Engine(tiny_ir, cache_dir=tiny_cache, queue_limit=1) as engine:
        studio = Studio(engine)
        yield studio
        studio.close()


@pytest.fixture(scope="module")
def guarded(narrow: Studio) -> Iterator[str]:
    """The address of a server that asks for credentials."""
    with running(application(narrow, ACCESS, origins=[PAGE])) as address:
        yield address


@pytest.mark.parametrize("door", DOORS)
def test_credentials_open_every_door(guarded: str, door: str) -> None:
    """A user or a key opens it; neither, a wrong one or half of one does not."""
    right = (httpx.BasicAuth("ann", "paß:word"), None)
    assert httpx.get(f"{guarded}{door}", auth=right[0], timeout=PATIENCE).status_code == 200
    key = {"authorization": "Bearer key-1"}
    assert httpx.get(f"{guarded}{door}", headers=key).status_code == 200
    for wrong in ("", "Basic", "Basic Og==", "Basic !!", "Bearer", "Bearer key-", "Digest x"):
        answer = httpx.get(f"{guarded}{door}", headers={"authorization": wrong})
        assert answer.status_code == 401, wrong
        assert "www-authenticate" in answer.headers


def test_an_open_door_minds_no_credentials(address: str) -> None:
    """Chats send empty credentials always; without any configured they are ignored."""
    for sent in ("Basic Og==", "Basic", "Bearer x"):
        answer = httpx.get(
            f"{address}/sdapi/v1/options", headers={"authorization": sent}, timeout=PATIENCE
        )
        assert answer.status_code == 200


def test_other_names_and_other_pages_stay_outside(guarded: str) -> None:
    """A name that points here is refused; of pages, those that were named alone may read."""
    assert httpx.get(f"{guarded}/v1/models", headers={"host": "evil.example"}).status_code == 400
    asks = {"access-control-request-method": "POST", "origin": PAGE}
    allowed = httpx.options(f"{guarded}/sdapi/v1/txt2img", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == PAGE
    other = httpx.options(f"{guarded}/sdapi/v1/txt2img", headers=asks | {"origin": "https://x.y"})
    assert "access-control-allow-origin" not in other.headers


def test_a_page_that_was_not_named_can_send_nothing(guarded: str) -> None:
    """A form needs no leave of CORS, and is refused all the same; the server's own page is not."""
    key = {"authorization": "Bearer key-1"}
    path = f"{guarded}/sdapi/v1/interrupt"
    for origin, status in ((PAGE, 200), (guarded, 200), ("https://x.y", 403), ("null", 403)):
        assert httpx.post(path, headers=key | {"origin": origin}).status_code == status


def test_a_strict_engine_does_nothing_otherwise(guarded: str) -> None:
    """What would be done nearly, and told, is refused where the host is strict."""
    key = {"authorization": "Bearer key-1"}
    for wish, words in (({"restore_faces": True}, "restore_faces"), ({"width": 70}, "70")):
        body = {"prompt": "x", "steps": 2, "width": 64, "height": 64, **wish}
        answer = httpx.post(f"{guarded}/sdapi/v1/txt2img", json=body, headers=key, timeout=PATIENCE)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]


def test_where_each_stops_its_own_nobody_stops_anothers(tiny_ir: Path, tiny_cache: Path) -> None:
    """With ``interrupts="own"``, a job is stopped by whoever asked for it, and by no other."""
    with Engine(tiny_ir, cache_dir=tiny_cache) as engine:
        studio = Studio(engine, interrupts="own")
        access = Access(keys=("ann", "bob"))
        with running(application(studio, access)) as address:
            path = f"{address}/sdapi/v1"
            ann, bob = ({"authorization": f"Bearer {name}"} for name in access.keys)
            body = {"prompt": "x", "steps": 500, "width": 64, "height": 64}
            stopped: list[bool] = []

            def ask() -> None:
                made = httpx.post(f"{path}/txt2img", json=body, headers=ann, timeout=PATIENCE)
                stopped.append(json.loads(made.json()["info"])["interrupted"])

            asker = threading.Thread(target=ask)
            asker.start()
            while not studio.jobs():
                pass
            (job,) = studio.jobs()
            assert httpx.post(f"{path}/interrupt", headers=bob).json() == {}
            assert job.status in {"queued", "running"}
            assert httpx.post(f"{path}/interrupt", headers=ann).json() == {}
            asker.join()
        assert stopped == [True]


def test_a_closed_engine_is_unavailable(tiny_ir: Path, tiny_cache: Path) -> None:
    """It is a 503 in both APIs, which OpenAI's client is told not to try again."""
    engine = Engine(tiny_ir, cache_dir=tiny_cache)
    with running(application(Studio(engine))) as address:
        engine.close()
        for path in ("sdapi/v1/txt2img", "v1/images/generations"):
            answer = httpx.post(f"{address}/{path}", json={"prompt": "x"}, timeout=PATIENCE)
            assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("/srv/models/x.bin"), CompileError("/srv/x", component="unet", key="k")],
)
def test_of_our_own_faults_nothing_is_told(error: Exception) -> None:
    """The client learns that it is not to blame; the log has the rest, without folders."""
    told = refusal_of(error, {})
    assert (told.status, told.param) == (500, None)
    assert "srv" not in told.words + told.logged
    assert type(error).__name__ not in told.words


def test_a_body_has_a_limit(guarded: str) -> None:
    """One that says that it is too much is refused before it is read."""
    host, port = guarded.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\n"
        head += f"Authorization: Bearer key-1\r\nContent-Length: {10**9}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4096)


def test_a_body_that_says_no_length_is_read_to_the_limit(guarded: str) -> None:
    """.NET's clients send such, also with GET; what goes too far is refused where it does."""
    key = {"authorization": "Bearer key-1", "content-type": "application/json"}
    for method, path in (("GET", "progress"), ("POST", "unload-checkpoint"), ("POST", "options")):
        answer = httpx.request(
            method, f"{guarded}/sdapi/v1/{path}", headers=key, content=iter([b"{", b"}"]),
            timeout=PATIENCE,
        )  # fmt: skip
        assert answer.status_code == 200, path

    async def endless() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1024**2, "more_body": True}

    sizes: list[int] = []

    async def read() -> None:
        receive = bounded(endless)
        while True:
            sizes.append(len((await receive())["body"]))

    with pytest.raises(HTTPException, match="413"):
        asyncio.run(read())
    assert sum(sizes) == LARGEST_BODY


def test_a_host_mounts_a_door_where_it_likes(narrow: Studio) -> None:
    """The routers need nothing else of an application to check and to answer as they do."""
    host = FastAPI()
    host.include_router(sdapi(narrow, ACCESS), prefix="/a1111")
    host.include_router(images(narrow, ACCESS, "/api/v1"))
    with (
        running(host) as address,
        openai.OpenAI(base_url=f"{address}/api/v1", api_key="key-1", timeout=PATIENCE) as client,
    ):
        assert client.images.generate(prompt="x", extra_body={"num_inference_steps": 1}).data
        ping = f"{address}/a1111/sdapi/v1/options"
        assert httpx.get(ping).status_code == 401
        assert httpx.get(ping, auth=("ann", "paß:word")).status_code == 200
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="x", size="big")  # type: ignore[call-overload]  # on purpose


def test_a_full_queue_asks_to_come_again(guarded: str, narrow: Studio) -> None:
    """It is a 429 with a time; OpenAI's client comes again by itself, and gets its image."""
    key = {"authorization": "Bearer key-1"}
    body = {"prompt": "x", "steps": 300, "width": 64, "height": 64}
    path = f"{guarded}/sdapi/v1/txt2img"

    def ask() -> int:
        return httpx.post(path, json=body, headers=key, timeout=PATIENCE).status_code

    codes: list[int] = []
    askers = [threading.Thread(target=lambda: codes.append(ask())) for _ in range(2)]
    for each in askers:
        before = len(narrow.jobs())
        each.start()
        while len(narrow.jobs()) == before or narrow.jobs()[0].position is not None:
            pass
    refused = httpx.post(path, json=body, headers=key, timeout=PATIENCE)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    for each in narrow.jobs():
        each.cancel()
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key="key-1", timeout=PATIENCE) as client:
        made = client.images.generate(prompt="x", extra_body={"num_inference_steps": 1})
    assert made.data
    for each in askers:
        each.join()
    assert codes == [200, 200]
