"""Which Holdfast this is, as its package says."""

from __future__ import annotations

import importlib.metadata

__version__ = importlib.metadata.version("holdfast")
