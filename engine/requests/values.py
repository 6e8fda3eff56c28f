"""What settings and requests share: frozen, checked, JSON there and back; paths and texts."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
from collections.abc import Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from holdfast.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 80
"""Most characters of what was given that stand in an error."""

_DIGITS = 1000
"""Bits from which on an integer is told by its length: Python writes no number of any length."""


@dataclass(frozen=True, slots=True)
class Reading:
    """
    How far what is read may reach.

    Attributes:
        files: Whether a text may name a file of this machine, which is then opened.
        formats: Pillow's names of the formats that pictures may have; None for all.
        pixels: Most pixels of a picture; None for Pillow's own limit.
    """

    files: bool
    formats: tuple[str, ...] | None = None
    pixels: int | None = None


HOST = Reading(files=True)
"""What a host's own code gives."""

JSON = Reading(files=False)
"""What `Value.to_json` wrote: every picture stands in it."""

# pydantic hands no context to values that are made inside others, but by way of such a variable.
_READING = ContextVar("reading", default=HOST)


def reading() -> Reading:
    """Return how far what is being read may reach."""
    return _READING.get()


@contextlib.contextmanager
def read_as(how: Reading) -> Iterator[None]:
    """Hold to `how` for every value that is made inside."""
    token = _READING.set(how)
    try:
        yield
    finally:
        _READING.reset(token)


class Value(BaseModel):
    """
    A frozen value that is checked when it is made.

    Raises:
        InvalidRequest: A field is missing, unknown, of the wrong type or out of its range.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidRequest(explain(type(self), error)) from error

    def __hash__(self) -> int:
        return hash((type(self), *map(_hashable, self.__dict__.values())))

    @model_validator(mode="wrap")
    @classmethod
    def _has_names(cls, fields: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Refuse what Python could not hand to `__init__`, of a value that stands in another."""
        if isinstance(fields, Mapping) and not all(isinstance(each, str) for each in fields):
            msg = "the names of fields are text"
            raise ValueError(msg)
        return handler(fields)

    @field_validator("*", mode="after")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            check_text(value)
        return value

    def to_json(self) -> str:
        """Serialise; images become PNG data URLs. `from_json` gives an equal value back."""
        return json.dumps(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """
        Read what `to_json` wrote.

        Raises:
            InvalidRequest: The text is not JSON, or not of this kind.
        """
        fields = fields_of_json(text, cls.__name__)
        with read_as(JSON):
            return cls(**fields)

    def _but(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with some fields changed; a kind's own `but` says which it has."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**fields, **changes})


def _hashable(value: object) -> Hashable:
    if isinstance(value, Image.Image):
        return value.tobytes()
    return value if isinstance(value, Hashable) else None


def fields_of_json(text: str | bytes, what: str) -> dict[str, Any]:
    """
    Return the fields of a JSON object.

    Args:
        text: JSON; bytes in UTF-8, UTF-16 or UTF-32.
        what: Is read, as the error names it.

    Raises:
        InvalidRequest: The text is not JSON, or not an object.
    """
    try:
        fields = json.loads(text)
    except RecursionError as error:
        msg = f"{what} cannot be read: its JSON is nested too deeply"
        raise InvalidRequest(msg) from error
    except (ValueError, TypeError) as error:
        msg = f"{what} cannot be read: the text is not JSON ({error})"
        raise InvalidRequest(msg) from error
    if not isinstance(fields, dict):
        msg = f"{what} cannot be read: a JSON object is needed"
        raise InvalidRequest(msg)
    return fields


def check_text(text: str) -> str:
    """
    Return a text as it is.

    Raises:
        ValueError: It holds half of a character (a lone surrogate), which no file and no model
            takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        msg = (
            f"the text holds half of a character ({half} at position {error.start}), as where an "
            "emoji was cut in two or bytes were read in another encoding: give it whole"
        )
        raise ValueError(msg) from error
    return text


def explain(value: type[BaseModel], error: ValidationError) -> str:
    """Say field by field what of a value cannot be as it was given, and what to do."""
    what = value.__name__
    lines = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(part)[:_SHOWN] for part in fault["loc"]) or what
        said = fault["msg"].removeprefix("Value error, ")
        field = value.model_fields.get(str(fault["loc"][0])) if fault["loc"] else None
        optional = field is not None and not field.is_required() and field.default is None
        if optional and fault["type"].startswith(("greater_than", "less_than")):
            said += "; leave it out to have it chosen"
        given = fault["input"]
        quoted = "" if isinstance(given, dict) else f" (given: {shown(given)})"
        lines.append(f"{where}: {said}{quoted}")
    text = f"{what} cannot be made as asked: " + "; ".join(lines)
    return text.encode(errors="backslashreplace").decode()


def exact(number: float) -> str:
    """Return a number with as few digits as read back to it."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def shown(value: object) -> str:
    """Return the beginning of something that was given, as an error may quote it."""
    if isinstance(value, int) and value.bit_length() > _DIGITS:
        return f"a number of {value.bit_length()} bits"
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = _SHOWN
    return writer.repr(value)


def locate(value: object) -> Path:
    """
    Return the path that a host gave: ``~`` and ``~user`` stand for homes.

    Args:
        value: A `str`, `bytes` or anything with ``__fspath__``. It need not exist.

    Raises:
        ValueError: It is no path, holds a null byte, or names a home that is not known.
    """
    if not isinstance(value, (str, bytes, os.PathLike)):
        msg = f"a path is needed, not {type(value).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - pydantic takes ValueError for a fault of a field
    text = os.fsdecode(value)
    if "\0" in text:
        msg = "a path holds no null byte"
        raise ValueError(msg)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        msg = "no file here can have this name: it holds what this machine's encoding has not"
        raise ValueError(msg) from error
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        home = Path(text).parts[0]
        msg = f"the home that {home[:_SHOWN]} stands for is not known here; write the path out"
        raise ValueError(msg) from error


Location = Annotated[
    Path, BeforeValidator(locate, json_schema_input_type=str), PlainSerializer(str, return_type=str)
]
"""A path as `locate` reads it: what every field that names a file or folder is."""


def _name_or_path(value: object) -> object:
    """Take text as it is, for it may be a hub id, but where it can only be a path."""
    named = isinstance(value, str) and value.isprintable() and not value.startswith("~")
    return value if named else locate(value)


ModelName = Annotated[
    str | Path, BeforeValidator(_name_or_path, json_schema_input_type=str), PlainSerializer(str)
]
"""Where a model comes from: a name, or a `Location`."""

SEEDS = 2**63
"""Seeds are below this."""

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0, le=100)]
SIDE = 16384
"""Longest side in pixels."""

Side = Annotated[int, Field(ge=1, le=SIDE)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Speed = Literal["exact", "balanced", "fast"]
