"""
What outlives a process: exported models, compiled blobs, and what compiling has cost so far.

Everything here is written beside its place and moved there in one step, so that a process killed at
any point leaves either the old or the new, and two processes never see each other's halves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from filelock import FileLock, Timeout

from holdfast.engine.jobs import heed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from holdfast.states import Emit

_MAGIC = b"holdfast blob 1\n"
_DIGEST_BYTES = 32
_SCRATCH = ".tmp-"
_LOOK_SECONDS = 0.2
_T = TypeVar("_T")


class DiskCache:
    """
    One directory shared by any number of engines and processes, bounded in size.

    Args:
        root: Made when it is first needed.
        limit_bytes: What exports and blobs may take together; above it `prune` gives up those whose
            last use is longest ago.
        emit: Told ``cache.discarded`` for every entry that is thrown away.
    """

    def __init__(self, root: Path, limit_bytes: int, emit: Emit) -> None:
        self.root = root
        self.exports = root / "exports"
        self.blobs = root / "blobs"
        self.costs = Costs(root / "costs.json", emit)
        self._held = root / "held"
        self._limit_bytes = limit_bytes
        self._emit = emit

    def read_blob(self, key: str) -> bytes | None:
        """
        Return what `write_blob` stored under `key`, or None.

        A file that is cut, changed, of another key or not written by Holdfast is removed, so that
        OpenVINO never parses it.
        """
        path = self.blobs / f"{key}.blob"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        head = len(_MAGIC) + _DIGEST_BYTES
        data = content[head:]
        if content[:head] != _MAGIC + _blob_digest(key, data):
            self.drop_blob(key, "not the blob that was written under this key, or damaged")
            return None
        os.utime(path)
        return data

    def write_blob(self, key: str, data: bytes) -> None:
        """Store a compiled blob under the digest of its component key, then `prune`."""
        write_atomically(self.blobs / f"{key}.blob", _MAGIC + _blob_digest(key, data) + data)
        self.prune()

    def drop_blob(self, key: str, why: str) -> None:
        """Throw a blob away that is of no use, and log why."""
        path = self.blobs / f"{key}.blob"
        path.unlink(missing_ok=True)
        self._emit("cache.discarded", level="warning", entry=path.name, why=why)

    @contextlib.contextmanager
    def hold(self, entry: Path) -> Iterator[None]:
        """
        Keep `prune`, in whichever process, from taking `entry` while the block runs.

        The hold ends with the process, however that ends: it is an operating system's file lock.
        """
        self._held.mkdir(parents=True, exist_ok=True)
        name = f"{entry.name}~{uuid.uuid4().hex}.lock"
        lock = FileLock(self._held / name, thread_local=False)  # any thread may let it go
        with self._bookkeeping():
            lock.acquire()
            if entry.exists():
                os.utime(entry)
        try:
            yield
        finally:
            with self._bookkeeping():
                lock.release()
                _unlink(lock)

    def holds(self) -> Holds:
        """Return an empty set of entries to `hold`."""
        return Holds(self)

    def prune(self) -> None:
        """Remove leftovers of killed processes and, above the limit, the least recently used."""
        with self._bookkeeping():
            for scratch in (*self.exports.glob(f"*{_SCRATCH}*"), *self.blobs.glob(f"*{_SCRATCH}*")):
                _remove_abandoned(scratch)
            entries = [
                *(path for path in self.exports.glob("*") if path.is_dir()),
                *self.blobs.glob("*.blob"),
            ]
            sizes = {entry: _size(entry) for entry in entries if _SCRATCH not in entry.name}
            total = sum(sizes.values())
            for entry in sorted(sizes, key=lambda entry: entry.stat().st_mtime_ns):
                if total <= self._limit_bytes:
                    break
                if self._in_use(entry):
                    continue
                discard(entry)
                total -= sizes[entry]
                why = f"least recently used, and the limit is {self._limit_bytes} bytes"
                self._emit("cache.discarded", level="info", entry=entry.name, why=why)

    def _in_use(self, entry: Path) -> bool:
        for marker in self._held.glob(f"{entry.name}~*.lock"):
            lock = FileLock(marker, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                return True
            lock.release()
            _unlink(lock)
        return False

    @contextlib.contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / "bookkeeping.lock"):
            yield


class Holds:
    """
    The entries of a cache that one holder keeps from being pruned.

    Args:
        cache: That they are of.
    """

    def __init__(self, cache: DiskCache) -> None:
        self._cache = cache
        self._held: dict[Path, contextlib.ExitStack] = {}

    def __contains__(self, entry: Path) -> bool:
        return entry in self._held

    def add(self, entry: Path) -> None:
        """Hold `entry` too, until `keep`."""
        if entry not in self._held:
            hold = self._held[entry] = contextlib.ExitStack()
            hold.enter_context(self._cache.hold(entry))

    def keep(self, entries: Iterable[Path]) -> None:
        """Let go of all others."""
        for entry in self._held.keys() - set(entries):
            self._held.pop(entry).close()


class Cost(msgspec.Struct, frozen=True):
    """What one kind of work has cost: means that lean to the latest, of so many samples."""

    seconds: float
    bytes: int
    samples: int


class Costs:
    """
    Seconds and bytes of earlier work, by kind, device, class of component and bucket of shapes.

    Args:
        path: The JSON file that holds them, shared by processes.
        emit: Told ``cache.discarded`` where the file cannot be understood.
    """

    _MEMORY = 5  # A sample weighs at least a fifth: a machine that has changed is soon believed.

    def __init__(self, path: Path, emit: Emit) -> None:
        self._ledger = Ledger(path, Cost, limit=1000, emit=emit)

    def record(
        self,
        kind: str,
        device: str,
        component: str,
        bucket: str,
        *,
        seconds: float,
        bytes: int,  # noqa: A002 - it is the key of the log and of the plan, too
    ) -> None:
        """Learn from one piece of work that is done, for example ``("compile", "CPU", ...)``."""
        key = _cost_key(kind, device, component, bucket)
        with self._ledger.locked():
            known = self._ledger.read().get(key, Cost(seconds, bytes, 0))
            weight = 1 / min(known.samples + 1, self._MEMORY)
            mean = Cost(
                known.seconds + (seconds - known.seconds) * weight,
                round(known.bytes + (bytes - known.bytes) * weight),
                known.samples + 1,
            )
            self._ledger.update({key: mean})

    def expected(self, kind: str, device: str, component: str, bucket: str) -> Cost | None:
        """Return what such work has cost so far, or None where there is nothing to go by."""
        return self._ledger.read().get(_cost_key(kind, device, component, bucket))


class Ledger(Generic[_T]):
    """
    A small JSON object on disk, of one type of values, that several processes add to.

    Args:
        path: The file; made with the first `update`.
        kind: The type of its values, checked when it is read.
        limit: How many entries it keeps; those updated longest ago go first.
        emit: Told ``cache.discarded`` where the file cannot be understood and is removed.
    """

    def __init__(self, path: Path, kind: type[_T], *, limit: int, emit: Emit) -> None:
        self._path = path
        self._type: Any = dict[str, kind]  # type: ignore[valid-type] # a type made at run time
        self._limit = limit
        self._emit = emit
        self._lock = FileLock(f"{path}.lock", thread_local=True)
        self._seen: tuple[tuple[int, ...], dict[str, _T]] = ((), {})

    def read(self) -> dict[str, _T]:
        """Return all entries; none where there is no file, or none that can be understood."""
        try:
            stat = self._path.stat()
            version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if version == self._seen[0]:  # a plan asks a dozen times
                return dict(self._seen[1])
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            entries: dict[str, _T] = msgspec.json.decode(content, type=self._type)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._path.unlink(missing_ok=True)
            self._emit("cache.discarded", level="warning", entry=self._path.name, why=str(error))
            return {}
        self._seen = (version, entries)
        return dict(entries)

    def update(self, changes: Mapping[str, _T]) -> None:
        """Add or replace entries; they count as the latest."""
        with self.locked():
            entries = {key: value for key, value in self.read().items() if key not in changes}
            entries.update(changes)
            kept = dict(list(entries.items())[-self._limit :])
            write_atomically(self._path, msgspec.json.encode(kept))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads and processes from an `update` while the block reads and updates."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            yield


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """
    Make `folder` with `build`, unless it is there already; others who want it wait meanwhile.

    Args:
        folder: Where it is to be. Exists afterwards, whole.
        build: Called with an empty folder beside it. Where it raises, nothing is left behind.

    Raises:
        Cancelled: The job that this is done for was asked to stop while others built.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _patiently(FileLock(_build_lock(folder))):
        for leftover in folder.parent.glob(f"{folder.name}{_SCRATCH}*"):
            shutil.rmtree(leftover)
        if folder.is_dir():
            return
        scratch = _scratch(folder)
        scratch.mkdir()
        try:
            build(scratch)
            for path in (*scratch.rglob("*"), scratch):
                _sync(path)
            scratch.replace(folder)
        except BaseException:
            shutil.rmtree(scratch)
            raise
        _sync(folder.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill at any point, finds it old or new but never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path)
    try:
        scratch.write_bytes(content)
        _sync(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def discard(entry: Path) -> None:
    """Remove a file or folder so that nobody finds it half removed."""
    if not entry.is_dir():
        entry.unlink(missing_ok=True)
        return
    scratch = _scratch(entry)
    entry.replace(scratch)
    shutil.rmtree(scratch)


def _scratch(path: Path) -> Path:
    return path.with_name(f"{path.name}{_SCRATCH}{uuid.uuid4().hex}")


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
    if scratch.is_file():
        scratch.unlink(missing_ok=True)
        return
    folder = scratch.with_name(scratch.name.partition(_SCRATCH)[0])
    with contextlib.suppress(Timeout), FileLock(_build_lock(folder), timeout=0):
        shutil.rmtree(scratch)


def _unlink(lock: Any) -> None:
    Path(lock.lock_file).unlink()


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else (entry,)
    return sum(path.stat().st_size for path in files if path.is_file())


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory, and needs no sync of its entries.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _blob_digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + data).digest()


def _cost_key(kind: str, device: str, component: str, bucket: str) -> str:
    return f"{kind}|{device}|{component}|{bucket}"
