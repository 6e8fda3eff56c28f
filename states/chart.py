"""
Every state of the compiled pipeline, every trigger, and every legal move.

What stands on no row cannot happen. A new mode is a member of `Mode`, its two states and its two
triggers, here and nowhere else: rows, machine and picture follow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from .errors import ChartError, IllegalTransition

if TYPE_CHECKING:
    from collections.abc import Iterator


class Mode(StrEnum):
    """What a pipeline makes its images from."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    INPAINT = "inpaint"


class State(StrEnum):
    """The state of the compiled pipeline. In a recompile, its name says where that began."""

    UNLOADED = "unloaded"
    COMPILED_TXT2IMG = "compiled-txt2img"
    COMPILED_IMG2IMG = "compiled-img2img"
    COMPILED_INPAINT = "compiled-inpaint"
    RECOMPILING_TXT2IMG = "recompiling.txt2img"
    RECOMPILING_IMG2IMG = "recompiling.img2img"
    RECOMPILING_INPAINT = "recompiling.inpaint"

    @classmethod
    def compiled(cls, mode: Mode) -> State:
        """Return the state in which ``mode`` is in service."""
        return cls(f"compiled-{mode}")

    @classmethod
    def recompiling(cls, mode: Mode) -> State:
        """Return the state of a recompile that began in ``mode``."""
        return cls(f"recompiling.{mode}")

    @property
    def is_compiled(self) -> bool:
        """Whether a mode is in service."""
        return self in map(State.compiled, Mode)

    @property
    def is_recompiling(self) -> bool:
        """Whether components are being replaced."""
        return self in map(State.recompiling, Mode)

    @property
    def mode(self) -> Mode | None:
        """The mode in service or, in a recompile, the one it began in; None when unloaded."""
        return next((m for m in Mode if self in (State.compiled(m), State.recompiling(m))), None)


class Trigger(StrEnum):
    """What moves the pipeline. Loads and switches name a mode; a recompile's triggers name none."""

    LOAD_TXT2IMG = "load-txt2img"
    LOAD_IMG2IMG = "load-img2img"
    LOAD_INPAINT = "load-inpaint"
    SWITCH_TXT2IMG = "switch-txt2img"
    SWITCH_IMG2IMG = "switch-img2img"
    SWITCH_INPAINT = "switch-inpaint"
    RECOMPILE = "recompile"
    RECOMPILED = "recompiled"
    RECOMPILE_ROLLED_BACK = "recompile-rolled-back"
    RECOMPILE_ABANDONED = "recompile-abandoned"
    UNLOAD = "unload"

    @classmethod
    def load(cls, mode: Mode) -> Trigger:
        """Return the trigger that puts ``mode`` in service when nothing is."""
        return cls(f"load-{mode}")

    @classmethod
    def switch(cls, mode: Mode) -> Trigger:
        """Return the trigger that puts ``mode`` in service in place of another."""
        return cls(f"switch-{mode}")


class Row(NamedTuple):
    """One legal move: ``trigger``, fired in ``source``, leads to ``dest``."""

    trigger: Trigger
    source: State
    dest: State

    def __str__(self) -> str:
        return f"{self.trigger}: {self.source} -> {self.dest}"


def _rows(mode: Mode) -> Iterator[Row]:
    unloaded, compiled, recompiling = State.UNLOADED, State.compiled(mode), State.recompiling(mode)
    others = [State.compiled(other) for other in Mode if other is not mode]
    # fmt: off
    #         fired                          in           leads to
    yield Row(Trigger.load(mode),            unloaded,    compiled)
    for other in others:
        yield Row(Trigger.switch(mode),      other,       compiled)
    yield Row(Trigger.RECOMPILE,             compiled,    recompiling)
    yield Row(Trigger.RECOMPILED,            recompiling, compiled)
    yield Row(Trigger.RECOMPILE_ROLLED_BACK, recompiling, compiled)
    yield Row(Trigger.RECOMPILE_ABANDONED,   recompiling, unloaded)
    yield Row(Trigger.UNLOAD,                recompiling, unloaded)
    yield Row(Trigger.UNLOAD,                compiled,    unloaded)
    # fmt: on


