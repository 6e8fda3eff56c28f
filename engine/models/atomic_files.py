"""Files that are there whole or not at all, whatever stops the one who writes them."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SCRATCH = ".tmp-"
"""What a name holds while its file or folder is being written."""


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write a file so that a reader, or a kill at any point, finds it old or new but never half.

    Raises:
        OSError: It could not be written. What was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_for(path)
    try:
        scratch.write_bytes(content)
        sync(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def discard(entry: Path) -> None:
    """
    Remove a file or folder so that nobody finds it half removed; of a link, the link alone.

    Raises:
        OSError: It could not be removed.
    """
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink(missing_ok=True)
        return
    scratch = scratch_for(entry)
    entry.replace(scratch)
    remove_folder(scratch)


def remove_folder(folder: Path) -> None:
    """
    Remove a folder that others may be removing at the same time.

    Raises:
        OSError: It could not be removed.
    """
    while folder.exists():  # else another one has finished what both had begun
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def scratch_for(path: Path) -> Path:
    """Return a name beside `path` that nobody else writes to."""
    return path.with_name(f"{path.name}{SCRATCH}{uuid.uuid4().hex}")


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk itself."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory, and needs no sync of its entries.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
