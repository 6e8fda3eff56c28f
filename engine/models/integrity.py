"""Whether a model's files are whole, and the digests by which they are known."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from holdfast.engine.errors import ModelSourceError
from holdfast.engine.models.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from holdfast.states import Emit

_Natural = Annotated[int, msgspec.Meta(ge=0)]
_CONSTANT = re.compile(rb'<data [^>]*?offset="(\d+)" size="(\d+)"')
_PADDING = 4096  # What a writer may align the end of a .bin to.
_AGAIN = "Copy, download or export the model again."


def check_ir(graph: Path) -> None:
    """
    Check, without parsing it, that a graph and its weights are there, whole and of one size.

    Args:
        graph: The ``.xml``; its ``.bin`` lies beside it.

    Raises:
        ModelSourceError: One of the two is missing or cut, or the ``.bin`` is not as long as the
            graph's constants say.
    """
    weights = graph.with_suffix(".bin")
    for path in (graph, weights):
        if not path.is_file():
            msg = f"{path} is missing: the OpenVINO model is incomplete. {_AGAIN}"
            raise ModelSourceError(msg)
    text = graph.read_bytes()
    if not text.rstrip().endswith(b"</net>"):
        msg = f"{graph} does not end as an OpenVINO graph does: it was cut or changed. {_AGAIN}"
        raise ModelSourceError(msg)
    needed = max((int(start) + int(size) for start, size in _CONSTANT.findall(text)), default=0)
    size = weights.stat().st_size
    if not needed <= size <= needed + _PADDING:
        msg = (
            f"{weights} has {size} bytes, but the constants of {graph.name} need {needed}: it was "
            f"cut, or belongs to another graph. {_AGAIN}"
        )
        raise ModelSourceError(msg)


def check_pickle(path: Path) -> None:
    """
    Check, without opening what is in it, that a ``.bin`` of PyTorch was not cut.

    Raises:
        ModelSourceError: It begins as the archive that PyTorch writes, and does not end as one.
    """
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"  # older ones are bare pickles, and tell only when read
    if is_archive and not zipfile.is_zipfile(path):
        msg = f"{path} does not end as PyTorch ends such a file: it was cut. {_AGAIN}"
        raise ModelSourceError(msg)


def read_json(path: Path) -> dict[str, Any]:
    """
    Read a JSON object.

    Raises:
        ModelSourceError: The file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        msg = f"{path} is missing: the model is incomplete. {_AGAIN}"
        raise ModelSourceError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as JSON ({error}). {_AGAIN}"
        raise ModelSourceError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} does not hold a JSON object. {_AGAIN}"
        raise ModelSourceError(msg)
    return content


class Tensor(msgspec.Struct, frozen=True):
    """
    One tensor, as a header of safetensors tells it.

    Attributes:
        dtype: As safetensors writes it (``"F16"``, ``"F32"``, ...).
        shape: Its sides.
        data_offsets: Where its bytes begin and end, from the end of the header.
    """

    dtype: str
    shape: tuple[_Natural, ...]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True)
class Header:
    """
    What a safetensors file says of itself.

    Attributes:
        tensors: By their names.
        notes: Its metadata.
    """

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str]


def read_header(path: Path) -> Header:
    """
    Read from a safetensors file's header which tensors it holds, and check the file's length.

    Raises:
        ModelSourceError: The file is cut, or is not safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = msgspec.json.decode(file.read(min(length, size)), type=dict[str, msgspec.Raw])
        notes = entries.pop("__metadata__", msgspec.Raw(b"{}"))
        said = msgspec.json.decode(notes, type=dict[str, Any] | None) or {}
        tensors = {name: msgspec.json.decode(raw, type=Tensor) for name, raw in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"{path} is not a safetensors file, or it is damaged ({error}). {_AGAIN}"
        raise ModelSourceError(msg) from error
    needed = 8 + length + max((each.data_offsets[1] for each in tensors.values()), default=0)
    if size != needed:
        msg = f"{path} has {size} bytes where its header says {needed}: it was cut. {_AGAIN}"
        raise ModelSourceError(msg)
    return Header(tensors, {name: each for name, each in said.items() if isinstance(each, str)})


class Digests:
    """
    Digests of files, remembered by path, size and time of change: gigabytes are read once.

    Args:
        path: The file that remembers, shared by processes.
        emit: See `Ledger`.
    """

    def __init__(self, path: Path, emit: Emit) -> None:
        self._ledger = Ledger(path, tuple[int, int, str], limit=4096, emit=emit)

    def of(self, files: Iterable[Path], folder: Path) -> str:
        """Return the digest of some files of a folder: of their names in it and their contents."""
        known = self._ledger.read()
        learned: dict[str, tuple[int, int, str]] = {}
        whole = hashlib.sha256()
        for file in files:
            status = file.stat()
            entry = known.get(str(file))
            if entry is None or entry[:2] != (status.st_size, status.st_mtime_ns):
                entry = (status.st_size, status.st_mtime_ns, _digest(file))
                learned[str(file)] = entry
            whole.update(f"{file.relative_to(folder).as_posix()} {entry[2]}\n".encode())
        if learned:
            self._ledger.change(lambda _: learned)
        return whole.hexdigest()[:32]


def _digest(file: Path) -> str:
    if file.suffix != ".json":
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    content: Mapping[str, Any] = read_json(file)
    # Where a config was once saved is no part of what it says.
    said = {key: value for key, value in content.items() if key != "_name_or_path"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
