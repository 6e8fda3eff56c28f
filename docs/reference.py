"""
Write the parts of these pages that are made from the code: ``python docs/reference.py``.

A part stands between ``<!-- name -->`` and ``<!-- /name -->``. The tests compare.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib
import inspect
import re
import textwrap
import tomllib
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from holdfast.engine import Txt2Img
from holdfast.engine.logbook.events import COMMON, EVENTS
from holdfast.engine.requests import given
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parent.parent
WAY = (
    ("engine", "requests", "checked"),
    ("engine", "jobs", "queued"),
    ("engine", "service", "taken"),
    ("service", "passes", "as two passes"),
    ("service", "pipeline", "planned"),
    ("pipeline", "compiling", "compiled"),
    ("compiling", "models", "read"),
    ("pipeline", "states", "moved"),
    ("passes", "results", "drawn"),
)
"""The way of one hires request, from room to room; each step goes along an import."""

_MAIN = ("openvino", "optimum-intel", "diffusers", "transformers", "torch", "pydantic", "pillow")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
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


def names(module: str) -> str:
    """Return a table of a module's public names, and what there is to know of each."""
    home = importlib.import_module(module)
    known = {name: getattr(home, name) for name in home.__all__}
    rows = ["| name | what it is |", "|---|---|"]
    rows += [f"| [`{name}`](#{_anchor(name)}) | {_said(each)} |" for name, each in known.items()]
    return "\n\n".join(["\n".join(rows), *(_described(name, each) for name, each in known.items())])


def _anchor(heading: str) -> str:
    """Return where a heading is linked to, as GitHub forms it."""
    return re.sub(r"[^\w-]", "", heading.lower())


def _described(name: str, value: object) -> str:
    """Return a section on one public name."""
    parts = [f"### `{name}`"]
    if isinstance(value, types.UnionType):
        return "\n\n".join([*parts, _said(value)])
    pydantic = isinstance(value, type) and issubclass(value, BaseModel)
    if inspect.isfunction(value):
        parts.append(f"`{name}{_signature(value)}`")
    parts.append(_markdown(inspect.getdoc(value) or "", skip=("Attributes",) if pydantic else ()))
    if isinstance(value, type) and issubclass(value, BaseModel):
        parts.append(_fields(value))
    elif dataclasses.is_dataclass(value):
        listed = ", ".join(f"`{each.name}: {each.type}`" for each in dataclasses.fields(value))
        parts.append(f"Fields: {listed}" if listed else "")
    elif isinstance(value, type) and issubclass(value, enum.Enum):
        parts.append("Values: " + ", ".join(f"`{each.name}` = `{each.value!r}`" for each in value))
    if isinstance(value, type):
        parts += [_member(value, each) for each in vars(value) if not each.startswith("_")]
    return "\n\n".join(part for part in parts if part)


def _member(home: type, name: str) -> str:
    """Return a paragraph on a method or property of a class; nothing on anything else."""
    value = inspect.getattr_static(home, name)
    if isinstance(value, property | functools.cached_property):
        words = _markdown(inspect.getdoc(value) or "")
        return f"**`{home.__name__}.{name}`**: {words}"
    function = getattr(value, "__func__", value)
    if not inspect.isfunction(function) or function.__module__ != home.__module__:
        return ""
    head = f"**`{home.__name__}.{name}{_signature(function)}`**"
    return f"{head}\n\n{_markdown(inspect.getdoc(function) or '')}"


def _signature(function: types.FunctionType) -> str:
    """Return how a function is called, its annotations as they are written."""
    shown, starred = [], False
    parameters = [*inspect.signature(function).parameters.values()]
    for each in parameters:
        if each.name in ("self", "cls"):
            continue
        starred |= each.kind is each.VAR_POSITIONAL
        if each.kind is each.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        default = "" if each.default is each.empty else f" = {_value(each.default)}"
        shown.append(f"{star}{each.name}: {each.annotation}{default}")
    made = inspect.signature(function).return_annotation
    return f"({', '.join(shown)}) -> {made}"


def _value(default: object) -> str:
    """Return a default as it is written in code; of a function, that there is one."""
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    return "..." if inspect.isfunction(default) else repr(default)


