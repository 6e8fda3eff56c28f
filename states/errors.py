"""The root of every error that Holdfast raises, and those that the lifecycle raises itself."""

from __future__ import annotations

from typing import Any


class HoldfastError(Exception):
    """
    Root of every error that Holdfast raises on purpose.

    The text says what was asked, what is the case, and what to do.

    Attributes:
        state_after: Value of the lifecycle state in which the error left the engine
            (for example ``"compiled-img2img"``), or ``None`` where no engine is involved.
        log_text: What the log says of it where the message quotes what must not stand there,
            such as a prompt; ``None``: the message.
    """

    state_after: str | None
    log_text: str | None

    def __init__(
        self, message: str, *, state_after: str | None = None, log_text: str | None = None
    ) -> None:
        super().__init__(message)
        self.state_after = state_after
        self.log_text = log_text

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made again from its text alone, which a class with further
        # arguments refuses: a process pool would break on such an error instead of raising it.
        return _made_again, (type(self), self.args), vars(self)


class IllegalTransition(HoldfastError):  # noqa: N818 - the name is part of the public contract
    """
    A trigger was fired in a state from which the chart has no such edge. Nothing has changed.

    Attributes:
        trigger: The refused trigger's value.
        state: The state's value, before and after.
        legal: Values of the triggers that the chart allows in that state.
    """

    def __init__(self, trigger: str, state: str, legal: tuple[str, ...]) -> None:
        super().__init__(
            f"{trigger} was fired in state {state}, where the chart has no such move; the state "
            f"is unchanged. Possible there: {', '.join(legal) or 'nothing'}.",
            state_after=str(state),
        )
        self.trigger = str(trigger)
        self.state = str(state)
        self.legal = tuple(map(str, legal))


class ChartError(HoldfastError, ValueError):
    """A chart of the lifecycle was refused when it was built; the text lists every fault."""


def _made_again(kind: type[HoldfastError], arguments: tuple[object, ...]) -> HoldfastError:
    return kind.__new__(kind, *arguments)
