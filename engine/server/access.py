"""Who may come in, and how large what they bring may be."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping

from fastapi import HTTPException, Request

from holdfast.engine.requests.values import Value

LARGEST_BODY = 64 * 1024**2
"""Bytes of a request's body."""


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

    def check(self, request: Request) -> None:
        """
        Refuse a request that may not come in, before its body is read.

        Raises:
            HTTPException: 401, or 411 and 413 for a body without a length or of too much.
        """
        if not self.allows(request.headers.get("authorization", "")):
            raise HTTPException(401, "Not authenticated", {"WWW-Authenticate": "Basic"})
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            raise HTTPException(411, "Say the length of the body: Content-Length.")
        if int(length) > LARGEST_BODY:
            raise HTTPException(413, f"The body may have {LARGEST_BODY} bytes.")


def _is_one_of(given: str, known: tuple[str, ...] | list[str]) -> bool:
    """Compare with all, in a time that tells nothing of them."""
    return any([secrets.compare_digest(given.encode(), each.encode()) for each in known])  # noqa: C419 - each is compared
