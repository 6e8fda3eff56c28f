from __future__ import annotations

import re
from pathlib import Path

import holdfast.states
from holdfast.states import CHART, Chart, State, mermaid

GUIDE = Path(holdfast.states.__path__[0]).parent / "docs" / "lifecycle.md"


def test_the_picture_in_the_guide_is_the_generated_one() -> None:
    """Between its markers docs/lifecycle.md holds what `mermaid` draws, to the letter."""
    guide = GUIDE.read_text(encoding="utf-8")
    [drawn] = re.findall(r"<!-- chart -->\n```mermaid\n(.*?)```\n<!-- /chart -->", guide, re.DOTALL)
    assert drawn == mermaid()


def test_the_picture_has_every_move_and_no_other() -> None:
    """Read back from the picture, the moves are exactly the rows of the chart."""
    names = {identifier: name for name, identifier in re.findall(r'"(.+)" as (\w+)', mermaid())}
    assert sorted(names.values()) == sorted(State)
    moves = [
        (trigger, names[source], names[dest])
        for source, dest, label in re.findall(r"(\w+) --> (\w+): (.+)", mermaid())
        for trigger in label.split("<br>")
    ]
    assert sorted(moves) == sorted(CHART.rows)


def test_the_picture_starts_unloaded() -> None:
    """The one initial marker points at unloaded."""
    assert re.findall(r"\[\*\] --> (\w+)", mermaid()) == ["unloaded"]


def test_the_recompiles_are_drawn_inside_one_composite_state() -> None:
    """The box of the composite state holds the recompiles, and nothing else is in a box."""
    boxes = re.findall(r"state (\w+) \{(.*?)\}", mermaid(), re.DOTALL)
    assert [(name, re.findall(r'"(.+?)"', inside)) for name, inside in boxes] == [
        ("recompiling", [state for state in State if state.is_recompiling])
    ]


def test_the_picture_follows_the_chart() -> None:
    """A chart without one of its moves is drawn without it."""
    left_out = CHART.rows[-1]
    smaller = Chart(tuple(row for row in CHART.rows if row != left_out))
    edge = f"{left_out.source.name.lower()} --> {left_out.dest.name.lower()}:"
    assert edge in mermaid()
    assert edge not in mermaid(smaller)
