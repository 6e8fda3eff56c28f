"""
One pipeline's place on the chart, and the one door through which it moves.

`transitions` does the moving; no other file imports it. Work is done between triggers and never
inside one, so a failure in the work leaves a state that is true.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

from transitions.extensions.nesting import HierarchicalMachine, NestedState

from .chart import CHART, Chart, Mode, Row, State, Trigger
from .errors import HoldfastError, IllegalTransition
from .hosting import HostLog, host_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_OWN_FACTS = frozenset({"event", "level", "source", "dest", "origin", "seconds"})


class Emit(Protocol):
    """Takes one event of the log: its name, its level and its facts."""

    def __call__(self, event: str, /, *, level: str = "info", **facts: object) -> None:
        """Log the event."""


class _Node(NestedState):
    """A state that runs nothing when it is entered or left, and says nothing to the host's log."""

    separator = "."

    def enter(self, event_data: object) -> None:
        """Do nothing: no work is done inside a move."""

    def exit(self, event_data: object) -> None:
        """Do nothing: no work is done inside a move."""


class _Machine(HierarchicalMachine):
    state_cls = _Node


class _Place:
    """What the machine moves, and alone writes: ``state``, and the triggers that it adds."""

    state: str
    trigger: Callable[[str], bool]
    may_trigger: Callable[[str], bool]


class Lifecycle:
    """
    The state of one compiled pipeline. It begins ``unloaded``.

    The state is readable from any thread. `fire` is the owner's: a move that is fired while
    another is under way (from a second thread, or from inside ``emit``) is refused.

    Args:
        emit: Where events go; by default to structlog over ``logging.getLogger("holdfast")``,
            silent until the host configures either. One with a true attribute ``all_or_nothing``
            has not logged an event where it raised, and is asked once more.
        chart: The legal moves.
    """

    __slots__ = ("_chart", "_emit", "_machine", "_moving", "_place", "_since")

    def __init__(self, emit: Emit | None = None, chart: Chart = CHART) -> None:
        self._chart = chart
        self._emit = _log if emit is None else emit
        self._moving = threading.Lock()
        self._place = _Place()
        self._machine = _Machine(
            model=self._place,
            states=[state.value for state in State],
            initial=State.UNLOADED.value,
            transitions=[[end.value for end in row] for row in chart.rows],
            auto_transitions=False,
        )
        # It is given a way anywhere even where automatic transitions are off.
        vars(self._place).pop("to", None)
        self._since = time.monotonic()

    def __repr__(self) -> str:
        return f"<Lifecycle [{self.state}]>"

    @property
    def state(self) -> State:
        """Where the pipeline stands."""
        return State(self._place.state)

    @property
    def mode(self) -> Mode | None:
        """The mode in service or, in a recompile, the one it began in; None when unloaded."""
        return self.state.mode

    def legal(self) -> tuple[Trigger, ...]:
        """Return the triggers that may be fired now."""
        return self._chart.legal(self.state)

    def edges(self) -> tuple[Row, ...]:
        """Return every move that the machine really can make, read back from the machine."""
        return tuple(
            Row(Trigger(name), State(edge.source), State(str(edge.dest)))
            for name, event in self._machine.events.items()
            for edges in event.transitions.values()
            for edge in edges
        )

    def fire(self, trigger: str, *, reason: str = "", **facts: object) -> State:
        """
        Move, and log one event: ``state.changed``, or ``state.refused`` where the move is illegal.

        The event is logged when the move is over. An ``emit`` that raises neither undoes the move
        nor hides it: its exception and the event go to ``logging.getLogger("holdfast")``. What is
        no ``Exception``, as Ctrl-C, is raised after the move: `state` tells whether it was made.

        Args:
            trigger: What happened, or is asked for.
            reason: Why, for a reader of the log (``"height: 512 -> 768"``).
            **facts: Further facts for ``state.changed``; it names itself ``trigger``, ``source``,
                ``dest``, ``reason``, ``seconds`` (spent in the source) and, into and out of a
                recompile, ``origin`` (the mode it began in).

        Returns:
            The state after the move.

        Raises:
            IllegalTransition: The chart has no such move. The state is unchanged.
            HoldfastError: Another move is under way. Nothing was done or logged.
            TypeError: A fact has a name that the event gives itself. Nothing was done or logged.
        """
        if taken := _OWN_FACTS & facts.keys():
            raise TypeError(f"the event itself has a fact named {', '.join(sorted(taken))}")
        if not self._moving.acquire(blocking=False):
            raise HoldfastError(
                f"{trigger} was fired while another move is being made or logged; "
                "fire it when that one has returned.",
                state_after=self.state.value,
            )
        try:
            return self._move(trigger, reason, facts)
        finally:
            self._moving.release()

    def _move(self, trigger: str, reason: str, facts: dict[str, object]) -> State:
        source = self.state
        if not self._place.may_trigger(trigger):
            refusal = IllegalTransition(trigger, source, self.legal())
            refused = {"trigger": refusal.trigger, "state": refusal.state, "legal": refusal.legal}
            try:
                self._emit("state.refused", level="warning", **refused)
            except BaseException as error:  # noqa: BLE001 - raised again there
                self._tell_after(error, "state.refused", "warning", refused)
            raise refusal
        dest = self._chart.dest(trigger, source)
        own = {
            "trigger": str(trigger),
            "source": source.value,
            "dest": dest.value,
            "reason": reason,
        }
        if recompiling := [end for end in (source, dest) if end.is_recompiling]:
            own["origin"] = str(recompiling[0].mode)
        # From the move to its event nothing is called that could break: a move is always told.
        broken: BaseException | None = None
        try:
            self._place.trigger(trigger)
        except BaseException as error:
            if self._place.state == source.value:
                raise
            broken = error  # by something from outside, after the move was made
        since, self._since = self._since, time.monotonic()
        changed = own | {"seconds": self._since - since} | facts
        try:
            self._emit("state.changed", level="info", **changed)
        except BaseException as error:  # noqa: BLE001 - raised again there
            self._tell_after(error, "state.changed", "info", changed)
        if broken is not None and not isinstance(broken, Exception):
            raise broken
        return dest

    def _tell_after(
        self, error: BaseException, event: str, level: str, facts: Mapping[str, object]
    ) -> None:
        """Tell an event whose telling was broken into by `error`, which is raised if it must be."""
        if getattr(self._emit, "all_or_nothing", False):
            self._emit(event, level=level, **facts)
        elif isinstance(error, Exception):
            host_logger().error("%s could not be logged: %s", event, facts, exc_info=error)
        if not isinstance(error, Exception):
            raise error


def _log(event: str, /, *, level: str = "info", **facts: object) -> None:
    HostLog()(event, level, facts)
