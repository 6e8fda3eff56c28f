"""Who may come in, and how large what they bring may be."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from holdfast.engine.requests.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from fastapi import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 64 * 1024**2
"""Bytes of a request's body."""

_TOO_LARGE = f"A body may have {LARGEST_BODY} bytes."


class Access(Value):
    """
    The credentials that open every door of a server; without any, all may come in.

    Attributes:
        users: Passwords by names, for HTTP basic.
        keys: For ``Authorization: Bearer``.
    """

    users: Mapping[str, str] = {}
    keys: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked for credentials."""
        return not self.users and not self.keys

    def allows(self, authorization: str) -> bool:
        """Whether the value of an ``Authorization`` header opens the doors."""
        if self.is_open:  # clients send empty credentials where none are asked for
            return True
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return _is_one_of(given.strip(), self.keys)
        if scheme.lower() != "basic":
            return False
        try:
            pair = base64.b64decode(given, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return False
        return _is_one_of(pair, [f"{name}:{word}" for name, word in self.users.items()])

    def admit(self, request: Request) -> Request:
        """
        Return a request that may come in, whose body can be read as far as it may go.

        Raises:
            HTTPException: 401; or 413 for a body of too much, before it is read where it says so.
        """
        if not self.allows(request.headers.get("authorization", "")):
            raise HTTPException(401, "Not authenticated", {"WWW-Authenticate": "Basic"})
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return Request(request.scope, bounded(request.receive))


def door(
    access: Access | None, refused: Callable[[Request, Exception], Response]
) -> type[APIRoute]:
    """
    Return the class of a router's routes, which lets in whom it may and answers every error.

    Args:
        access: Who may come in. None: everybody.
        refused: Answers an error in its clients' words.
    """
    entry = access or Access()

    class Door(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def answer(request: Request) -> Response:
                try:
                    # FastAPI reads the body before it asks dependencies.
                    return await handle(entry.admit(request))
                except Exception as error:  # noqa: BLE001 - whatever it is, its text stays here
                    return refused(request, error)

            return answer

    return Door


def bounded(receive: Receive) -> Receive:
    """Return what receives a body as `receive` does, and raises a 413 where it goes too far."""
    so_far = 0

    async def receive_within() -> Message:
        nonlocal so_far
        message = await receive()
        so_far += len(message.get("body", b""))
        if so_far > LARGEST_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return receive_within


class OtherPages:
    """
    Refuses what web pages send that were not named: a form needs no leave of CORS.

    Args:
        app: What answers all else.
        allowed: Origins of pages; ``"*"`` for all. A page of the server's own address may always.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == headers.get("host")
        if own or not self._allowed.isdisjoint({origin, "*"}):
            await self._app(scope, receive, send)
            return
        words = "This page was not given leave to use the server: see --cors."
        await JSONResponse({"detail": words}, 403)(scope, receive, send)


def _is_one_of(given: str, known: tuple[str, ...] | list[str]) -> bool:
    """Compare with all, in a time that tells nothing of them."""
    return any([secrets.compare_digest(given.encode(), each.encode()) for each in known])  # noqa: C419 - each is compared
