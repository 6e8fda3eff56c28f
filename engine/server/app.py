"""The application that ``holdfast serve`` runs: every door over one engine."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from holdfast.engine.server.access import OtherPages
from holdfast.engine.server.images import openai
from holdfast.engine.server.visits import AccessLog
from holdfast.engine.server.webui import sdapi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from holdfast.engine.server.access import Access
    from holdfast.engine.server.studio import Studio

_HERE = ("127.0.0.1", "localhost", "::1", "[::1]")


def application(
    studio: Studio,
    access: Access | None = None,
    *,
    origins: Sequence[str] = (),
    local: bool = True,
) -> FastAPI:
    """
    Return a server's application over a studio, which it closes at its end; the engine it does not.

    Args:
        studio: Serves the clients.
        access: Who may come in. None: everybody.
        origins: Web pages that may use it from a browser, such as ``"https://page.example"``;
            ``"*"`` for all.
        local: Answer only what was sent to this machine by its local names, so that no web page
            reaches it by a name of its own (DNS rebinding).
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        studio.close()

    app = FastAPI(title="Holdfast", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(sdapi(studio, access))
    for prefix in ("/v1", "/v3"):
        app.include_router(openai(studio, access, prefix))
    app.add_middleware(OtherPages, allowed=origins)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Holdfast-Otherwise"],
        )
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_HERE))
    app.add_middleware(AccessLog, engine=studio.engine)
    return app
