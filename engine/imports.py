"""
The one door to the heavy libraries: openvino, torch, transformers, diffusers, optimum.

Importing them prints, warns, sends usage statistics, changes settings of the whole process, and
fails where torchvision does not fit torch. A host sees none of that: they are imported through
`runtime` or `heavy` before anything else names them.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from holdfast.states import Emit

LIBRARIES = ("diffusers", "huggingface_hub", "nncf", "openvino", "optimum", "torch", "transformers")
_MODULES = re.compile(rf"({'|'.join(LIBRARIES)})(\.|$)")
# These two speak while they are imported, when no other logger of their library exists yet.
_EARLY_LOGGERS = ("diffusers.utils.import_utils", "transformers.utils.import_utils")
_LOCK = threading.RLock()
_UNTOLD: list[str] = []
"""Why torchvision was hidden, until there is a log to tell it to."""


def runtime() -> None:
    """
    Import ``openvino`` (0.2 s), and keep it from reporting the import to its maker.

    ``import openvino`` sends a usage event through ``openvino_telemetry`` unless its user has opted
    out, and nncf sends more. Both go silent where that package is not installed, and as such they
    see it here, during their own import. The package itself stays as the host has it.
    """
    with _LOCK, _absent("openvino_telemetry"):
        importlib.import_module("openvino")


def tokenizing(emit: Emit | None = None) -> None:
    """
    Import ``transformers`` as far as CLIP's tokenizer needs it (2 s at first), as `heavy` does.

    Prompts are checked before anything is compiled, and so before the rest can be imported beside
    a compile; with some models that needs this much. The classes that find the right tokenizer by
    themselves would take twice as long.

    Args:
        emit: See `heavy`.
    """
    with _LOCK, quiet():
        runtime()
        error = _unusable("torchvision")
        if error is not None:
            _hide("torchvision")
            _UNTOLD.append(error)
        while emit is not None and _UNTOLD:
            emit("imports.torchvision_hidden", level="warning", error=_UNTOLD.pop())
        importlib.import_module("transformers.models.clip.tokenization_clip")


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
    with _LOCK, quiet():
        tokenizing(emit)
        with _absent("openvino_telemetry"), _process_settings_kept():
            importlib.import_module("optimum.intel.openvino")


@contextmanager
def quiet() -> Iterator[None]:
    """
    Hold back what `LIBRARIES` say on this thread, up to but without errors, while the block runs.

    The host's own warnings and log records pass: the warning filter matches the libraries' modules
    only (``warnings.catch_warnings`` would mute the whole process, and left in another order by two
    threads would never let go), and the log filter, which stays with the libraries' loggers, stops
    records of a thread inside such a block only.
    """
    _muffle()
    _MUFFLER.depth += 1
    # Not through warnings.filterwarnings: it keeps one of equal rules, so that of two blocks at
    # once the first to end would unmute the other.
    rule = ("ignore", None, Warning, _MODULES, 0)
    entered: Any = warnings.filters
    entered.insert(0, rule)
    try:
        yield
    finally:
        left: Any = warnings.filters  # Another list, where the host came or left a catch_warnings.
        for rules in (entered, left):
            rules[:] = [other for other in rules if other is not rule]
        _MUFFLER.depth -= 1


class _Muffler(logging.Filter, threading.local):
    """Stops the records of a thread that is inside `quiet`; `depth` is that thread's own."""

    depth = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.depth or record.levelno >= logging.ERROR


_MUFFLER = _Muffler()
_muffled = 0


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
