"""
The one place that decides what is done: (what is, what is asked) -> the steps, each with a reason.

Pure: it reads no file, touches no model, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from holdfast.engine.compiling.keys import ComponentKey, GraphKey
    from holdfast.engine.requests.cadence import Evaluations
    from holdfast.engine.requests.config import Policy
    from holdfast.states import Mode

Action = Literal[
    "download", "export", "quantize", "read", "fuse", "compile", "reuse", "evict",
    "load", "switch", "recompile",
]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """
    What one step takes.

    Attributes:
        seconds: Learned from earlier runs; None if there were none.
        bytes: Memory that it adds (compile) or gives back (evict).
    """

    seconds: float | None = None
    bytes: int = 0


@dataclass(frozen=True)
class Step:
    """
    One thing to do.

    Attributes:
        action: What.
        subject: The component, the mode that a ``load``, ``switch`` or ``recompile`` ends in, or
            the model of a ``download`` or ``export``.
        key: Digest of the component's key; empty for a change of state.
        reason: The fields that call for it, ``"field: old -> new"``.
        cost: What it is expected to take.
    """

    action: Action
    subject: str
    key: str = ""
    reason: str = ""
    cost: Cost = field(default=Cost(), compare=False)

    def __str__(self) -> str:
        return " ".join(part for part in (self.action, self.subject, self.key) if part)


@dataclass(frozen=True)
class Stage:
    """What one pass needs: a mode, and the key of each component in service."""

    mode: Mode
    keys: Mapping[str, ComponentKey]


@dataclass(frozen=True)
class Standing:
    """
    What is: all that a plan depends on beside the request.

    Attributes:
        mode: In service; None when unloaded.
        service: The key in service for each component.
        held: Every compiled component with its bytes, least recently used first.
        graphs: Those that are read.
        absent: Those that must be quantized before they can be read.
        budget: Bytes that all held components may take; None: no limit.
        policy: ``"stage_first"`` keeps what serves until its successor is compiled,
            ``"evict_first"`` gives it up first, ``"auto"`` only where the budget is too small.
    """

    mode: Mode | None = None
    service: Mapping[str, ComponentKey] = field(default_factory=dict)
    held: Mapping[ComponentKey, int] = field(default_factory=dict)
    graphs: frozenset[GraphKey] = frozenset()
    absent: frozenset[GraphKey] = frozenset()
    budget: int | None = None
    policy: Policy = "auto"


@dataclass(frozen=True)
class Move:
    """
    One transaction: afterwards exactly `service` serves, or what served before does.

    Attributes:
        action: ``"load"``, ``"switch"`` and ``"recompile"`` change the lifecycle's state (the
            last one and back again); ``"reuse"`` puts held components in service, nothing else.
        mode: In service afterwards.
        service: The key in service for each component afterwards.
        steps: What is quantized, read, evicted, fused, compiled and reused, in this order.
        reason: Of the change of state.
    """

    action: Action
    mode: Mode
    service: Mapping[str, ComponentKey]
    steps: tuple[Step, ...]
    reason: str

    @property
    def evicts_first(self) -> bool:
        """Whether a component that serves is given up before its successor is compiled."""
        return any(step.action == "evict" and step.reason in _OLD_FIRST for step in self.steps)

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps with the change of state among them, as they are taken."""
        change = Step(self.action, str(self.mode), reason=self.reason)
        if self.action == "reuse":
            return self.steps
        return (change, *self.steps) if self.action == "recompile" else (*self.steps, change)


