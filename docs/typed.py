"""
Write the types of what may be given: ``python docs/typed.py``.

A field's own type is what is read back: bytes, a PIL image, a tuple. What may be given for it is
wider: ``"8GiB"``, a path, a list. ``engine/requests/given.py`` tells type checkers so. It is made
from the fields, and the tests compare.
"""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from PIL.Image import Image
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from holdfast.engine.requests import config
from holdfast.engine.requests.kinds import KINDS
from holdfast.engine.requests.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from holdfast.engine.requests.values import Value

TARGET = Path(__file__).resolve().parent.parent / "engine" / "requests" / "given.py"

_HEAD = '''"""
What may be given for each field of settings and requests: for type checkers alone.

Made from the fields by ``make docs``.
"""

from __future__ import annotations

'''
_WIDER = {Path: "str | Path", Image: "Image | str | Path"}
"""Paths may be texts, and an image may be the path of one."""


def module() -> str:
    """Return the text of ``engine/requests/given.py``."""
    body = "\n\n\n".join([_settings(), *map(_request, KINDS.values())])
    return f"{_HEAD}{_imports(body)}\n\n\n{body}\n"


def _request(kind: type[Value]) -> str:
    fields = {name: field for name, field in kind.model_fields.items() if name != "kind"}
    needed = {name: field for name, field in fields.items() if field.is_required()}
    optional = {name: field for name, field in fields.items() if name not in needed}
    name = kind.__name__
    if not needed:
        return _typed_dict(f"{name}Fields", f"Of `{name}`.", optional)
    return "\n\n\n".join([
        _typed_dict(f"{name}Optional", f"Of `{name}`, what need not be given.", optional),
        _typed_dict(
            f"{name}Fields", f"Of a new `{name}`.", needed, bases=(f"{name}Optional",), total=True
        ),
        _typed_dict(
            f"{name}Changes", f"Of another `{name}`.", needed, bases=(f"{name}Optional",)
        ),
    ])  # fmt: skip


def _settings() -> str:
    fields = config.EngineConfig.model_fields
    model = {"model": fields["model"]}
    fixed = {name: fields[name] for name in config.FIXED}
    shared = {name: each for name, each in fields.items() if name not in model | fixed}
    return "\n\n\n".join([
        _typed_dict("EngineShared", "Settings that may change, but the model.", shared),
        _typed_dict(
            "EngineChanges", "Settings that may change.", model, bases=("EngineShared",)
        ),
        _typed_dict(
            "EngineSettings", "Settings beside the model.", fixed, bases=("EngineShared",)
        ),
        _typed_dict(
            "EngineFields", "All settings.", {}, bases=("EngineChanges", "EngineSettings")
        ),
    ])  # fmt: skip


def _typed_dict(
    name: str,
    about: str,
    fields: Mapping[str, FieldInfo],
    *,
    bases: tuple[str, ...] = ("TypedDict",),
    total: bool = False,
) -> str:
    head = ", ".join([*bases, *([] if total else ["total=False"])])
    lines = [f'class {name}({head}):\n    """{about}"""', ""]
    lines += [f"    {field}: {_given(each)}" for field, each in fields.items()]
    return "\n".join(lines).rstrip()


def _given(field: FieldInfo) -> str:
    """Return what may be given for a field, as an annotation."""
    return _union(_alternatives(field.annotation, field.metadata))


def _union(alternatives: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(alternatives))


def _alternatives(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _alternatives(arguments[0], arguments[1:])
    elif origin in (Union, types.UnionType):
        for each in arguments:
            yield from _alternatives(each)
    else:
        name = _name(annotation, origin, arguments)
        yield from [name] if "[" in name else name.split(" | ")
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _alternatives(annotation, each.metadata)
        wider = getattr(each, "json_schema_input_type", PydanticUndefined)
        if wider is not PydanticUndefined:
            yield from _alternatives(wider)


def _name(annotation: Any, origin: Any, arguments: tuple[Any, ...]) -> str:
    """Return one type as it is written; a tuple may be given as any sequence."""
    inner = [_union(_alternatives(each)) for each in arguments if not isinstance(each, str)]
    if origin is tuple:
        return f"Sequence[{_union(inner[: -1 if arguments[-1] is ... else None])}]"
    if origin is Literal:
        return "Literal[{}]".format(", ".join(f'"{each}"' for each in arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(inner)}]"
    name = "None" if annotation is type(None) else getattr(annotation, "__name__", "Any")
    return _WIDER.get(annotation, name)


def _imports(body: str) -> str:
    homes = {
        "collections.abc": ("Mapping", "Sequence"),
        "pathlib": ("Path",),
        "PIL.Image": ("Image",),
        **{each.__module__: (each.__name__,) for each in sorted((Lora, *KINDS.values()), key=str)},
    }
    used = set(re.findall(r"\w+", re.sub(r'"[^"]*"', "", re.sub(r'"""[^"]*"""', "", body))))
    typing = [name for name in ("Any", "Literal", "TypedDict") if name in used]
    lines = [f"from typing import {', '.join(['TYPE_CHECKING', *typing])}", ""]
    lines.append("if TYPE_CHECKING:")
    blocks = []
    for home, names in homes.items():
        if wanted := [name for name in names if name in used]:
            blocks.append(f"    from {home} import {', '.join(wanted)}")
    standard = [line for line in blocks if "PIL" not in line and "holdfast" not in line]
    own = [line for line in blocks if "holdfast" in line]
    others = [line for line in blocks if line not in standard and line not in own]
    groups = [group for group in (standard, others, own) if group]
    lines.append("\n\n".join("\n".join(group) for group in groups))
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(module(), encoding="utf-8")
