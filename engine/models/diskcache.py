"""
The folder of what outlives a process: exported models and compiled blobs.

Everything here is written beside its place and moved there in one step, so that a process killed at
any point leaves either the old or the new, and two processes never see each other's halves. The
folder is the user's too, who may empty it, link it elsewhere, or share it: an entry that is not as
it was left costs that entry, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from holdfast.engine.jobs.job import heed
from holdfast.engine.models.atomic_files import (
    SCRATCH,
    discard,
    remove_folder,
    scratch_for,
    sync,
    write_atomically,
)
from holdfast.engine.models.ledger import LOCK_SECONDS, Costs, Spared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from holdfast.states import Emit

_MAGIC = b"holdfast blob 1\n"
_DIGEST_BYTES = 32
_LOOK_SECONDS = 0.2
_ABANDONED_SECONDS = 3600
"""Age at which a file that is still being written, or a lock that nobody holds, is a leftover."""


class DiskCache:
    """
    One directory shared by any number of engines and processes, bounded in size.

    Only `build_once` fails where the directory cannot be used; all else goes on without, and the
    log tells.

    Args:
        root: Made when it is first needed.
        limit_bytes: What exports and blobs may take together; above it `prune` gives up those whose
            last use is longest ago.
        emit: Told ``cache.discarded`` for every entry that is thrown away, and ``cache.failed`` and
            ``cache.recovered`` as `Spared` tells them.
    """

    def __init__(self, root: Path, limit_bytes: int, emit: Emit) -> None:
        self.root = Path(os.path.realpath(root))
        self.exports = self.root / "exports"
        self.blobs = self.root / "blobs"
        self.costs = Costs(self.root / "costs.json", emit)
        self._held = self.root / "held"
        self._limit_bytes = limit_bytes
        self._emit = emit
        self._spared = Spared(emit)

    def read_blob(self, key: str) -> bytes | None:
        """
        Return what `write_blob` stored under `key`, or None.

        A file that is cut, changed, of another key or not written by Holdfast is removed, so that
        OpenVINO never parses it.
        """
        path = self.blobs / f"{key}.blob"
        content = b""
        with self._spared.of("reading blobs"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                return None
            head = len(_MAGIC) + _DIGEST_BYTES
            data = content[head:]
            if content[:head] == _MAGIC + _blob_digest(key, data):
                self._mark_used(path)
                return data
            self.drop_blob(key, "not the blob that was written under this key, or damaged")
        return None

    def write_blob(self, key: str, data: bytes) -> None:
        """Store a compiled blob under the digest of its component key, then `prune`."""
        with self._spared.of("writing blobs"):
            write_atomically(self.blobs / f"{key}.blob", _MAGIC + _blob_digest(key, data) + data)
        self.prune()

    def drop_blob(self, key: str, why: str) -> None:
        """Throw a blob away that is of no use, and log why."""
        path = self.blobs / f"{key}.blob"
        with self._spared.of(f"removing {path.name}"):
            discard(path)
            self._emit("cache.discarded", level="warning", entry=path.name, why=why)

    @contextlib.contextmanager
    def hold(self, entry: Path) -> Iterator[Path]:
        """
        Keep `prune`, in whichever process, from taking `entry` while the block runs.

        The hold ends with the process, however that ends: it is an operating system's file lock.

        Yields:
            The locked file; where somebody removes it, the hold is gone.
        """
        marker = self._held / f"{entry.name}~{uuid.uuid4().hex}.lock"
        lock = FileLock(marker, thread_local=False)  # any thread may let it go
        with self._spared.of("holding entries"):
            self._held.mkdir(parents=True, exist_ok=True)
            with self._bookkeeping():
                lock.acquire()
        self._mark_used(entry)
        try:
            yield marker
        finally:
            with self._spared.of("letting entries go"):
                lock.release()
                _unlink(lock)

    def holds(self) -> Holds:
        """Return an empty set of entries to `hold`."""
        return Holds(self)

    def prune(self) -> None:
        """Remove leftovers of killed processes and, above the limit, the least recently used."""
        with self._spared.of("pruning"), self._bookkeeping():
            self._sweep()
            entries = _entries((*self.exports.glob("*"), *self.blobs.glob("*.blob")))
            total = sum(entry.bytes for entry in entries)
            for entry in sorted(entries, key=lambda entry: entry.used):
                if total <= self._limit_bytes:
                    break
                if self._in_use(entry.path):
                    continue
                with self._spared.of(f"removing {entry.path.name}"):
                    discard(entry.path)
                    total -= entry.bytes
                    why = f"least recently used, and the limit is {self._limit_bytes} bytes"
                    self._emit("cache.discarded", level="info", entry=entry.path.name, why=why)

    def _sweep(self) -> None:
        """Remove what killed processes have left: halves, holds, and locks of nothing."""
        folders = (self.root, self.exports, self.blobs)
        for scratch in [found for each in folders for found in each.glob(f"*{SCRATCH}*")]:
            with self._spared.of(f"removing {scratch.name}"):
                _remove_abandoned(scratch)
        for marker in self._held.glob("*~*.lock"):
            with self._spared.of(f"removing {marker.name}"):
                _let_go(marker)
        for lock in self.exports.glob("*.lock"):
            with self._spared.of(f"removing {lock.name}"):
                if not os.path.lexists(lock.with_suffix("")) and _is_old(lock):
                    _let_go(lock)

    def _in_use(self, entry: Path) -> bool:
        markers = self._held.glob(f"{entry.name}~*.lock")
        return any(not _let_go(marker) for marker in markers)

    def _mark_used(self, entry: Path) -> None:
        with self._spared.of("marking the last use"), contextlib.suppress(FileNotFoundError):
            os.utime(entry)

    @contextlib.contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "bookkeeping.lock", timeout=LOCK_SECONDS):
            yield


class Holds:
    """
    The entries of a cache that one holder keeps from being pruned.

    Args:
        cache: That they are of.
    """

    def __init__(self, cache: DiskCache) -> None:
        self._cache = cache
        self._held: dict[Path, tuple[Path, contextlib.ExitStack]] = {}

    def add(self, entry: Path) -> None:
        """Hold `entry` too, until `keep`; again where somebody has removed its lock."""
        held = self._held.get(entry)
        if held is not None and held[0].exists():
            return
        self._let_go(entry)
        stack = contextlib.ExitStack()
        self._held[entry] = stack.enter_context(self._cache.hold(entry)), stack

    def keep(self, entries: Iterable[Path]) -> None:
        """Let go of all others."""
        for entry in self._held.keys() - set(entries):
            self._let_go(entry)

    def _let_go(self, entry: Path) -> None:
        held = self._held.pop(entry, None)
        if held is not None:
            held[1].close()


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """
    Make `folder` with `build`, unless it is there already; others who want it wait meanwhile.

    Args:
        folder: Where it is to be. Exists afterwards, whole. A file or a dangling link of its name
            is replaced.
        build: Called with an empty folder beside it. Where it raises, nothing is left behind.

    Raises:
        OSError: Nothing can be written there.
        Cancelled: The job that this is done for was asked to stop while others built.
    """
    if folder.is_dir():  # before the lock, which a folder of another user's may refuse
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _patiently(FileLock(_build_lock(folder))):
        for leftover in folder.parent.glob(f"{folder.name}{SCRATCH}*"):
            _remove_half(leftover)
        if folder.is_dir():
            return
        discard(folder)
        scratch = scratch_for(folder)
        scratch.mkdir()
        try:
            build(scratch)
            for path in (*scratch.rglob("*"), scratch):
                sync(path)
            scratch.replace(folder)
        except BaseException:
            _remove_half(scratch)
            raise
        sync(folder.parent)


@dataclass(frozen=True)
class _Entry:
    path: Path
    bytes: int
    used: int


def _entries(paths: Iterable[Path]) -> list[_Entry]:
    """
    Return what can be given up, with sizes and times of the last use in nanoseconds.

    A link is left alone, as what it takes lies elsewhere; so is what others remove meanwhile.
    """
    entries = []
    for path in paths:
        is_entry = path.is_dir() or path.suffix == ".blob"
        if is_entry and not path.is_symlink() and SCRATCH not in path.name:
            with contextlib.suppress(OSError):
                entries.append(_Entry(path, _size(path), path.stat().st_mtime_ns))
    return entries


@contextlib.contextmanager
def _patiently(lock: Any) -> Iterator[None]:
    """Hold a lock that others may hold for minutes, for as long as the job at hand has them."""
    while not lock.is_locked:
        heed("wait for another process")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=_LOOK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _build_lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_abandoned(scratch: Path) -> None:
    """Remove a half that nobody writes any more: a folder has a lock, and a file its age."""
    if not scratch.is_dir() or scratch.is_symlink():
        if _is_old(scratch):
            scratch.unlink(missing_ok=True)
        return
    folder = scratch.with_name(scratch.name.partition(SCRATCH)[0])
    with contextlib.suppress(Timeout), FileLock(_build_lock(folder), timeout=0):
        remove_folder(scratch)  # unless its builder has finished before the lock was had


def _remove_half(scratch: Path) -> None:
    """Remove a half that was built; what resists is left to `DiskCache.prune`."""
    shutil.rmtree(scratch, ignore_errors=True)


def _is_old(path: Path) -> bool:
    """Say whether it is there, and nobody has touched it for long."""
    try:
        touched = path.lstat().st_mtime
    except FileNotFoundError:  # its writer has put it in its place meanwhile
        return False
    return touched < time.time() - _ABANDONED_SECONDS


def _let_go(file: Path) -> bool:
    """Remove a lock that nobody holds. Returns whether nobody did."""
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return False
    if os.name == "nt":  # which removes no file that is open
        lock.release()
        _unlink(lock)
    else:  # first: whoever takes it now finds that it has no name any more, and makes another
        _unlink(lock)
        lock.release()
    return True


def _unlink(lock: Any) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else (entry,)
    return sum(path.lstat().st_size for path in files if path.is_file())


def _blob_digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + data).digest()
