from __future__ import annotations

import pytest

from holdfast.states import CHART, Lifecycle, State


class Log(list[tuple[str, str, dict[str, object]]]):
    """A list of (event, level, facts), filled by being called."""

    def __call__(self, event: str, /, *, level: str = "info", **facts: object) -> None:
        self.append((event, level, facts))


def route(goal: State) -> list[str]:
    """Return triggers that lead from unloaded to the goal, found in the chart breadth first."""
    routes: dict[State, list[str]] = {State.UNLOADED: []}
    for state in (waiting := [State.UNLOADED]):
        for trigger in CHART.legal(state):
            if (dest := CHART.dest(trigger, state)) not in routes:
                routes[dest] = [*routes[state], trigger]
                waiting.append(dest)
    return routes[goal]


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def lifecycle(log: Log) -> Lifecycle:
    """Return a new lifecycle that writes into ``log``."""
    return Lifecycle(log)


@pytest.fixture
def lifecycle_in(log: Log):
    """Return a function that makes a lifecycle standing in a given state, its log empty."""

    def make(state: State) -> Lifecycle:
        lifecycle = Lifecycle(log)
        for trigger in route(state):
            lifecycle.fire(trigger)
        log.clear()
        return lifecycle

    return make
