"""
Write the parts of these pages that are made from the code: ``python docs/reference.py``.

A part stands between ``<!-- name -->`` and ``<!-- /name -->``. The tests compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.engine.events import COMMON, EVENTS
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parent.parent
_ENDINGS = (".started", ".completed", ".failed", ".cancelled")


def chart() -> str:
    """Return the lifecycle's chart."""
    return f"```mermaid\n{mermaid()}```"


def common() -> str:
    """Return the keys that every event has."""
    return ", ".join(f"`{key}`" for key in COMMON)


def events() -> str:
    """Return a table of all events, sorted by name."""
    rows = ["| event | level | meaning | keys |", "|---|---|---|---|"]
    for name, spec in sorted(EVENTS.items(), key=lambda item: _place(item[0])):
        keys = [f"`{key}`" for key in spec.keys] + [f"`{key}`?" for key in spec.optional]
        rows.append(f"| `{name}` | {spec.level} | {spec.meaning} | {', '.join(keys)} |")
    return "\n".join(rows)


def _place(name: str) -> tuple[str, int]:
    """Sort the endings of one thing as they happen."""
    for number, ending in enumerate(_ENDINGS):
        if name.endswith(ending):
            return name.removesuffix(ending), number
    return name, 0


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"chart": chart},
    "docs/events.md": {"common": common, "events": events},
    "docs/lifecycle.md": {"chart": chart},
}


def renewed(page: str) -> str:
    """Return a page's text with its parts made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PARTS[page].items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            msg = f"{page} has no part named {name!r}"
            raise ValueError(msg)
        text = f"{head}{begin}{make()}\n{end}{tail}"
    return text


if __name__ == "__main__":
    for each in PARTS:
        (ROOT / each).write_text(renewed(each), encoding="utf-8")
