"""
Prompts as people write them, read into pieces.

A prompt is a flat list of pieces: a text, its weight, and the conditions under which it is there.
Brackets may be nested to any depth, so nothing here calls itself.
"""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lark import Lark, Token

EMPHASIS = 1.1
"""What a pair of round brackets multiplies a weight by, and a pair of square ones divides it by."""


class Moment(NamedTuple):
    """
    A step of a pass.

    Attributes:
        step: Its number, from 1 on.
        steps: Those of the pass.
        passes_before: Passes of the request that came before, as first passes do.
        steps_before: Their steps.
    """

    step: int
    steps: int
    passes_before: int = 0
    steps_before: int = 0


class When(NamedTuple):
    """
    There up to a step, or from the next one on.

    Attributes:
        text: A number as it was written: with a point a share of the pass's steps, of which the
            second pass's begin at 1; else a number of steps, of which the second pass's go on from
            the first one's.
        after: Whether it is there from then on, and not up to then.
    """

    text: str
    after: bool

    def holds(self, moment: Moment) -> bool:
        """Whether it is there at a step."""
        if "." in self.text:
            last = int((float(self.text) - moment.passes_before) * moment.steps)
        else:
            last = int(self.text) - moment.steps_before
        return (moment.step > last) is self.after


class Turn(NamedTuple):
    """
    There in turn with others, a step each.

    Attributes:
        place: Its own among those that take turns, from 0 on.
        among: How many take turns.
    """

    place: int
    among: int

    def holds(self, moment: Moment) -> bool:
        """Whether it is there at a step."""
        return (moment.step - 1) % self.among == self.place


class Span(NamedTuple):
    """
    A text of one weight.

    Attributes:
        text: None: what comes after begins a chunk of its own (``BREAK``).
        weight: 1 where none was given.
    """

    text: str | None
    weight: float = 1.0


class Piece(NamedTuple):
    """
    A span, and when it is there.

    Attributes:
        span: The text and its weight.
        conditions: All of which must hold.
    """

    span: Span
    conditions: tuple[When | Turn, ...] = ()


@dataclass(frozen=True)
class Branch:
    """
    One of the prompts that ``AND`` composes a picture of.

    Attributes:
        pieces: In order.
        share: Factor on its part in the guidance.
    """

    pieces: tuple[Piece, ...] = ()
    share: float = 1.0

    def at(self, moment: Moment) -> tuple[Span, ...]:
        """Return what is there at a step; what stands together with one weight is one span."""
        return _joined(
            piece.span for piece in self.pieces if all(c.holds(moment) for c in piece.conditions)
        )


@dataclass(frozen=True)
class Prompt:
    """
    A prompt, read.

    Attributes:
        branches: One, or those that ``AND`` composes.
        tags: What stood in angle brackets, such as ``"<lora:name:0.8>"``, in order; none of it is
            in the branches.
    """

    branches: tuple[Branch, ...]
    tags: tuple[str, ...] = ()

    @property
    def whole(self) -> Branch:
        """All of it as one branch, as a negative prompt is read: there ``AND`` is a word."""
        pieces = list(self.branches[0].pieces)
        for branch in self.branches[1:]:
            pieces += [Piece(Span("AND")), *branch.pieces]
        return Branch(tuple(pieces))


def read_plain(text: str) -> Prompt:
    """Read a prompt in which nothing has a meaning of its own."""
    return Prompt((Branch((Piece(Span(text)),) if text else ()),))


def read_a1111(text: str) -> Prompt:
    """
    Read a prompt in the syntax of AUTOMATIC1111's web UI; see ``a1111.lark``. Any text is one.

    A bracket without a partner does what it does there: one that is not closed reaches to the end
    of the prompt, and one that was not opened is text. A pair that crosses another ends with it.
    """
    branches: list[Branch] = []
    tags: list[str] = []
    tree: Any = _parser().parse(text)
    for branch in tree.children:
        prompt, share = branch.children
        pieces: list[Piece] = []
        for rule, piece in _flattened(prompt):
            if rule == "tag":
                tags.append(piece.span.text or "")
            else:
                pieces.append(piece)
        number = 1.0 if share is None else float(str(share).lstrip(": \t\r\n"))
        branches.append(Branch(tuple(pieces), number))
    return Prompt(tuple(branches), tuple(tags))


SYNTAXES: Mapping[str, Callable[[str], Prompt]] = MappingProxyType({
    "a1111": read_a1111,
    "plain": read_plain,
})  # fmt: skip
"""What reads a prompt, by the names that `EngineConfig.prompt_syntax` may have."""


@functools.cache
def _parser() -> Lark:
    from lark import Lark

    grammar = importlib.resources.files(__package__).joinpath("a1111.lark").read_text("utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", postlex=Pairing(), maybe_placeholders=True)


