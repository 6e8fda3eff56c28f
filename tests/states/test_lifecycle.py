from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import structlog
from structlog.testing import capture_logs

from holdfast.states import (
    CHART,
    HoldfastError,
    IllegalTransition,
    Lifecycle,
    Mode,
    State,
    Trigger,
)

if TYPE_CHECKING:
    from collections.abc import Callable

TABLE = {(row.trigger, row.source): row.dest for row in CHART.rows}
LEGAL = sorted(TABLE)
ILLEGAL = sorted(set(itertools.product([*Trigger, "fly", ""], State)) - set(TABLE))


def test_the_machine_has_the_edges_of_the_chart_and_no_other(lifecycle: Lifecycle) -> None:
    """Read back from the machine, the moves are exactly the rows of the chart."""
    assert sorted(lifecycle.edges()) == sorted(CHART.rows)


def test_the_recompiles_are_children_of_one_composite_state(lifecycle: Lifecycle) -> None:
    """The machine nests them: recompiling has one child for each mode, and no other has any."""
    children = {name: [*state.states] for name, state in lifecycle._machine.states.items()}
    assert children.pop("recompiling") == [*Mode]
    assert children == {state: [] for state in State if not state.is_recompiling}


@pytest.mark.parametrize(("trigger", "source"), LEGAL)
def test_a_legal_move_ends_where_the_chart_says(
    trigger: str, source: State, lifecycle_in: Callable[[State], Lifecycle], log: list
) -> None:
    """A legal move returns and reaches the row's destination, and logs one state.changed."""
    lifecycle = lifecycle_in(source)
    dest = lifecycle.fire(trigger, reason="asked by a test", rss_bytes=7)
    assert dest is lifecycle.state is TABLE[trigger, source]
    assert lifecycle.mode is dest.mode
    [(event, level, facts)] = log
    assert (event, level) == ("state.changed", "info")
    assert facts.pop("seconds") >= 0
    for recompiling in {source, dest} & {*map(State.recompiling, Mode)}:
        assert facts.pop("origin") == recompiling.mode
    assert facts == {
        "trigger": trigger,
        "source": source,
        "dest": dest,
        "reason": "asked by a test",
        "rss_bytes": 7,
    }


@pytest.mark.parametrize(("trigger", "state"), ILLEGAL)
def test_an_illegal_move_changes_nothing(
    trigger: str, state: State, lifecycle_in: Callable[[State], Lifecycle], log: list
) -> None:
    """An illegal move raises, logs one state.refused, and leaves the state and what it allows."""
    lifecycle = lifecycle_in(state)
    legal = lifecycle.legal()
    with pytest.raises(IllegalTransition) as refused:
        lifecycle.fire(trigger)
    assert lifecycle.state is state
    assert lifecycle.legal() == legal == CHART.legal(state)
    facts = {"trigger": trigger, "state": state, "legal": legal}
    assert log == [("state.refused", "warning", facts)]
    error = refused.value
    assert (error.trigger, error.state, error.legal) == (trigger, state, legal)
    assert error.state_after == state


def test_the_product_of_states_and_triggers_is_whole() -> None:
    """Every pair of a state and a trigger is tested above, as a move or as a refusal."""
    assert len(LEGAL) + len(ILLEGAL) == len(State) * (len(Trigger) + 2)


@pytest.mark.parametrize("name", ["state", "mode", "_state", "origin", "anything"])
def test_nothing_can_be_assigned(name: str, lifecycle: Lifecycle) -> None:
    """The state has no setter, and an attribute that does not exist cannot come into being."""
    with pytest.raises(AttributeError):
        setattr(lifecycle, name, State.COMPILED_IMG2IMG)
    assert lifecycle.state is State.UNLOADED


def test_the_state_cannot_be_deleted(lifecycle: Lifecycle) -> None:
    """The state has no deleter either."""
    with pytest.raises(AttributeError):
        del lifecycle.state


def test_there_are_no_automatic_transitions(lifecycle: Lifecycle) -> None:
    """Neither the machine nor what it moves has a way straight to a state."""
    assert set(lifecycle._machine.events) == set(Trigger)
    assert [name for name in dir(lifecycle._place) if name == "to" or name.startswith("to_")] == []
    for state in State:
        with pytest.raises(IllegalTransition):
            lifecycle.fire(f"to_{state}")


