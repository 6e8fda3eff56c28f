"""What the pydantic models of settings and requests share: frozen, strict, JSON there and back."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Annotated, Any, Self

from PIL import Image, UnidentifiedImageError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from holdfast.engine.errors import InvalidRequest

_DATA_URL = "data:image/png;base64,"


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
            raise InvalidRequest(_explain(type(self).__name__, error)) from error

    def to_json(self) -> str:
        """Serialise; images become PNG data URLs. `from_json` gives an equal value back."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """
        Read what `to_json` wrote.

        Raises:
            InvalidRequest: The text is not JSON, or not of this kind.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            msg = f"{cls.__name__} cannot be read: the text is not JSON ({error})"
            raise InvalidRequest(msg) from error
        if not isinstance(fields, dict):
            msg = f"{cls.__name__} cannot be read: a JSON object is needed"
            raise InvalidRequest(msg)
        return cls(**fields)

    def but(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new one."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**fields, **changes})


def _explain(what: str, error: ValidationError) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"]) or what
        given = fault["input"]
        shown = "" if isinstance(given, dict) else f" (given: {str(given)[:80]!r})"
        lines.append(f"{where}: {fault['msg'].removeprefix('Value error, ')}{shown}")
    return f"{what} cannot be made as asked: " + "; ".join(lines)


def _read_image(value: object) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    try:
        if isinstance(value, str) and value.startswith(_DATA_URL):
            source: Any = io.BytesIO(base64.b64decode(value.removeprefix(_DATA_URL), validate=True))
        elif isinstance(value, (str, Path)):
            source = Path(value).expanduser()
        else:
            msg = f"a PIL image or the path of an image file is needed, not {type(value).__name__}"
            raise ValueError(msg)
        with Image.open(source) as opened:
            opened.load()
            return opened.copy()
    except FileNotFoundError as error:
        msg = "there is no such image file; check the path"
        raise ValueError(msg) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        msg = f"this is not an image that Pillow can read ({error})"
        raise ValueError(msg) from error


def _write_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _DATA_URL + base64.b64encode(buffer.getvalue()).decode()


Picture = Annotated[
    Image.Image, BeforeValidator(_read_image), PlainSerializer(_write_image, return_type=str)
]
"""A PIL image; given as one, as a file's path, or as a PNG data URL."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Side = Annotated[int, Field(ge=1, le=16384)]
Fraction = Annotated[float, Field(gt=0, le=1)]
