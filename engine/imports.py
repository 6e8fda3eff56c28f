"""
The one door to the heavy libraries: openvino, torch, transformers, diffusers, optimum.

Importing them prints, warns, sends usage statistics, changes settings of the whole process, and
fails where torchvision does not fit torch. A host sees none of that: they are imported through
`runtime` or `heavy` before anything else names them.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from holdfast.states import Emit

LIBRARIES = ("diffusers", "huggingface_hub", "nncf", "openvino", "optimum", "torch", "transformers")
_MODULES = re.compile(rf"({'|'.join(LIBRARIES)})(\.|$)")
# These two speak while they are imported, when no other logger of their library exists yet.
_EARLY_LOGGERS = ("diffusers.utils.import_utils", "transformers.utils.import_utils")
_LOCK = threading.RLock()
_UNTOLD: list[str] = []
"""Why torchvision was hidden, until there is a log to tell it to."""
_TAKEN: dict[str, float] = {}
"""Seconds that each import took which was made here, with all that it brought."""
_TELLING: ContextVar[Emit | None] = ContextVar("telling", default=None)


def lazily(module: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """
    Return a module's ``__getattr__`` that loads each of its public names when it is first used.

    Args:
        module: Its name.
        homes: Names by the module that each is defined in.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in home_of:
            msg = f"module {module!r} has no attribute {name!r}"
            raise AttributeError(msg)
        value = getattr(importlib.import_module(home_of[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    return load


def runtime() -> None:
    """
    Import ``openvino`` (0.2 s), and keep it from reporting the import to its maker.

    ``import openvino`` sends a usage event through ``openvino_telemetry`` unless its user has opted
    out, and nncf sends more. Both go silent where that package is not installed, and as such they
    see it here, during their own import. The package itself stays as the host has it.
    """
    with _told("openvino"), _LOCK, _absent("openvino_telemetry"):
        _timed("openvino")


def tokenizing(emit: Emit | None = None) -> None:
    """
    Import ``transformers`` as far as CLIP's tokenizer needs it (2 s at first), as `heavy` does.

    Prompts are checked before anything is compiled, and so before the rest can be imported beside
    a compile; with some models that needs this much. The classes that find the right tokenizer by
    themselves would take twice as long.

    Args:
        emit: See `heavy`.
    """
    with _told("transformers"), _LOCK, quiet(), _whole_streams():
        runtime()
        if find_spec("torchvision") is not None:
            _timed("torch")  # which torchvision brings in any case
        error = _unusable("torchvision")
        if error is not None:
            _hide("torchvision")
            _UNTOLD.append(error)
        while emit is not None and _UNTOLD:
            emit("imports.torchvision_hidden", level="warning", error=_UNTOLD.pop())
        _timed("transformers.models.clip.tokenization_clip")


def begin_heavy() -> None:
    """
    Begin `heavy` in a thread of its own: it runs beside compiles, which need none of it.

    Whoever needs it calls `heavy`, which waits for the rest and raises what may be raised.
    """

    def begin() -> None:
        with suppress(Exception):
            heavy()

    threading.Thread(target=begin, name="holdfast-imports").start()


def heavy(emit: Emit | None = None) -> None:
    """
    Import optimum-intel with all that it brings (5 to 7 s the first time, then nothing), quietly.

    A torchvision that cannot be imported (PyPI's beside a CPU build of torch) would take
    transformers down with it. It is hidden for this process, as if it were not installed; one that
    works is left alone. Safe to call from any thread and as often as you like.

    Args:
        emit: Told ``imports.torchvision_hidden`` where that was necessary, once in a process.
    """
    with _told("optimum"), _LOCK, quiet(), _whole_streams():
        tokenizing(emit)
        with _absent("openvino_telemetry"), _process_settings_kept():
            _timed("torch")
            _timed("optimum.intel.openvino")


def still_to_come() -> tuple[str, ...]:
    """Return what a pass waits for and has not been imported, as ``imports.started`` names it."""
    return tuple(wanted for wanted in ("transformers", "optimum") if wanted not in _TAKEN)


def tell_imports(emit: Emit) -> None:
    """
    Log the imports that are waited for in this context from now on, with each library's seconds.

    Args:
        emit: Told ``imports.started``, and ``imports.completed`` or ``imports.failed``.
    """
    _TELLING.set(emit)


@contextmanager
def _told(wanted: str) -> Iterator[None]:
    """Log a wait for imports, be they made here or in another thread; one within it is a part."""
    emit = None if wanted in _TAKEN else _TELLING.get()
    if emit is None:
        yield
        return
    token, before, began = _TELLING.set(None), set(_TAKEN), time.perf_counter()
    emit("imports.started", wanted=wanted)
    try:
        yield
    except BaseException as error:
        seconds = round(time.perf_counter() - began, 6)
        emit(
            "imports.failed",
            level="error", wanted=wanted, error=f"{type(error).__name__}: {error}", seconds=seconds,
        )  # fmt: skip
        raise
    else:
        taken = {name: round(_TAKEN[name], 3) for name in _TAKEN if name not in before}
        seconds = round(time.perf_counter() - began, 6)
        emit("imports.completed", wanted=wanted, libraries=taken, seconds=seconds)
    finally:
        _TELLING.reset(token)


def _timed(module: str) -> None:
    began = time.perf_counter()
    importlib.import_module(module)
    _TAKEN.setdefault(module.partition(".")[0], time.perf_counter() - began)


@contextmanager
def quiet() -> Iterator[None]:
    """
    Hold back what `LIBRARIES` say on this thread, up to but without errors, while the block runs.

    The host's own warnings and log records pass: the warning filter matches the libraries' modules
    only (``warnings.catch_warnings`` would mute the whole process, and left in another order by two
    threads would never let go), and the log filter, which stays with the libraries' loggers, stops
    records of a thread inside such a block only. Nor does the host get into the libraries: what
    dtype it has made torch's default reaches nothing inside.
    """
    _muffle()
    _MUFFLER.depth += 1
    # Not through warnings.filterwarnings: it keeps one of equal rules, so that of two blocks at
    # once the first to end would unmute the other.
    rule = ("ignore", None, Warning, _MODULES, 0)
    entered: Any = warnings.filters
    entered.insert(0, rule)
    try:
        with _float32_by_default():
            yield
    finally:
        left: Any = warnings.filters  # Another list, where the host came or left a catch_warnings.
        for rules in (entered, left):
            rules[:] = [other for other in rules if other is not rule]
        _MUFFLER.depth -= 1


_DTYPE_LOCK = threading.RLock()
"""Held while torch's default dtype is Holdfast's and not the host's: it is the whole process's."""


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """
    Let torch's functions, called on this thread, find float32 as the default dtype.

    Schedulers and models rely on it. A host that has set another one keeps it: its own threads see
    float32 at most while one single function computes.
    """
    torch: Any = sys.modules.get("torch")
    with _DTYPE_LOCK:
        as_ever = torch is None or torch.get_default_dtype() is torch.float32
    with nullcontext() if as_ever else _float32_mode():
        yield


def _float32_mode() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    class Float32(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            with _DTYPE_LOCK:
                hosts = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
                try:
                    return func(*args, **(kwargs or {}))
                finally:
                    torch.set_default_dtype(hosts)

    return Float32()


class _Muffler(logging.Filter, threading.local):
    """Stops the records of a thread that is inside `quiet`; `depth` is that thread's own."""

    depth = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.depth or record.levelno >= logging.ERROR


_MUFFLER = _Muffler()
_muffled = -1


def _muffle() -> None:
    """Have every logger of `LIBRARIES` ask the muffler, those too that came up since."""
    global _muffled  # noqa: PLW0603 - how many loggers there were when all had been visited
    if len(logging.root.manager.loggerDict) == _muffled:
        return  # to visit some 800 loggers takes longer than all else that a request's log does
    known = tuple(logging.root.manager.loggerDict)
    for name in (*known, *_EARLY_LOGGERS):
        if name.partition(".")[0] in LIBRARIES:
            logging.getLogger(name).addFilter(_MUFFLER)
    _muffled = len(known)


class _WholeStream(io.TextIOBase):
    """What libraries expect of an output stream, on one of a host's that can only be written to."""

    def __init__(self, hosts: Any) -> None:
        self._hosts = hosts

    def write(self, text: str, /) -> int:
        self._hosts.write(text)
        return len(text)


@contextmanager
def _whole_streams() -> Iterator[None]:
    """
    Stand in for output streams of the host's that have no more than ``write``.

    Consoles of notebooks and windows are such, and transformers asks for more while it is imported.
    """
    stand_ins = {}
    for name in ("stdout", "stderr"):
        hosts = getattr(sys, name)
        if hosts is not None and not (hasattr(hosts, "flush") and hasattr(hosts, "isatty")):
            stand_ins[name] = (hosts, _WholeStream(hosts))
            setattr(sys, name, stand_ins[name][1])
    try:
        yield
    finally:
        for name, (hosts, stand_in) in stand_ins.items():
            if getattr(sys, name) is stand_in:  # and not one that the host has set meanwhile
                setattr(sys, name, hosts)


def _unusable(package: str) -> str | None:
    """Return why an installed package cannot be imported; None where it can, or is not there."""
    if package in sys.modules or find_spec(package) is None:
        return None
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _hide(package: str) -> None:
    for name in tuple(sys.modules):
        if name.startswith(f"{package}."):
            del sys.modules[name]
    modules: dict[str, Any] = sys.modules
    modules[package] = None  # What Python itself reads as: an import of this raises ImportError.
    if "transformers" in sys.modules:  # It has perhaps been asked for torchvision, and remembers.
        import_utils: Any = importlib.import_module("transformers.utils.import_utils")
        import_utils.is_torchvision_available.cache_clear()


@contextmanager
def _process_settings_kept() -> Iterator[None]:
    """
    Undo what these imports do to the whole process.

    optimum-intel 2.2 mutes every FutureWarning, and nncf 3.4 makes its own logger class the one
    that ``logging.getLogger`` gives to everybody.
    """
    filters: Any = warnings.filters
    before = list(filters)
    logger_class = logging.getLoggerClass()
    try:
        yield
    finally:
        logging.setLoggerClass(logger_class)
        for rule in [rule for rule in filters if rule not in before]:
            _, message, category, module, _ = rule
            if message is module is None and category.__module__ == "builtins":
                filters.remove(rule)


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Make an import of `package` fail inside the block, as where it is not installed."""
    modules: dict[str, Any] = sys.modules
    before = modules.get(package, _absent)
    modules[package] = None
    try:
        yield
    finally:
        if before is _absent:
            del modules[package]
        else:
            modules[package] = before
