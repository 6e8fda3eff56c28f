"""One line in the log for each request that a server answered."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from holdfast.engine.engine import Engine
    from holdfast.engine.server.answers import Refusal

_WRONG, _OURS, _LEFT = 400, 500, 499
_LONGEST = 120


class AccessLog:
    """
    Tells an engine's log of each answer; for `add_middleware` of an application.

    Nothing that a client sent but the path, without its query, is told.

    Args:
        app: What answers.
        engine: Whose log it is.
    """

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, told = time.perf_counter(), _LEFT, False
        state: dict[str, Any] = scope.setdefault("state", {})

        def tell() -> None:
            nonlocal told
            told = True
            facts = {name: state[name] for name in ("request_id", "error") if name in state}
            self._engine.emit(
                "http.answered",
                level=_level(scope["method"], status),
                method=scope["method"],
                path=scope["path"][:_LONGEST],
                status=status,
                client_address=(scope.get("client") or ("",))[0],
                seconds=round(time.perf_counter() - began, 6),
                **facts,
            )

        async def pass_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                tell()  # before the client has it all, and may look
            await send(message)

        try:
            await self._app(scope, receive, pass_on)
        finally:
            if not told:
                status = _LEFT
                tell()


def note_request(http: Request, request_id: str) -> None:
    """Have the line of an HTTP request name the request of the engine that it became."""
    http.state.request_id = request_id


def note_refusal(http: Request, refusal: Refusal) -> None:
    """Have the line of an HTTP request tell why it was refused."""
    http.state.error = refusal.logged


def _level(method: str, status: int) -> str:
    """Clients ask for the progress several times a second: what only looks is of less weight."""
    if status >= _OURS:
        return "error"
    if status >= _WRONG:
        return "warning"
    return "info" if method == "POST" else "debug"
