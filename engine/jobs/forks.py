"""
A forked child: it has all of its parent's objects, but none of the threads that work for them.

What the parent holds (compiled models, locks on files) stays the parent's. A child that gives it
back takes it from the parent, or waits for ever for a thread that it does not have.
"""

from __future__ import annotations

import ctypes
import os
import weakref

_OWNED: weakref.WeakSet[object] = weakref.WeakSet()


def keep_in_children(owner: object) -> None:
    """Let no child that is forked from now on give back `owner`, and what only it holds."""
    _OWNED.add(owner)


def _keep() -> None:
    # A reference that nobody lets go of, not even the interpreter when it ends.
    for owner in tuple(_OWNED):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_keep)
