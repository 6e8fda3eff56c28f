"""What this process holds in memory, and giving back pages that nobody reads again."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import psutil

_MADV_DONTNEED = 4


def resident_bytes() -> int:
    """Return the resident set size of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def private_bytes() -> int:
    """Return the resident memory that is this process's own (Linux: RssAnon), in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()


def give_back_pages(file: Path) -> None:
    """
    Let the system take back the resident pages of every read-only mapping of `file`.

    Once a model is compiled its weights are packed elsewhere, and the mapped file is not read
    again; a later read faults the pages back in. Does nothing but on Linux.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = str(file.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_, path = line.split(maxsplit=5)
        if path != wanted or "w" in permissions:
            continue
        start, end = (int(each, 16) for each in span.split("-"))
        if start % mmap.PAGESIZE == 0:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def compiled_bytes(graph: Path, precision: str) -> int:
    """
    Return what a graph takes in memory once it is compiled, in bytes.

    A compiled model holds its own packed copy of every floating-point constant, in the precision
    that it computes in (8-bit constants stay 8-bit), and kernels for its operations. Held against
    RssAnon on CPU (OpenVINO 2026.4), this is within a fifth for graphs of some 50 MB and more.
    Activations come on top, with each infer request.

    Args:
        graph: The ``.xml`` of an OpenVINO IR.
        precision: ``"f32"``, or one of the 16-bit ones.
    """
    wide = 4 if precision == "f32" else 2
    text = graph.read_bytes()
    total = text.count(b"<layer ") * _OPERATION_BYTES
    for kind, size in _CONSTANT.findall(text):
        stored = _STORED_BYTES.get(kind)
        total += int(size) if stored is None else int(size) // stored * wide
    return total


_CONSTANT = re.compile(rb'<data element_type="(\w+)"[^>]*? size="(\d+)"')
_STORED_BYTES = {b"f32": 4, b"f16": 2, b"bf16": 2}
_OPERATION_BYTES = 32 * 1024
"""What the kernels of one operation take, on average."""
