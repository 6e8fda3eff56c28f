"""What a command is to make: one request, or one for each line of a file of prompts."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.engine.cli.options import REQUESTS, read_request
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from holdfast.engine.requests.kinds import Request

_PROMPT = "prompt"
_COLUMNS = dict.fromkeys(name for kind in REQUESTS for name in kind.model_fields if name != "kind")


@dataclass(frozen=True)
class Order:
    """
    One request of a command.

    Attributes:
        request: What to make.
        place: The line that it stands on; empty: on the command line.
    """

    request: Request
    place: str = ""


def read_orders(
    prompt: str | None, file: str | None, given: Mapping[str, Any], *, hires: bool
) -> list[Order]:
    """
    Make the requests that a command line asks for.

    Args:
        prompt: The one on the command line.
        file: Of many prompts; ``"-"``: standard input. CSV where its first line names a column
            ``prompt``, with other columns for options; else each line is a prompt.
        given: Options; those of a line come before them.
        hires: Whether in two passes.

    Raises:
        InvalidRequest: There is not exactly one of `prompt` and `file`, the file cannot be read,
            or a request cannot be made: nothing is run then.
    """
    if file is None:
        if prompt is None:
            msg = "What is to be drawn? Give a prompt in quotes ('' for none), or --prompts FILE."
            raise InvalidRequest(msg)
        return [Order(read_request(prompt, given, hires=hires))]
    if prompt is not None:
        msg = "A prompt and --prompts were given: leave one of them out."
        raise InvalidRequest(msg)
    orders = []
    for place, cells in _rows(file):
        text = cells.pop(_PROMPT, "")
        try:
            orders.append(Order(read_request(text, {**given, **cells}, hires=hires), place))
        except InvalidRequest as error:
            msg = f"{place}: {error}"
            raise InvalidRequest(msg) from error
    if not orders:
        msg = f"{file} holds no prompt: write one on each line, or CSV with a column 'prompt'."
        raise InvalidRequest(msg)
    return orders


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the fields of each line that holds something."""
    lines = _lines(file)
    header = [cell.strip().lower().replace("-", "_") for cell in next(csv.reader(lines[:1]), [])]
    if _PROMPT in header:
        yield from _table(file, lines, header)
        return
    for number, text in enumerate(lines, start=1):
        if text.strip():
            yield f"line {number} of {file}", {_PROMPT: text.strip()}


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text("utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:
        msg = f"The prompts were to come from {file}, but that cannot be read as text: {error}."
        raise InvalidRequest(msg) from error
    return text.splitlines(keepends=True)


def _table(
    file: str, lines: Sequence[str], header: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    unknown = [name for name in header if name not in _COLUMNS]
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in _COLUMNS)
        msg = f"{file} has a column {unknown[0]!r}, which is no option. There are: {known}."
        raise InvalidRequest(msg)
    reader = csv.reader(lines)
    next(reader)
    for cells in reader:
        place = f"line {reader.line_num} of {file}"
        if len(cells) > len(header):
            msg = f"{place} has more cells than columns: put a text with a comma in quotes."
            raise InvalidRequest(msg)
        fields = {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}
        if fields:
            yield place, fields


def with_loras(request: Request, folder: Path | None) -> Request:
    """Return a request whose LoRAs, of which a picture has the names alone, are in a folder."""
    changes: dict[str, Any] = {
        name: tuple(_in_folder(each, folder) for each in loras)
        for name in ("lora", "hires_lora")
        if (loras := getattr(request, name, None))
    }
    return request.but(**changes) if changes else request


def _in_folder(lora: Lora, folder: Path | None) -> Lora:
    if lora.path.is_file() or folder is None:
        return lora
    found = next(iter(sorted(folder.glob(f"**/{lora.path.name}"))), lora.path)
    return Lora(found, lora.weight, lora.blocks)