@dataclass(frozen=True)
class PassCost:
    """
    What one pass takes, once everything that it needs is in service.

    Attributes:
        evaluations: Of the denoiser, for each image.
        seconds: For all images, learned from earlier runs; None if there were none.
    """

    evaluations: Evaluations
    seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Plan:
    """
    What will be done, in order.

    Attributes:
        ahead: Downloads and exports that come first. If there are any, later steps are only partly
            known, and their bytes are not.
        stages: The moves before each pass; empty where everything needed is in service.
        peak_bytes: The most that compiled components will hold at once.
        budget: The limit that was planned for; None: no limit.
        imports: What importing the libraries that a pass needs takes, where they are not there yet.
        passes: What each pass of a request takes.
    """

    stages: tuple[tuple[Move, ...], ...]
    peak_bytes: int
    budget: int | None
    ahead: tuple[Step, ...] = ()
    imports: Cost | None = None
    passes: tuple[PassCost, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step, in order."""
        moves = (move for moves in self.stages for move in moves)
        return (*self.ahead, *(step for move in moves for step in move.all_steps))

    @property
    def fits(self) -> bool:
        """Whether the budget can hold what each pass needs."""
        return self.budget is None or self.peak_bytes <= self.budget

    @property
    def compiles(self) -> tuple[str, ...]:
        """Names of the components that will be compiled, in order."""
        return tuple(step.subject for step in self.steps if step.action == "compile")

    @property
    def expected_seconds(self) -> float | None:
        """Sum over imports and steps; None if one of them was never measured."""
        seconds = [step.cost.seconds for step in self.steps if step.action in _TIMED]
        seconds += [] if self.imports is None else [self.imports.seconds]
        known = [each for each in seconds if each is not None]
        return sum(known) if len(known) == len(seconds) else None

    @property
    def expected_bytes(self) -> int:
        """Bytes by which the compiled components will grow; negative: shrink."""
        signs = {"compile": 1, "evict": -1}
        return sum(signs.get(step.action, 0) * step.cost.bytes for step in self.steps)

    def __str__(self) -> str:
        shortened = [
            f"pass {number}: {each.evaluations} evaluations; {_seconds(each.seconds)}"
            for number, each in enumerate(self.passes, start=1)
            if each.evaluations.cheap
        ]
        if not self.steps and self.imports is None:
            return "\n".join(["nothing to do: everything needed is in service", *shortened])
        rows = []
        if self.imports is not None:
            took = _seconds(self.imports.seconds)
            rows.append(("import", "libraries", "", took, "", "not in this process yet"))
        for step in self.steps:
            took = _seconds(step.cost.seconds) if step.action in _TIMED else ""
            size = f"{step.cost.bytes / 2**20:.0f} MiB" if step.cost.bytes else ""
            rows.append((step.action, step.subject, step.key, took, size, step.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        limit = "no budget set" if self.budget is None else f"budget {self.budget / 2**20:.0f} MiB"
        verdict = "fits" if self.fits else "does not fit"
        peak = "unknown" if self.ahead else f"{self.peak_bytes / 2**20:.0f} MiB"
        sums = f"in all {_seconds(self.expected_seconds)}; peak {peak}, {limit}"
        return "\n".join([*table, sums if self.ahead else f"{sums}: {verdict}", *shortened])


_TIMED = ("download", "export", "quantize", "read", "fuse", "compile")
_EVICT_FIRST = "evict_first was asked for"
_NO_ROOM = "the memory budget cannot hold old and new"
_BUDGET = "memory budget"
_OLD_FIRST = (_EVICT_FIRST, _NO_ROOM)
_AGAIN = "asked for"


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} s"


def plan(
    now: Standing, stages: Sequence[Stage], price: Callable[[Action, ComponentKey], Cost]
) -> Plan:
    """
    Decide what to do so that each stage can be served in turn.

    Args:
        now: Where the engine stands.
        stages: One for each pass, in order.
        price: What an action on a component takes; `Cost.bytes` of a compile must be exact.
    """
    walk = _Walk(now, price)
    needs = [frozenset(stage.keys.values()) for stage in stages]
    moves = tuple(
        tuple(walk.to(stage, frozenset().union(*needs[number:])))
        for number, stage in enumerate(stages)
    )
    return Plan(moves, walk.peak, now.budget)


def plan_again(now: Standing, price: Callable[[Action, ComponentKey], Cost]) -> Plan:
    """
    Decide how everything that serves is compiled anew, though nothing has changed.

    Args:
        now: Where the engine stands; a mode must be in service.
        price: As for `plan`.
    """
    walk = _Walk(now, price)
    move = walk.again()
    return Plan(((move,),), walk.peak, now.budget)


class _Walk:
    """Goes through the stages on a copy of the standing."""

    def __init__(self, now: Standing, price: Callable[[Action, ComponentKey], Cost]) -> None:
        self._mode = now.mode
        self._service = dict(now.service)
        self._held = dict(now.held)
        self._graphs = set(now.graphs)
        self._absent = now.absent
        self._budget = now.budget
        self._policy = now.policy
        self._price = price
        self.peak = 0

    def to(self, stage: Stage, wanted: frozenset[ComponentKey]) -> Iterator[Move]:
        """Yield the moves to a stage; `wanted` is what it and the ones after it need."""
        if self._mode is None:
            yield self._move("load", stage.mode, stage.keys, wanted, f"mode: none -> {stage.mode}")
        elif self._mode is not stage.mode:
            kept = {name: self._service.get(name, key) for name, key in stage.keys.items()}
            reason = f"mode: {self._mode} -> {stage.mode}"
            yield self._move("switch", stage.mode, kept, wanted, reason)
        if self._service != stage.keys:
            compiles = any(key not in self._held for key in stage.keys.values())
            action: Action = "recompile" if compiles else "reuse"
            changes = [
                change
                for name, key in stage.keys.items()
                for change in self._changes(name, key, stage.mode)
            ]
            reason = ", ".join(dict.fromkeys(changes))
            yield self._move(action, stage.mode, stage.keys, wanted, reason)
        elif self._over(0):
            yield self._move("reuse", stage.mode, stage.keys, wanted, _BUDGET)

    def again(self) -> Move:
        if self._mode is None:
            raise ValueError("nothing is in service that could be compiled again")
        keys = list(self._service.values())
        steps = [*self._read(keys), *self._make_room(keys, frozenset(), frozenset())]
        others = sum(self._held.values())
        for key in keys:
            steps += self._compile(key, _AGAIN)
        self.peak = others + sum(self._held[key] for key in keys)
        return Move("recompile", self._mode, dict(self._service), tuple(steps), _AGAIN)

    def _move(
        self,
        action: Action,
        mode: Mode,
        service: Mapping[str, ComponentKey],
        wanted: frozenset[ComponentKey],
        reason: str,
    ) -> Move:
        fresh = {name: key for name, key in service.items() if self._service.get(name) != key}
        missing = [key for key in fresh.values() if key not in self._held]
        kept = frozenset(service.values()).difference(missing)
        steps = [*self._read(missing), *self._make_room(missing, wanted, kept)]
        for name, key in fresh.items():
            why = ", ".join(self._changes(name, key, mode))
            if key in missing:
                steps += self._compile(key, why)
            else:
                steps.append(self._step("reuse", key, why, Cost()))
        self._mode, self._service = mode, dict(service)
        for key in service.values():
            self._held[key] = self._held.pop(key)
        self.peak = max(self.peak, sum(self._held.values()))
        return Move(action, mode, dict(service), tuple(steps), reason)

    def _changes(self, name: str, key: ComponentKey, mode: Mode) -> tuple[str, ...]:
        old = self._service.get(name)
        return (f"{mode} needs it",) if old is None else key.changes_from(old)

    def _read(self, missing: Iterable[ComponentKey]) -> Iterator[Step]:
        """Read every graph before anything is given up or compiled for it."""
        for key in missing:
            if key.graph not in self._graphs:
                self._graphs.add(key.graph)
                if key.graph in self._absent:
                    cost = self._price("quantize", key)
                    yield self._step("quantize", key, "not quantized yet", cost)
                yield self._step("read", key, "not read yet", self._price("read", key))

    def _make_room(
        self,
        missing: Sequence[ComponentKey],
        wanted: frozenset[ComponentKey],
        kept: frozenset[ComponentKey],
    ) -> Iterator[Step]:
        """
        Evict the least recently used until the missing fit.

        What serves until one of the missing replaces it goes after what is idle; what is `wanted`
        again later goes last, and what is `kept` in service not at all.
        """
        needed = sum(self._price("compile", key).bytes for key in missing)
        serving = set(self._service.values())
        replaced = [self._service[k.component] for k in missing if k.component in self._service]
        later = wanted.difference(missing)
        if self._policy == "evict_first":
            for key in replaced:
                if key not in later:
                    yield self._evict(key, _EVICT_FIRST)
        spare = [(key, _BUDGET) for key in self._held if key not in serving | kept]
        if self._policy != "stage_first":
            spare += [(key, _NO_ROOM) for key in replaced if key in self._held]
        for key, why in sorted(spare, key=lambda each: each[0] in later):
            if self._over(needed):
                yield self._evict(key, why)

    def _over(self, needed: int) -> bool:
        return self._budget is not None and sum(self._held.values()) + needed > self._budget

    def _evict(self, key: ComponentKey, reason: str) -> Step:
        return self._step("evict", key, reason, Cost(bytes=self._held.pop(key)))

    def _compile(self, key: ComponentKey, reason: str) -> Iterator[Step]:
        if key.fused:
            yield self._step("fuse", key, reason, self._price("fuse", key))
        cost = self._price("compile", key)
        self._held[key] = cost.bytes
        yield self._step("compile", key, reason, cost)

    def _step(self, action: Action, key: ComponentKey, reason: str, cost: Cost) -> Step:
        return Step(action, key.component, key.digest, reason, cost)
