"""Events out of a log, one at a time: from a file that is cut, mixed, or still being written."""

from __future__ import annotations

import datetime as dt
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from os import PathLike

_POLL_SECONDS = 0.2
LONGEST = 1 << 24
"""Bytes of the longest line that is read as one; an event takes a few thousand."""
DEEPEST = 32
"""How many lists and objects may stand inside each other in an event."""
_MARK = b"\xef\xbb\xbf"  # with which some editors begin a file


class _Reliable(msgspec.Struct):
    """The types that the readers of entries rely on; an event may carry any key besides."""

    event: str
    engine_id: str
    seq: int
    timestamp: str | float
    level: str = ""
    number: int = msgspec.field(name="pass", default=0)
    step: int = 0
    steps: int | list[str] = 0
    lora: list[str] | None = None
    held: list[str] | dict[str, Any] | None = None
    seconds: float | None = None
    elapsed_seconds: float | None = None
    rss_bytes: float | None = None
    held_bytes: float | None = None


_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Entry(NamedTuple):
    """
    One event as it stands in a log.

    Attributes:
        line: Line number in the log, from 1.
        at: Moment of the event, in UTC.
        event: Every key of the event, the common ones included.
    """

    line: int
    at: dt.datetime
    event: dict[str, Any]

    @property
    def name(self) -> str:
        """The event's name, as in `holdfast.engine.logbook.events.EVENTS`."""
        name: str = self.event["event"]
        return name

    @property
    def engine_id(self) -> str:
        """The engine that tells it."""
        engine_id: str = self.event["engine_id"]
        return engine_id

    @property
    def seq(self) -> int:
        """The event's number in its engine."""
        seq: int = self.event["seq"]
        return seq


class Problem(NamedTuple):
    """
    A line that is no event of an engine.

    Attributes:
        line: Line number in the log, from 1.
        kind: ``"cut"``: the last line has no end, its writer was stopped; ``"broken"``: not
            JSON; ``"foreign"``: JSON of somebody else, such as the host's own log.
        words: What was found, for a person.
    """

    line: int
    kind: Literal["cut", "broken", "foreign"]
    words: str


def read(lines: Iterable[bytes]) -> Iterator[Entry | Problem]:
    """
    Turn the lines of a log into entries and problems, in their order, none held in memory.

    Args:
        lines: With their line endings, as `log_lines` gives them. A whole event on a last line
            without an ending is an entry, followed by a ``"cut"`` problem; one behind the zero
            bytes that a power cut leaves is an entry after a ``"broken"`` one.
    """
    for number, line in enumerate(lines, start=1):
        whole = line.endswith(b"\n")
        text = line.strip(b"\0 \t\r\n")
        if zeros := len(line) - len(line.lstrip(b"\0")):
            yield Problem(number, "broken", f"{zeros} zero bytes, as a power cut leaves them")
        if not text and (whole or zeros):
            continue
        if len(line) > LONGEST:
            yield Problem(number, "broken", f"longer than {LONGEST} bytes")
            continue
        try:
            event = _decode(text.removeprefix(_MARK) if number == 1 else text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield Problem(number, "broken" if whole else "cut", f"not JSON: {error}")
            continue
        at = _moment(event)
        nested = text.count(b"{") + text.count(b"[") > DEEPEST and _is_deeper(event, DEEPEST)
        if at is None or nested:
            yield Problem(number, "foreign", "no event of a Holdfast engine")
        else:
            yield Entry(number, at, event)
        if not whole:
            yield Problem(number, "cut", "the last line has no end")


def log_lines(source: str | PathLike[str]) -> Iterator[bytes]:
    """
    Yield the lines of a log file, or of standard input for ``"-"``.

    Of a line longer than `LONGEST` only the beginning is given, and none of it is held in memory.

    Raises:
        OSError: The file cannot be read.
    """
    if source == "-":
        yield from _bounded(sys.stdin.buffer)
        return
    with Path(source).open("rb") as file:
        yield from _bounded(file)


def _bounded(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(LONGEST + 1):
        yield line
        while len(line) > LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST + 1)


def followed_lines(source: str | PathLike[str]) -> Iterator[bytes]:
    """
    Yield the lines of a log file and then, for ever, those that are appended to it.

    Where the file is replaced or emptied, as when it rotates, the new one is read from its
    beginning once the old one has been read to its end.

    Raises:
        OSError: The file cannot be read.
    """
    path = Path(source)
    while True:
        with path.open("rb") as file:
            yield from _until_replaced(file, path)


def _until_replaced(file: BinaryIO, path: Path) -> Iterator[bytes]:
    begun, replaced = b"", False
    while True:
        begun = (begun + (read := file.readline(LONGEST)))[: LONGEST + 1]
        if read.endswith(b"\n"):
            yield begun
            begun = b""
        elif replaced:
            return
        elif not (replaced := _is_replaced(file, path)):  # if it is, what came before is read first
            time.sleep(_POLL_SECONDS)


def _is_replaced(file: BinaryIO, path: Path) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return False  # a rotation is half done
    return not os.path.samestat(now, os.fstat(file.fileno())) or now.st_size < file.tell()


def _moment(event: dict[str, Any]) -> dt.datetime | None:
    """
    Return when the event happened, or None for what is no event of ours.

    The timestamp is ISO 8601, UTC unless it says otherwise, or seconds since 1970, which
    structlog writes by default.
    """
    try:
        stamp = msgspec.convert(event, _Reliable).timestamp
        if isinstance(stamp, float):
            return dt.datetime.fromtimestamp(stamp, dt.UTC)
        at = dt.datetime.fromisoformat(stamp)
        return at.astimezone(dt.UTC) if at.tzinfo else at.replace(tzinfo=dt.UTC)
    except (msgspec.ValidationError, ValueError, OverflowError, OSError):
        return None


def _is_deeper(value: dict[str, Any] | list[Any], levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(
        _is_deeper(each, levels - 1) for each in inner if isinstance(each, (dict, list))
    )