def _markdown(text: str, *, skip: tuple[str, ...] = ()) -> str:
    """Return a docstring in Google's style as Markdown, without the sections to skip."""
    summary, *rest = re.split(
        r"^(Args|Attributes|Returns|Raises|Yields):\n", text, flags=re.MULTILINE
    )
    made = [summary.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        items, _, after = textwrap.dedent(body).strip().partition("\n\n")
        if title not in skip:
            lines = re.sub(r"\n +", " ", items).splitlines()
            listed = (re.sub(r"^(\*{0,2}\w+): ", r"`\1`: ", line) for line in lines)
            made.append(f"{title}:\n\n" + "\n".join(f"- {line}" for line in listed))
        made.append(after)
    return "\n\n".join(part for part in made if part).replace("``", "`")


def _fields(kind: type[BaseModel]) -> str:
    """Return a table of what may be given: types, ranges, defaults and meanings."""
    about = {**_documented(Txt2Img), **_documented(kind)}
    schema = kind.model_json_schema(mode="validation")["properties"]
    types_given = {**_given(kind, "Changes"), **_given(kind, "Fields")}
    rows = ["| field | what may be given | range | default | meaning |", "|---|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        shown = types_given.get(name, _name(field.annotation)).replace("|", "\\|")
        default = (
            "" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        )
        cells = (f"`{name}`", f"`{shown}`", _range(schema[name]), default, about.get(name, ""))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _given(kind: type[BaseModel], suffix: str) -> Mapping[str, str]:
    """Return the annotations of what type checkers are told of a kind's fields."""
    name = f"{kind.__name__.removesuffix('Config')}{suffix}"
    found = getattr(given, name, None)
    every = {} if found is None else found.__annotations__
    return {field: getattr(each, "__forward_arg__", each) for field, each in every.items()}


def _documented(kind: type[BaseModel]) -> Mapping[str, str]:
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    return {
        name: " ".join(words.split()).replace("``", "`").replace("|", "\\|")
        for name, words in found
    }


def _range(schema: Mapping[str, Any]) -> str:
    """Return the bounds of a number, as its JSON schema has them."""
    signs = {
        "minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most",
        "exclusiveMaximum": "under",
    }  # fmt: skip
    for each in (schema, *schema.get("anyOf", ())):
        if words := [f"{sign} {each[key]}" for key, sign in signs.items() if key in each]:
            return ", ".join(words)
    return ""


def rooms() -> str:
    """Return the rooms, what each imports, and the way of a hires request through them."""
    arrows = imported()
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {room}[{room}]" for room in (*sorted(arrows), "states")]
    lines += [
        f"    {room} --> {below}"
        for room in sorted(arrows)
        for below in sorted(arrows[room] - _implied(room, arrows))
        if (room, below) not in {(above, under) for above, under, _ in WAY}
    ]
    lines += [
        f'    {room} ==>|"{number} {what}"| {below}'
        for number, (room, below, what) in enumerate(WAY, 1)
    ]
    return "\n".join([*lines, "```"])


def imported() -> Mapping[str, frozenset[str]]:
    """Return the rooms that each room of the engine imports, but for those that all stand on."""
    homes = {
        path.relative_to(ROOT / "engine").parts[0].removesuffix(".py")
        for path in (ROOT / "engine").rglob("*.py")
    } - {"__init__", "errors", "imports", "version"}
    arrows: dict[str, frozenset[str]] = dict.fromkeys(homes, frozenset())
    for file in (ROOT / "engine").rglob("*.py"):
        room = file.relative_to(ROOT / "engine").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and room in homes:
                root, half, inner, *_ = [*str(node.module).split("."), "", ""]
                if root != "holdfast":
                    continue
                named = (
                    {inner or half} if inner or half == "states" else {e.name for e in node.names}
                )
                arrows[room] |= (named & {*homes, "states"}) - {room}
    return arrows


def _implied(room: str, arrows: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Return the rooms that a room's imports import in their turn, at any depth."""
    found: set[str] = set()
    pending = [*arrows.get(room, ())]
    while pending:
        below = arrows.get(pending.pop(), frozenset()) - found
        found |= below
        pending += below
    return frozenset(found)


def _said(value: object) -> str:
    """Return the first paragraph of a docstring; of a union, its members."""
    if isinstance(value, types.UnionType):
        return " or ".join(f"`{each.__name__}`" for each in value.__args__)
    first, _, _ = (inspect.getdoc(value) or "").partition("\n\n")
    return " ".join(first.split()).replace("``", "`")


def tried() -> str:
    """Return the versions of the libraries that the tests run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    shown = ", ".join(f"{name} {pins[name]}" for name in _MAIN)
    return f"Every run of the tests is with the versions in `constraints.txt`, now {shown}."


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"chart": chart},
    "docs/architecture.md": {"rooms": rooms},
    "docs/events.md": {"common": common, "events": events},
    "docs/lifecycle.md": {"chart": chart},
    "docs/limits.md": {"tried": tried},
    "docs/reference.md": {
        "engine": functools.partial(names, "holdfast.engine"),
        "logbook": functools.partial(names, "holdfast.engine.logbook"),
        "server": functools.partial(names, "holdfast.engine.server"),
        "demo": functools.partial(names, "holdfast.engine.demo"),
        "states": functools.partial(names, "holdfast.states"),
    },
}


def for_an_index() -> str:
    """Return the README for a package index: whole addresses, and no chart that it cannot draw."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    home = project["urls"]["Repository"]
    text = renewed("README.md")
    text = re.sub(r"<!-- chart -->\n.*<!-- /chart -->\n", "", text, flags=re.DOTALL)
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{home}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{home}/blob/main/", text)


WHOLE: Mapping[str, Callable[[], str]] = {"docs/pypi.md": for_an_index}
"""Pages that are made from nothing else."""


def renewed(page: str) -> str:
    """Return a page's text with its parts made anew."""
    if page in WHOLE:
        return WHOLE[page]()
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
    for each in (*PARTS, *WHOLE):
        (ROOT / each).write_text(renewed(each), encoding="utf-8")
