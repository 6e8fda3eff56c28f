"""The lifecycle of a compiled pipeline: its chart, its one door, its errors, its picture."""

from __future__ import annotations

from .chart import CHART, Chart, Mode, Row, State, Trigger
from .diagram import mermaid
from .errors import ChartError, HoldfastError, IllegalTransition
from .lifecycle import Emit, Lifecycle

__all__ = [
    "CHART",
    "Chart",
    "ChartError",
    "Emit",
    "HoldfastError",
    "IllegalTransition",
    "Lifecycle",
    "Mode",
    "Row",
    "State",
    "Trigger",
    "mermaid",
]
