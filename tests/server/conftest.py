"""A real server on a free port, over one engine on the tiny model, for all tests of this folder."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from holdfast.engine import Engine
from holdfast.engine.server import Studio, application

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fastapi import FastAPI

PATIENCE = 300.0


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port of this machine, and give its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def engine(
    tiny_ir: Path, tiny_cache: Path, ink: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """An engine as `holdfast serve` opens one."""
    log = tmp_path_factory.mktemp("served") / "log.jsonl"
    with Engine(
        tiny_ir, cache_dir=tiny_cache, strict=False, lora_dir=ink.parent, log_file=log
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def studio(engine: Engine) -> Iterator[Studio]:
    studio = Studio(engine, aliases={"in ink": "<lora:ink:0.8>"})
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    """Where the server listens."""
    with running(application(studio)) as address:
        yield address


@pytest.fixture
def post(address: str) -> Callable[..., httpx.Response]:
    """Sends JSON to a path."""

    def send(path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{address}{path}", json=body, timeout=PATIENCE, **options)

    return send
