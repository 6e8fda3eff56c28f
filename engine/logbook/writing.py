"""The log file that Holdfast writes itself: one JSON object a line, whatever an event carries."""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

_encode = msgspec.json.Encoder(enc_hook=str).encode
WAITING_BYTES = 4 << 20
"""How much a log file that cannot be written keeps in memory; later events are lost."""
_salvage = reprlib.Repr()
_salvage.maxstring = _salvage.maxother = 1000
# Controls (C1 included: 0x9b starts a terminal sequence as ESC [ does), line separators that only
# some readers know, and the marks that reverse the direction of what follows.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    r"""
    Spell out, as ``\u001b``, each character that could end a line or command a terminal.

    JSON stays JSON of the same meaning: outside its strings it has none of these characters.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def line(event: Mapping[str, Any]) -> bytes:
    """
    Encode one event as one line of JSON with its newline.

    A value that JSON has no form for is written as its ``str()``, and where even that fails as a
    shortened ``repr()``: an event is never lost for what it carries.
    """
    try:
        encoded = _encode(event)
    except Exception:  # noqa: BLE001 - any value's own __str__ may raise anything
        encoded = _encode({_writable(key): _writable(value) for key, value in event.items()})
    return printable(encoded.decode()).encode() + b"\n"


def _writable(value: object) -> object:
    try:
        _encode(value)
    except Exception:  # noqa: BLE001 - any value's own __str__ may raise anything
        return _shortened(value)
    return value


def _shortened(value: object) -> str:
    try:
        return _salvage.repr(value)
    except Exception:  # noqa: BLE001 - a number of a thousand digits and more has no repr()
        return f"a {type(value).__name__}"


class JsonLines:
    """
    A sink that appends each event to a file, whole and at once.

    Several engines and several processes may append to one file. A last line that an earlier
    process left cut off is ended first, so that it spoils no later event. Where the disk is full,
    events wait, up to `WAITING_BYTES` of them; the first that can be written brings them along.

    Args:
        path: Made with its folders if it is not there.

    Attributes:
        goes_on_after: Errors of a call after which a later one may succeed.

    Raises:
        OSError: The file cannot be opened, or, when called, written now; the event waits.
    """

    goes_on_after = (OSError,)

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque()
        self._sent = 0  # of the first that waits: what there was room for
        self._end = 0  # of the file, then
        if not _ends_whole(self.path):
            self._waiting.append(b"\n")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Write one event; when this returns, the operating system has it."""
        self.append(line(event))

    def append(self, encoded: bytes) -> None:
        """Write one event that `line` has encoded; the operating system has it afterwards."""
        if sum(map(len, self._waiting)) < WAITING_BYTES:
            self._waiting.append(encoded)
        self._write()

    def close(self) -> None:
        """Close the file, with what could still not be written lost. Again it does nothing."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # which has been raised when it began
                self._write()
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            if self._sent and self._end != os.fstat(self._file.fileno()).st_size:
                # Another process has written behind the half of a line, which is lost.
                self._waiting[0], self._sent = b"\n" + self._waiting[0], 0
            self._sent += self._file.write(self._waiting[0][self._sent :])
            self._end = os.fstat(self._file.fileno()).st_size
            if self._sent == len(self._waiting[0]):
                self._waiting.popleft()
                self._sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<JsonLines {self.path.name}>"


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
