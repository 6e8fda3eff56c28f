"""What went wrong, as clients may be told it: a status and words without paths or classes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from holdfast.engine.errors import (
    Cancelled,
    EngineClosed,
    HoldfastError,
    InvalidRequest,
    LoraError,
    ModelSourceError,
    QueueFull,
)
from holdfast.engine.logbook.events import error_words
from holdfast.engine.logbook.redaction import Redaction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STATUS = (
    (InvalidRequest, 422),
    (LoraError, 422),
    (ModelSourceError, 404),
    (QueueFull, 429),
    (EngineClosed, 503),
    (Cancelled, 499),
)
OURS = 500
"""The first status of what is no fault of the request."""

_BUSY, _RETRY_SECONDS = 429, 2
_REDACTION = Redaction({})
_CLASS = re.compile(r"\s*\((?:\w+\.)*\w*(?:Error|Exception|Warning): [^()]*\)?\)")
"""What another library says of an error, in brackets behind the words for it."""

_FAILED = "It failed here, through no fault of the request; the log of the server tells why."


class RefusedError(HoldfastError):
    """
    A wish is refused in words that hold nothing but the client's own.

    Attributes:
        param: What of the client's request is meant, by its own name; None: the whole.
        status: Of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 422) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True)
class Refusal:
    """
    What a client is told of an error.

    Attributes:
        status: Of HTTP.
        words: What is the case and what to do.
        param: The first field that is wrong, by the client's name for it.
        logged: What the log is told; never what a prompt says.
        headers: Of the answer.
    """

    status: int
    words: str
    param: str | None
    logged: str
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal_of(error: Exception, names: Mapping[str, str]) -> Refusal:
    """
    Return what a client is told of an error.

    Args:
        error: Whatever was raised while its request was served.
        names: Its own names of the fields that requests have here.
    """
    invalid = error if isinstance(error, ValidationError) else error.__cause__
    if isinstance(error, RequestValidationError):
        return _invalid([(each["loc"][1:], each["msg"]) for each in error.errors()], {})
    if isinstance(error, (ValidationError, InvalidRequest)) and isinstance(
        invalid, ValidationError
    ):
        return _invalid([(each["loc"], each["msg"]) for each in invalid.errors()], names)
    if isinstance(error, HTTPException):
        words = str(error.detail)
        return Refusal(error.status_code, words, None, words, error.headers or {})
    if isinstance(error, RefusedError):
        return Refusal(error.status, str(error), error.param, str(error))
    status = OURS
    if isinstance(error, HoldfastError):
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), OURS)
    words = _FAILED if status == OURS else _public(str(error))
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status == _BUSY else {}
    return Refusal(status, words, None, error_words(error), headers)


def _invalid(faults: Sequence[tuple[Sequence[object], str]], names: Mapping[str, str]) -> Refusal:
    """Return the refusal of a request by each fault's place in it and its words."""
    told = []
    for place, said in faults:
        first, *rest = [str(each) for each in place] or [""]
        named = not first.isdecimal()  # a number is a place in what is no JSON at all
        where = ".".join([names.get(first, first), *rest]) if named else ""
        told.append((where, _public(said.removeprefix("Value error, "))))
    words = "; ".join(f"{where}: {said}" if where else said for where, said in told)
    return Refusal(422, words, told[0][0] or None, words)


def _public(words: str) -> str:
    return _REDACTION.text(_CLASS.sub("", words))