def test_facts_are_plain_data(lifecycle: Lifecycle, log: list) -> None:
    """What is logged holds strings and numbers and no enumerations, so it reads well everywhere."""
    for trigger in ("load-txt2img", Trigger.RECOMPILE, Trigger.RECOMPILED):
        lifecycle.fire(trigger)
    with pytest.raises(IllegalTransition):
        lifecycle.fire(Trigger.LOAD_TXT2IMG)
    values = [v for _, _, facts in log for v in facts.values()]
    assert {type(value) for value in values} == {str, float, tuple}
    assert {type(name) for name in log[-1][2]["legal"]} == {str}
    assert json.loads(json.dumps(log[-1][2]))["legal"] == list(lifecycle.legal())


@pytest.mark.parametrize("fact", ["source", "dest", "origin", "seconds", "event", "level"])
def test_a_fact_cannot_hide_one_of_the_event(fact: str, lifecycle: Lifecycle, log: list) -> None:
    """A fact with the name of one that the event gives itself is a TypeError before the move."""
    with pytest.raises(TypeError, match=fact):
        lifecycle.fire(Trigger.LOAD_TXT2IMG, **{fact: "mine"})
    assert (lifecycle.state, log) == (State.UNLOADED, [])


def test_seconds_are_those_spent_in_the_source(monkeypatch: pytest.MonkeyPatch, log: list) -> None:
    """The event of a move tells how long the state that it leaves has lasted."""
    clock = iter([100.0, 102.5, 110.0])
    monkeypatch.setattr("holdfast.states.lifecycle.time.monotonic", lambda: next(clock))
    lifecycle = Lifecycle(log)
    with pytest.raises(IllegalTransition):
        lifecycle.fire(Trigger.UNLOAD)
    lifecycle.fire(Trigger.LOAD_TXT2IMG)
    lifecycle.fire(Trigger.UNLOAD)
    assert [facts["seconds"] for event, _, facts in log if event == "state.changed"] == [2.5, 7.5]


def test_the_state_is_in_the_repr(lifecycle: Lifecycle) -> None:
    """The repr shows the state."""
    lifecycle.fire(Trigger.LOAD_IMG2IMG)
    assert repr(lifecycle) == "<Lifecycle [compiled-img2img]>"


def test_two_lifecycles_are_independent() -> None:
    """A move of one lifecycle leaves another where it is."""
    one, other = Lifecycle(), Lifecycle()
    one.fire(Trigger.LOAD_TXT2IMG)
    assert (one.state, other.state) == (State.COMPILED_TXT2IMG, State.UNLOADED)


class TestWhenTheLogFails:
    @staticmethod
    def broken(event: str, /, *, level: str = "info", **facts: object) -> None:
        raise OSError(f"the disk is full: {event} {level} {sorted(facts)}")

    def test_the_move_stands(self, caplog: pytest.LogCaptureFixture) -> None:
        """An emit that raises does not undo a move, nor does fire raise; the event is kept."""
        lifecycle = Lifecycle(self.broken)
        assert lifecycle.fire(Trigger.LOAD_TXT2IMG) is State.COMPILED_TXT2IMG
        assert lifecycle.state is State.COMPILED_TXT2IMG
        [record] = [r for r in caplog.records if r.name == "holdfast"]
        assert record.levelno == logging.ERROR
        assert record.exc_info[0] is OSError
        assert "state.changed" in record.getMessage()
        assert "'dest': 'compiled-txt2img'" in record.getMessage()

    def test_a_refusal_stays_a_refusal(self, caplog: pytest.LogCaptureFixture) -> None:
        """An emit that raises does not hide that the move was illegal."""
        lifecycle = Lifecycle(self.broken)
        with pytest.raises(IllegalTransition):
            lifecycle.fire(Trigger.UNLOAD)
        assert lifecycle.state is State.UNLOADED
        assert [r.getMessage()[:13] for r in caplog.records if r.name == "holdfast"] == [
            "state.refused"
        ]

    def test_an_interrupt_passes_and_leaves_a_true_state(self) -> None:
        """A KeyboardInterrupt in emit reaches the caller; the move stands, the next one works."""

        def interrupted(event: str, /, **_: object) -> None:
            raise KeyboardInterrupt(event)

        lifecycle = Lifecycle(interrupted)
        with pytest.raises(KeyboardInterrupt):
            lifecycle.fire(Trigger.LOAD_TXT2IMG)
        assert lifecycle.state is State.COMPILED_TXT2IMG
        with pytest.raises(KeyboardInterrupt):
            lifecycle.fire(Trigger.UNLOAD)
        assert lifecycle.state is State.UNLOADED


