"""The chart as a picture, drawn from a live machine and not from the table it was built on."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .chart import CHART, State
from .lifecycle import Lifecycle

if TYPE_CHECKING:
    from .chart import Chart


def mermaid(chart: Chart = CHART) -> str:
    """
    Draw the machine that ``chart`` makes.

    Returns:
        A Mermaid ``stateDiagram-v2``, without a code fence; equal charts give equal texts.
    """
    lifecycle = Lifecycle(chart=chart)
    labels: dict[tuple[State, State], list[str]] = defaultdict(list)
    for trigger, source, dest in lifecycle.edges():
        labels[source, dest].append(trigger)
    groups: dict[str, list[State]] = defaultdict(list)
    for state in State:
        groups[state.rpartition(".")[0]].append(state)
    lines = ["stateDiagram-v2", *(_declare(state) for state in groups.pop(""))]
    for parent, children in groups.items():
        lines += [f"state {parent} {{", *(f"    {_declare(child)}" for child in children), "}"]
    lines.append(f"[*] --> {_id(lifecycle.state)}")
    for (source, dest), triggers in labels.items():
        lines.append(f"{_id(source)} --> {_id(dest)}: {'<br>'.join(triggers)}")
    return "\n    ".join(lines) + "\n"


def _declare(state: State) -> str:
    return f'state "{state}" as {_id(state)}'


def _id(state: State) -> str:
    # Mermaid takes neither hyphens nor dots in an identifier.
    return state.name.lower()