@dataclass(frozen=True)
class Chart:
    """
    Legal moves that have been checked: a wrong chart cannot be built.

    Args:
        rows: Every legal move; their order is that of `legal` and of the picture.

    Raises:
        ChartError: A row holds something that is no trigger or no state; two rows have one trigger
            and source; a state is out of reach or has no way to ``unloaded``; a trigger has no row
            or leads to another mode than it names; or a recompile could begin or end in another
            mode than its own, cannot return, or has a trigger that tells modes apart.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        faults = list(self._strangers()) or [*self._loose_ends(), *self._lost_places()]
        if faults:
            raise ChartError("\n- ".join(["this chart is refused, change its rows:", *faults]))

    def legal(self, state: str) -> tuple[Trigger, ...]:
        """Return the triggers that may be fired in ``state``, in the order of the rows."""
        return tuple(row.trigger for row in self.rows if row.source == state)

    def dest(self, trigger: str, state: str) -> State:
        """
        Return the state to which ``trigger`` leads from ``state``.

        Raises:
            IllegalTransition: No row has this trigger and this source.
        """
        for row in self.rows:
            if (row.trigger, row.source) == (trigger, state):
                return row.dest
        raise IllegalTransition(trigger, state, self.legal(state))

    def _strangers(self) -> Iterator[str]:
        for row in self.rows:
            for value, kind in zip(row, (Trigger, State, State), strict=True):
                if not isinstance(value, kind):
                    near = get_close_matches(value, list(kind), n=1)
                    hint = "".join(f"; is {kind(name)!r} meant?" for name in near)
                    yield f"{row}: {value!r} is not a member of {kind.__name__}{hint}"

    def _loose_ends(self) -> Iterator[str]:
        moves = {(row.source, row.dest) for row in self.rows}
        for (trigger, source), count in Counter(row[:2] for row in self.rows).items():
            if count > 1:
                yield f"{trigger} from {source} stands on {count} rows: keep one of them"
        for state in sorted(set(State) - _reach(moves)):
            yield f"{state} is out of reach: no way leads there from {State.UNLOADED}"
        for state in sorted(set(State) - _reach({(dest, source) for source, dest in moves})):
            yield f"{state} is a trap: no way leads from there to {State.UNLOADED}"
        for trigger in sorted(set(Trigger) - {row.trigger for row in self.rows}):
            yield f"{trigger} has no row: it could never be fired"

    def _lost_places(self) -> Iterator[str]:
        for mode in Mode:
            compiled, recompiling = State.compiled(mode), State.recompiling(mode)
            named = (Trigger.load(mode), Trigger.switch(mode))
            if not any(row[1:] == (recompiling, compiled) for row in self.rows):
                yield f"{recompiling} cannot return to {compiled}"
            for row in self.rows:
                if row.source is recompiling and row.dest not in (compiled, State.UNLOADED):
                    yield f"{row}: a recompile ends where it began, or unloaded"
                if row.dest is recompiling and row.source is not compiled:
                    yield f"{row}: {recompiling} would claim an origin that it does not have"
                if row.trigger in named and row.dest is not compiled:
                    yield f"{row}: the trigger names {mode}"
        for trigger in Trigger:
            ends = [end for row in self.rows if row.trigger is trigger for end in row[1:]]
            origins = {end.mode for end in ends if end.is_recompiling}
            if origins and origins != set(Mode):
                yield (
                    f"{trigger} ends the recompiles of some modes only: "
                    f"to fire it would be to choose a mode"
                )


def _reach(moves: set[tuple[State, State]]) -> set[State]:
    reached = {State.UNLOADED}
    while ahead := {dest for source, dest in moves if source in reached} - reached:
        reached |= ahead
    return reached


CHART = Chart(tuple(row for mode in Mode for row in _rows(mode)))
