"""Breaks into an engine's thread: raises at one of the calls of Holdfast's own functions there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import holdfast.engine
import holdfast.states
from holdfast.engine import HoldfastError
from tests.support.engines import pixels

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from holdfast.engine import Engine, EngineConfig, Txt2Img
    from holdfast.states import State

_OURS = tuple(str(Path(each.__file__).parent) for each in (holdfast.engine, holdfast.states))


class Breaker:
    """
    A profile hook that counts calls of Holdfast's functions, and raises at one of them.

    Resuming a generator is a call too, so that every `with` is broken into at both of its ends.
    Python takes the hook off where it raises: there is one fault, and none in what undoes it.

    Args:
        at: The call to raise at, counted from 1. None: count alone.
        kind: What is raised.
    """

    def __init__(self, at: int | None = None, kind: type[BaseException] = MemoryError) -> None:
        self.calls = 0
        self.where = ""
        self._at = at
        self._kind = kind

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(_OURS):
            return
        self.calls += 1
        if self.calls == self._at:
            code = frame.f_code
            self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_qualname}"
            raise self._kind(f"broken into at {self.where}")


@dataclass(frozen=True)
class Scenario:
    """
    Something that an engine is asked, which either happens whole or not at all.

    Attributes:
        name: What it is.
        ask: Asks it.
        before: Brings an engine to where it begins.
        changes: The settings that it changes.
        ends: The states in which the engine may be left where it fails; empty: where it began.
    """

    name: str
    ask: Callable[[Engine], object]
    before: Callable[[Engine], object]
    changes: dict[str, Any] = field(default_factory=dict)
    ends: tuple[State, ...] = ()

    def __str__(self) -> str:
        return self.name


class Proof:
    """
    Runs scenarios on one engine, breaks into them, and looks at what is left.

    Args:
        engine: The engine.
        request: Whose image tells which settings serve.
    """

    def __init__(self, engine: Engine, request: Txt2Img) -> None:
        self.engine = engine
        self._request = request
        self._config = engine.config
        self._images: dict[str, str] = {}

    def count(self, scenario: Scenario) -> int:
        """Return how many calls a scenario makes; once everything is warm they are fewer."""
        self.begin(scenario)
        counting = Breaker()
        self.ask(scenario, counting)
        self.check(self._config.but(**scenario.changes))
        return counting.calls

    def break_into(self, scenario: Scenario, at: int, kind: type[BaseException]) -> int:
        """
        Break into a scenario once, and make sure that nothing is half done.

        Returns:
            How many calls it made: fewer than `at` where it was over before.
        """
        self.begin(scenario)
        before = self.engine.snapshot()
        breaker = Breaker(at, kind)
        failed = self.ask(scenario, breaker)
        place = f"{scenario} broken into by {kind.__name__} at call {at}, {breaker.where}"
        after = self.engine.snapshot()
        assert not after.state.is_recompiling, place
        if failed is None:
            self.check(self._config.but(**scenario.changes), place)
            return breaker.calls
        assert isinstance(failed, (kind, HoldfastError)), (place, failed)
        assert after.config == before.config, (place, failed)
        assert after.state in (scenario.ends or (before.state,)), (place, failed)
        if not scenario.ends:
            assert set(after.held) >= set(before.held), (place, failed)
        self.check(before.config, place)
        return breaker.calls

    def begin(self, scenario: Scenario) -> None:
        """Bring the engine to where a scenario begins."""
        if self.engine.config != self._config:
            changed = {
                name: getattr(self._config, name)
                for name in type(self._config).model_fields
                if getattr(self._config, name) != getattr(self.engine.config, name)
            }
            self.engine.configure(**changed)
        scenario.before(self.engine)

    def ask(self, scenario: Scenario, breaker: Breaker) -> BaseException | None:
        """Ask it with a hook in the engine's thread; return what it fails with."""
        worker = self.engine._worker
        worker.call("hook", lambda _: sys.setprofile(breaker))
        try:
            scenario.ask(self.engine)
        except BaseException as error:  # whatever was raised inside comes out here
            if "broken" not in str(error):
                raise
            return error
        finally:
            self._unhook()
        return None

    def _unhook(self) -> None:
        """Take the hook off; where it raises after what was asked, it takes itself off."""
        try:
            self.engine._worker.call("unhook", lambda _: sys.setprofile(None))
        except BaseException as error:
            if "broken" not in str(error):
                raise

    def check(self, config: EngineConfig, place: str = "") -> None:
        """Make sure that settings and picture are those of `config`."""
        assert self.engine.config == config, place
        image = pixels(self.engine.run(self._request))
        known = self._images.setdefault(config.to_json(), image)
        assert image == known, place