class Pairing:
    """
    Between lexer and parser: gives each bracket its partner, and makes text of what has none.

    A bracket that is still open at an ``AND`` or at the end is closed there. ``:`` and ``|`` have a
    function only right inside square brackets that end as the grammar says.
    """

    always_accept = ()

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """Return the tokens as the grammar takes them."""
        tokens = list(stream)
        composed = any(token.type == "_AND" for token in tokens)
        out: list[Token] = []
        open_: list[_Bracket] = []
        for token in tokens:
            match token.type:
                case "_OPEN" | "_SQUARE":
                    around = open_[-1].kinds if open_ else frozenset()
                    open_.append(_Bracket(token.type, around | {token.type}, []))
                    out.append(token)
                case "_CLOSE" | "WEIGHT":
                    self._close("_OPEN", token, open_, out)
                case "_END" | "WHEN":
                    self._close("_SQUARE", token, open_, out)
                case "_COLON" | "_BAR" if open_ and open_[-1].kind == "_SQUARE":
                    open_[-1].separators.append(len(out))
                    out.append(token)
                case "_AND" | "SHARE" if composed:
                    self._close_all(open_, out)
                    out.append(token)
                case "_COLON" | "_BAR" | "SHARE":
                    out.append(_as_text(token))
                case _:
                    out.append(token)
        self._close_all(open_, out)
        return iter(out)

    def _close(self, kind: str, token: Token, open_: list[_Bracket], out: list[Token]) -> None:
        """Close the innermost bracket of a kind, and with it those that were opened in it."""
        if not open_ or kind not in open_[-1].kinds:
            out.append(_as_text(token))
            return
        while open_[-1].kind != kind:
            self._leave_open(open_.pop(), out)
        self._pair(open_.pop(), token, out)

    def _pair(self, bracket: _Bracket, token: Token, out: list[Token]) -> None:
        """Close a bracket, and let its separators and its number stand where they have a use."""
        kinds = [out[place].type for place in bracket.separators]
        alternating = token.type == "_END" and set(kinds) == {"_BAR"}
        scheduled = token.type == "WHEN" and kinds in ([], ["_COLON"])
        if not alternating and not scheduled:
            for place in bracket.separators:
                out[place] = _as_text(out[place])
            if token.type == "WHEN":
                out.append(_token("TEXT", token[:-1]))
                token = _token("_END", "]")
        out.append(token)

    def _leave_open(self, bracket: _Bracket, out: list[Token]) -> None:
        for place in bracket.separators:
            out[place] = _as_text(out[place])
        out.append(_token("_UNCLOSED", ""))

    def _close_all(self, open_: list[_Bracket], out: list[Token]) -> None:
        while open_:
            self._leave_open(open_.pop(), out)


class _Bracket(NamedTuple):
    """An open bracket: its kind, that and those around it, and where its separators stand."""

    kind: str
    kinds: frozenset[str]
    separators: list[int]


def _token(kind: str, text: str) -> Token:
    from lark import Token

    return Token(kind, text)


def _as_text(token: Token) -> Token:
    return _token("TEXT", str(token))


def _flattened(prompt: Any) -> Iterator[tuple[str, Piece]]:
    """Yield the leaves of a tree in order: the rule of each, and the piece that it is."""
    waiting: list[tuple[Any, float, tuple[When | Turn, ...]]] = [(prompt, 1.0, ())]
    while waiting:
        tree, weight, conditions = waiting.pop()
        if tree.data in _LEAVES:
            text = _LEAVES[tree.data](tree)
            yield tree.data, Piece(Span(text, weight), conditions)
            continue
        waiting += [
            (child, weight * factor, conditions + more)
            for child, factor, more in reversed(list(_parts(tree)))
        ]


_LEAVES: Mapping[str, Callable[[Any], str | None]] = MappingProxyType({
    "text": lambda tree: str(tree.children[0]),
    "escaped": lambda tree: str(tree.children[0])[1:],
    "tag": lambda tree: str(tree.children[0]),
    "break": lambda _: None,
})  # fmt: skip


def _parts(tree: Any) -> Iterator[tuple[Any, float, tuple[When | Turn, ...]]]:
    """Yield what a rule consists of, the factor on each part's weight, and when it is there."""
    match tree.data, tree.children:
        case "stronger", [inner]:
            yield inner, EMPHASIS, ()
        case "weaker", [inner]:
            yield inner, 1 / EMPHASIS, ()
        case "weighted", [inner, number]:
            yield inner, float(_number(number)), ()
        case "added", [inner, number]:
            yield inner, 1.0, (When(_number(number), after=True),)
        case "swapped", [before, after, number]:
            yield before, 1.0, (When(_number(number), after=False),)
            yield after, 1.0, (When(_number(number), after=True),)
        case "alternating", inners:
            for place, inner in enumerate(inners):
                yield inner, 1.0, (Turn(place, len(inners)),)
        case _:
            for inner in tree.children:
                yield inner, 1.0, ()


def _number(token: str) -> str:
    return token.strip(":)] \t\r\n\f\v")


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else Span(None)
        if span.text is None:
            joined.append(Span(None))
        elif last.text is not None and last.weight == span.weight:
            joined[-1] = Span(last.text + span.text, span.weight)
        else:
            joined.append(span)
    return tuple(joined)
