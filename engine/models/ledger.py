"""
What is learned on the way and kept on disk: what work has cost, and digests of files.

Nothing depends on it. Where the disk is full, read-only or another user's, the log says so and the
work goes on without.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from filelock import FileLock

from holdfast.engine.models.atomic_files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from holdfast.states import Emit

LOCK_SECONDS = 10.0
"""How long another process may hold what is locked for moments alone, until that is given up."""
_T = TypeVar("_T")


class Spared:
    """
    Lets work go on without what it can spare.

    Args:
        emit: Told ``cache.failed`` when something begins to fail, and ``cache.recovered`` when it
            works again; nothing in between.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._failing: set[str] = set()

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Leave the block, and go on after it, where it raises; `what` is told as its name."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - systems and locks raise of many kinds; it is told
            if what not in self._failing:
                self._failing.add(what)
                text = f"{type(error).__name__}: {error}"
                self._emit("cache.failed", level="warning", entry=what, error=text)
        else:
            if what in self._failing:
                self._failing.discard(what)
                self._emit("cache.recovered", level="info", entry=what)


class Ledger(Generic[_T]):
    """
    A small JSON object on disk, of one type of values, that several processes add to.

    Args:
        path: The file; made with the first `change`.
        kind: The type of its values, checked when it is read.
        limit: How many entries it keeps; those updated longest ago go first.
        emit: Told ``cache.discarded`` where the file cannot be understood and is removed, and of
            a file that cannot be read or written as `Spared` does.
    """

    def __init__(self, path: Path, kind: type[_T], *, limit: int, emit: Emit) -> None:
        self._path = path
        self._type: Any = dict[str, kind]  # type: ignore[valid-type] # a type made at run time
        self._limit = limit
        self._emit = emit
        self._spared = Spared(emit)
        self._lock = FileLock(f"{path}.lock", timeout=LOCK_SECONDS, thread_local=True)
        self._seen: tuple[tuple[int, ...], dict[str, _T]] = ((), {})

    def read(self) -> dict[str, _T]:
        """Return all entries; none where there is no file, or none that can be understood."""
        with self._spared.of(f"reading {self._path.name}"):
            return self._read()
        return {}

    def change(self, changed: Callable[[Mapping[str, _T]], Mapping[str, _T]]) -> None:
        """
        Add or replace entries; they count as the latest.

        Args:
            changed: Returns them. Given all that there are, which no other process changes
                meanwhile.
        """
        with self._spared.of(f"writing {self._path.name}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                before = self._read()
                changes = changed(before)
                entries = {key: value for key, value in before.items() if key not in changes}
                entries.update(changes)
                kept = dict(list(entries.items())[-self._limit :])
                write_atomically(self._path, msgspec.json.encode(kept))

    def _read(self) -> dict[str, _T]:
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
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._path.unlink(missing_ok=True)
            self._emit("cache.discarded", level="warning", entry=self._path.name, why=str(error))
            return {}
        self._seen = (version, entries)
        return dict(entries)


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
        emit: See `Ledger`.
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
        """
        Learn from one piece of work that is done, for example ``("compile", "CPU", ...)``.

        Never fails: where nothing can be written, nothing is learned.
        """
        key = _key(kind, device, component, bucket)

        def learn(costs: Mapping[str, Cost]) -> dict[str, Cost]:
            known = costs.get(key, Cost(seconds, bytes, 0))
            weight = 1 / min(known.samples + 1, self._MEMORY)
            mean = Cost(
                known.seconds + (seconds - known.seconds) * weight,
                round(known.bytes + (bytes - known.bytes) * weight),
                known.samples + 1,
            )
            return {key: mean}

        self._ledger.change(learn)

    def expected(self, kind: str, device: str, component: str, bucket: str) -> Cost | None:
        """Return what such work has cost so far, or None where there is nothing to go by."""
        return self._ledger.read().get(_key(kind, device, component, bucket))


def _key(kind: str, device: str, component: str, bucket: str) -> str:
    return f"{kind}|{device}|{component}|{bucket}"