class TestOneMoveAtATime:
    def test_a_move_from_inside_the_log_is_refused(self) -> None:
        """Firing from inside emit raises, changes nothing and logs nothing; later moves work."""
        seen: list[tuple[str, State]] = []

        def emit(event: str, /, **_: object) -> None:
            seen.append((event, lifecycle.state))
            with pytest.raises(HoldfastError, match="another move"):
                lifecycle.fire(Trigger.UNLOAD)

        lifecycle = Lifecycle(emit)
        assert lifecycle.fire(Trigger.LOAD_TXT2IMG) is State.COMPILED_TXT2IMG
        assert lifecycle.fire(Trigger.UNLOAD) is State.UNLOADED
        assert seen == [
            ("state.changed", State.COMPILED_TXT2IMG),
            ("state.changed", State.UNLOADED),
        ]

    def test_a_move_from_another_thread_meanwhile_is_refused(self) -> None:
        """While one thread moves, another can read the state, and its own move is refused."""
        logging_now, may_end = threading.Event(), threading.Event()

        def emit(_event: str, /, **_: object) -> None:
            logging_now.set()
            assert may_end.wait(60)

        lifecycle = Lifecycle(emit)
        owner = threading.Thread(target=lifecycle.fire, args=(Trigger.LOAD_TXT2IMG,))
        owner.start()
        assert logging_now.wait(60)
        assert lifecycle.state is State.COMPILED_TXT2IMG
        assert lifecycle.legal() == CHART.legal(State.COMPILED_TXT2IMG)
        with pytest.raises(HoldfastError, match="another move"):
            lifecycle.fire(Trigger.UNLOAD)
        may_end.set()
        owner.join()
        assert lifecycle.state is State.COMPILED_TXT2IMG

    def test_every_reading_in_a_storm_of_moves_is_true(self) -> None:
        """Readers beside an owner that moves a thousand times never meet half a move."""
        lifecycle, done = Lifecycle(lambda _event, /, **_: None), threading.Event()
        circle = [Trigger.LOAD_TXT2IMG, Trigger.RECOMPILE, Trigger.RECOMPILED, Trigger.UNLOAD]
        visited = {State.UNLOADED, State.COMPILED_TXT2IMG, State.RECOMPILING_TXT2IMG}

        def read() -> set[State]:
            seen = {lifecycle.state}
            while not done.is_set():
                seen.add(lifecycle.state)
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            for trigger in circle * 250:
                lifecycle.fire(trigger)
            done.set()
        for reader in readers:
            assert reader.result() <= visited


class TestByDefault:
    def test_events_are_seen_by_capture_logs(self) -> None:
        """Without an emit of its own, a lifecycle logs through structlog, on any of its levels."""
        with capture_logs() as logs:
            lifecycle = Lifecycle()
            lifecycle.fire(Trigger.LOAD_TXT2IMG)
            with pytest.raises(IllegalTransition):
                lifecycle.fire(Trigger.RECOMPILED)
        assert [(entry["event"], entry["log_level"]) for entry in logs] == [
            ("state.changed", "info"),
            ("state.refused", "warning"),
        ]

    def test_events_go_to_the_logger_holdfast(self, caplog: pytest.LogCaptureFixture) -> None:
        """They reach the standard logger "holdfast", where a host routes them."""
        caplog.set_level(logging.INFO)
        Lifecycle().fire(Trigger.LOAD_TXT2IMG)
        assert [record.name for record in caplog.records] == ["holdfast"]
        assert "state.changed" in caplog.text

    def test_structlog_is_left_as_it_was(self) -> None:
        """A lifecycle configures nothing."""
        before = structlog.get_config()
        Lifecycle().fire(Trigger.LOAD_TXT2IMG)
        assert structlog.get_config() == before


def test_a_refusal_survives_a_pickle() -> None:
    """A host's process pool can carry an IllegalTransition home, with all that it knows."""
    error = IllegalTransition("recompile", "unloaded", ("load-txt2img",))
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
        assert type(twin) is IllegalTransition
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
