"""What this process holds in memory, and giving back pages that nobody reads again."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MADV_DONTNEED = 4
_GIVE_BACK_SECONDS = 0.1


def resident_bytes() -> int | None:
    """Return the resident set size of this process, in bytes; None where it cannot be measured."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):  # for want of a file descriptor, for example
        return None


def private_bytes() -> int | None:
    """
    Return the resident memory that is this process's own (Linux: RssAnon), in bytes.

    None where it cannot be measured.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # another system, or no file descriptor
    return resident_bytes()


def give_back_pages(file: Path) -> None:
    """
    Let the system take back the resident pages of every read-only mapping of `file`.

    Once a model is compiled its weights are packed elsewhere, and the mapped file is not read
    again; a later read faults the pages back in. Does nothing but on Linux, nor where the mappings
    cannot be read.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        mappings = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:  # for want of a file descriptor: the pages stay until they are needed
        return
    wanted = str(file.resolve())
    for line in mappings:
        span, permissions, *_, path = line.split(maxsplit=5)
        if path != wanted or "w" in permissions:
            continue
        start, end = (int(each, 16) for each in span.split("-"))
        if start % mmap.PAGESIZE == 0:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


@contextlib.contextmanager
def giving_back_pages(file: Path) -> Iterator[None]:
    """
    Give back the pages of `file` again and again inside, and at the end.

    A compile packs one constant after the other, so that a page which it has read is seldom read
    again: the file's pages and the packed weights are never in memory together.
    """
    over = threading.Event()

    def give() -> None:
        while not over.wait(_GIVE_BACK_SECONDS):
            give_back_pages(file)

    with beside(give, f"holdfast-pages-{file.parent.name}", over):
        yield
    give_back_pages(file)


@contextlib.contextmanager
def beside(work: Callable[[], None], name: str, over: threading.Event) -> Iterator[None]:
    """
    Let a thread do `work` beside the block, where the system has a thread left for it.

    Nothing depends on it: without one, the block is done all the same.

    Args:
        work: Ends when `over` is set, or by itself.
        name: Of the thread.
        over: Set when the block is left.
    """
    thread = threading.Thread(target=work, name=name, daemon=True)
    started = False
    try:
        with contextlib.suppress(RuntimeError):
            thread.start()
            started = True
        yield
    finally:
        over.set()
        if started:
            thread.join()


def budget_bytes(asked: int | None) -> int:
    """Return what all compiled components may hold: as asked, or half of the machine's memory."""
    return asked or _installed_bytes() // 2


@functools.cache
def _installed_bytes() -> int:
    return int(psutil.virtual_memory().total)


def trim() -> None:
    """Let the system take back what the C library keeps of freed memory (glibc alone does)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def compiled_bytes(graph: Path, width: int) -> int:
    """
    Return what a graph takes in memory once it is compiled, in bytes.

    A compiled model holds its own packed copy of every floating-point constant, in the precision
    that it computes in (8-bit constants stay 8-bit), and kernels for its operations. Held against
    RssAnon on CPU (OpenVINO 2026.4), this is within a fifth for graphs of some 50 MB and more.
    Activations come on top, with each infer request.

    Args:
        graph: The ``.xml`` of an OpenVINO IR.
        width: Bytes that one floating-point constant takes in the precision computed in.
    """
    text = graph.read_bytes()
    total = text.count(b"<layer ") * _OPERATION_BYTES
    for kind, size in _CONSTANT.findall(text):
        stored = _STORED_BYTES.get(kind)
        total += int(size) if stored is None else int(size) // stored * width
    return total


_CONSTANT = re.compile(rb'<data element_type="(\w+)"[^>]*? size="(\d+)"')
_STORED_BYTES = {b"f32": 4, b"f16": 2, b"bf16": 2}
_OPERATION_BYTES = 32 * 1024
"""What the kernels of one operation take, on average."""
