"""
The log: its events as they are told, and the lifecycle read back from them alone.

Reading needs no model, no OpenVINO and no torch. The public names are here, and are loaded when
they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.imports import lazily

if TYPE_CHECKING:
    from holdfast.engine.logbook.auditing import Verdict, audit
    from holdfast.engine.logbook.bridges import OpenTelemetry
    from holdfast.engine.logbook.reading import Entry, Problem, log_lines, read

__all__ = ["Entry", "OpenTelemetry", "Problem", "Verdict", "audit", "log_lines", "read"]

_HOMES = {
    "holdfast.engine.logbook.auditing": ("Verdict", "audit"),
    "holdfast.engine.logbook.bridges": ("OpenTelemetry",),
    "holdfast.engine.logbook.reading": ("Entry", "Problem", "log_lines", "read"),
}
__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
