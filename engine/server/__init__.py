"""
HTTP: the doors that existing clients know, over one engine.

It needs the extra ``serve``. A host mounts `sdapi` and `openai` in an application of its own, over
one `Studio`; `holdfast serve` runs `application`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.imports import lazily

if TYPE_CHECKING:
    from holdfast.engine.server.access import Access
    from holdfast.engine.server.app import application
    from holdfast.engine.server.images import openai
    from holdfast.engine.server.studio import Studio
    from holdfast.engine.server.visits import AccessLog
    from holdfast.engine.server.webui import sdapi

__all__ = ["Access", "AccessLog", "Studio", "application", "openai", "sdapi"]

_HOMES = {
    "holdfast.engine.server.access": ("Access",),
    "holdfast.engine.server.app": ("application",),
    "holdfast.engine.server.images": ("openai",),
    "holdfast.engine.server.studio": ("Studio",),
    "holdfast.engine.server.visits": ("AccessLog",),
    "holdfast.engine.server.webui": ("sdapi",),
}
__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
