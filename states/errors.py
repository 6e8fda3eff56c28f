"""The root of every error that Holdfast raises, and the one that the lifecycle raises itself."""

from __future__ import annotations


class HoldfastError(Exception):
    """
    Root of every error that Holdfast raises on purpose.

    The text says what was asked, what is the case, and what to do.

    Attributes:
        state_after: Value of the lifecycle state in which the error left the engine
            (for example ``"compiled-img2img"``), or ``None`` where no engine is involved.
    """

    state_after: str | None

    def __init__(self, message: str, *, state_after: str | None = None) -> None:
        super().__init__(message)
        self.state_after = state_after


class IllegalTransition(HoldfastError):  # noqa: N818 - the name is part of the public contract
    """
    A trigger was fired in a state from which the chart has no such edge. Nothing has changed.

    Attributes:
        trigger: The refused trigger's value.
        state: The state's value, before and after.
        legal: Values of the triggers that the chart allows in that state.
    """

    def __init__(self, trigger: str, state: str, legal: tuple[str, ...]) -> None:
        allowed = ", ".join(legal) or "nothing"
        super().__init__(
            f"{trigger!r} was asked for, but in state {state!r} only {allowed} is possible; "
            "the state is unchanged.",
            state_after=state,
        )
        self.trigger = trigger
        self.state = state
        self.legal = legal
