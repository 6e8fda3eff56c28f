"""Random walks of thousands of steps, by a worker whose work and whose log fail at random."""

from __future__ import annotations

import enum
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from holdfast.states import CHART, IllegalTransition, Lifecycle, Mode, State, Trigger

TABLE = {(row.source, row.trigger): row.dest for row in CHART.rows}
MODAL = [make(mode) for mode in Mode for make in (Trigger.load, Trigger.switch)]


class Fate(enum.Enum):
    """How a recompile goes."""

    DONE = "every component compiled"
    FAILED = "a component failed, the old ones are in service"
    LOST = "a component failed, the old ones were freed first"
    UNLOADED = "somebody unloaded meanwhile"
    STUCK = "the worker died in the middle"


class Worker:
    """
    Moves a lifecycle as an engine does: work stands between the triggers and fails where it likes.

    Its log loses nothing, yet now and then raises after it has written.
    """

    def __init__(self) -> None:
        self.log: list[dict[str, object]] = []
        self.log_fails = False
        self.lifecycle = Lifecycle(self.emit)
        self.origins: list[tuple[Mode, State]] = []

    def emit(self, event: str, /, **facts: object) -> None:
        self.log.append({"event": event, **facts})
        if self.log_fails:
            raise OSError("the disk is full")

    def recompile(self, fate: Fate) -> None:
        origin = self.lifecycle.mode
        self.lifecycle.fire(Trigger.RECOMPILE)
        try:
            self.compile(fate)
        except MemoryError:
            self.lifecycle.fire(Trigger.RECOMPILE_ABANDONED)
        except RuntimeError:
            self.lifecycle.fire(Trigger.RECOMPILE_ROLLED_BACK)
        except InterruptedError:
            self.lifecycle.fire(Trigger.UNLOAD)
        except SystemError:
            return
        else:
            self.lifecycle.fire(Trigger.RECOMPILED)
        self.origins.append((origin, self.lifecycle.state))

    def compile(self, fate: Fate) -> None:
        for trigger in MODAL:  # a confused caller names a mode in the middle of the work
            with pytest.raises(IllegalTransition):
                self.lifecycle.fire(trigger)
        faults = {
            Fate.FAILED: RuntimeError("the UNet does not compile"),
            Fate.LOST: MemoryError("nothing is left"),
            Fate.UNLOADED: InterruptedError("the host wants its memory back"),
            Fate.STUCK: SystemError("the worker is gone"),
        }
        if fate in faults:
            raise faults[fate]

    def check(self) -> None:
        """Assert, from the log alone, that it replays and that no recompile changed its mode."""
        state, origin = State.UNLOADED, None
        for entry in self.log:
            if entry["event"] == "state.refused":
                assert entry["state"] == state
                assert (state, entry["trigger"]) not in TABLE
                continue
            dest = TABLE[state, entry["trigger"]]
            assert (entry["source"], entry["dest"]) == (state, dest)
            if dest.is_recompiling:
                origin = state.mode
            if state.is_recompiling or dest.is_recompiling:
                assert entry["origin"] == origin
            if state.is_recompiling:
                assert dest in (State.compiled(origin), State.UNLOADED)
            state = dest
        assert state is self.lifecycle.state
        for origin, end in self.origins:
            assert end.mode in (origin, None)


class Walk(RuleBasedStateMachine):
    """A worker beside a model that is one dict and one variable."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker()
        self.model = State.UNLOADED

    @rule(trigger=st.sampled_from([*Trigger, "fly"]))
    def fire(self, trigger: str) -> None:
        if (dest := TABLE.get((self.model, trigger))) is None:
            with pytest.raises(IllegalTransition):
                self.worker.lifecycle.fire(trigger)
        else:
            assert self.worker.lifecycle.fire(trigger) is dest
            self.model = dest

    @precondition(lambda self: self.model.is_compiled)
    @rule(fate=st.sampled_from(Fate))
    def recompile(self, fate: Fate) -> None:
        ends = {
            Fate.LOST: State.UNLOADED,
            Fate.UNLOADED: State.UNLOADED,
            Fate.STUCK: State.recompiling(self.model.mode),
        }
        self.worker.recompile(fate)
        self.model = ends.get(fate, self.model)

    @rule(fails=st.booleans())
    def let_the_log_fail(self, fails: bool) -> None:  # noqa: FBT001 - hypothesis passes it by name
        self.worker.log_fails = fails

    @invariant()
    def the_machine_stands_where_the_model_stands(self) -> None:
        lifecycle = self.worker.lifecycle
        assert lifecycle.state is self.model
        assert lifecycle.mode is self.model.mode
        assert {(self.model, trigger) for trigger in lifecycle.legal()} == {
            move for move in TABLE if move[0] is self.model
        }

    def teardown(self) -> None:
        self.worker.check()


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=100, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_a_walk_of_five_thousand_steps_loses_no_place(seed: int) -> None:
    """After 5000 steps the log replays into the state, every move was made, no mode was lost."""
    chance, worker, steps = random.Random(seed), Worker(), 5000  # noqa: S311 - a walk is no secret
    for _ in range(steps):
        worker.log_fails = chance.random() < 0.05
        if worker.lifecycle.state.is_compiled and chance.random() < 0.5:
            worker.recompile(chance.choice(list(Fate)))
            continue
        trigger = chance.choice(list(Trigger))
        if trigger in worker.lifecycle.legal():
            worker.lifecycle.fire(trigger)
        else:
            with pytest.raises(IllegalTransition):
                worker.lifecycle.fire(trigger)
    worker.check()
    events = Counter(entry["event"] for entry in worker.log)
    assert len(worker.log) == events["state.changed"] + events["state.refused"] > steps
    travelled = {(e["trigger"], e["source"], e["dest"]) for e in worker.log if "dest" in e}
    assert travelled == set(CHART.rows)
