"""What went wrong, as clients may be told it: a status and words without paths."""

from __future__ import annotations

from holdfast.engine.errors import (
    Cancelled,
    EngineClosed,
    HoldfastError,
    InvalidRequest,
    LoraError,
    ModelSourceError,
    QueueFull,
)
from holdfast.engine.logbook.redaction import Redaction

_STATUS = (
    (InvalidRequest, 422),
    (LoraError, 422),
    (ModelSourceError, 404),
    (QueueFull, 429),
    (EngineClosed, 503),
    (Cancelled, 499),
)
RETRY_SECONDS = 2
"""After which a client that met a full queue is asked to come again."""

_REDACTION = Redaction({})


def status_of(error: HoldfastError) -> int:
    """Return the HTTP status of an error; 500 for what is no fault of the request."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def words_of(error: HoldfastError) -> str:
    """Return what an error says, without paths."""
    return _REDACTION.text(str(error))
