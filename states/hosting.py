"""From an event to the log of the host: structlog over ``logging.getLogger("holdfast")``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LOGGER_NAME = "holdfast"


def host_logger() -> logging.Logger:
    """
    Return the logger that a host routes, silent until it does.

    It is made by the first call and not by an import: ``logging.config.dictConfig`` by default
    switches off every logger that there is.
    """
    logger = logging.getLogger(LOGGER_NAME)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


class HostLog:
    """
    Takes events to the host's log.

    Where the host has configured structlog, its processors decide what becomes of them. Else they
    are plain text: structlog's own default colours them by whether standard output is a terminal,
    which a host's file is not.

    Attributes:
        logger: That a host routes.
        is_configured: Tells whether the host has configured structlog by now.
    """

    def __init__(self) -> None:
        # Late, as it brings asyncio, and rich where that is installed; and then held, as nothing
        # can be imported any more where an engine is forgotten until the interpreter's exit.
        import structlog

        self.logger = host_logger()
        self.is_configured: Callable[[], bool] = structlog.is_configured
        self._configured: Any = structlog.wrap_logger(self.logger)
        defaults = structlog.get_config()["processors"][:-1]
        plain = structlog.dev.ConsoleRenderer(colors=False)
        self._plain: Any = structlog.wrap_logger(self.logger, (*defaults, plain))

    def __call__(self, event: str, level: str, facts: Mapping[str, object]) -> None:
        """Log one event."""
        log = self._configured if self.is_configured() else self._plain
        getattr(log, level)(event, **facts)
