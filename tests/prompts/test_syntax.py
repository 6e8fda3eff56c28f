from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.prompts.syntax import Moment, Span, read_a1111, read_plain

PIECES = st.sampled_from([
    "(", ")", "[", "]", ":", "|", "\\", "AND", "BREAK", "a", "word", " ", ",", ":1.2)", ":0.5]",
    ":3]", ":.7", "<lora:ink:0.8>", "<", ">", "猫", "\n",
])  # fmt: skip
TANGLED = st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=80)
PLAIN = st.text(max_size=80).filter(
    lambda text: not re.search(r"[\\()\[\]]|\bAND|\bBREAK|<(lora|lyco|hypernet):", text)
)


def spans(text: str, step: int = 1, steps: int = 10) -> list[tuple[str | None, float]]:
    """Return what the first branch of a prompt says at a step."""
    found = read_a1111(text).branches[0].at(Moment(step, steps))
    return [(span.text, round(span.weight, 6)) for span in found]


def texts(text: str, moments: list[Moment]) -> list[str]:
    """Return what a prompt says at each step, weights aside."""
    branch = read_a1111(text).branches[0]
    return ["".join(span.text or "" for span in branch.at(moment)) for moment in moments]


@given(text=TANGLED)
def test_every_text_is_a_prompt(text: str) -> None:
    """Whatever a text holds, it is read, and says something at each step."""
    for branch in read_a1111(text).branches:
        for step in range(1, 4):
            assert all(isinstance(span, Span) for span in branch.at(Moment(step, 3)))


@given(text=PLAIN)
def test_plain_text_comes_back_unchanged(text: str) -> None:
    """A prompt that uses none of the syntax is one span of weight 1, to the character."""
    assert spans(text) == ([(text, 1.0)] if text else [])


@given(text=st.text(max_size=80))
def test_in_plain_mode_every_text_is_itself(text: str) -> None:
    """Where the syntax is off, brackets are text."""
    (branch,) = read_plain(text).branches
    assert branch.at(Moment(1, 1)) == ((Span(text),) if text else ())


@given(text=st.text(alphabet="ab ()[]:|\\", max_size=40))
def test_what_is_escaped_is_text(text: str) -> None:
    """A backslash before a character of the syntax makes text of it."""
    escaped = re.sub(r"[()\[\]:|\\]", r"\\\g<0>", text)
    assert spans(escaped) == ([(text, 1.0)] if text else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("a (tree:1.3), [fog]", [("a ", 1), ("tree", 1.3), (", ", 1), ("fog", 0.909091)]),
        ("((sky))(sea)", [("sky", 1.21), ("sea", 1.1)]),
        ("((house:1.5) [on] it:2)", [("house", 3), (" ", 2), ("on", 1.818182), (" it", 2)]),
        ("(tree: 1.3 )", [("tree", 1.3)]),
        ("(tree:-0.5)", [("tree", -0.5)]),
        ("(tree:.5)(sea:0)", [("tree", 0.5), ("sea", 0)]),
        (r"a \(literal\] \\ word", [(r"a (literal] \ word", 1)]),
        ("(not closed", [("not closed", 1.1)]),
        ("[not closed", [("not closed", 0.909091)]),
        ("not opened) here]", [("not opened) here]", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b c]", 1)]),
        ("(a:b) [a:b:c]", [("a:b", 1.1), (" ", 1), ("a:b:c", 0.909091)]),
        ("(1.2.3:1.2.3)", [("1.2.3:1.2.3", 1.1)]),
        ("(a|b) c|d", [("a|b", 1.1), (" c|d", 1)]),
        ("ratio 3:2", [("ratio 3:2", 1)]),
        ("one BREAK two", [("one ", 1), (None, 1), (" two", 1)]),
        ("(one BREAK two:2)", [("one ", 2), (None, 1), (" two", 2)]),
        ("BREAKFAST OUTBREAK", [("BREAKFAST OUTBREAK", 1)]),
        ("", []),
        ("()[]", []),
    ],
)
def test_weights_are_those_of_the_brackets(text: str, expected: list[tuple[str, float]]) -> None:
    """Brackets multiply and divide by 1.1, or give the weight; nested ones multiply."""
    assert spans(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a [cat:dog:3]", ["a cat"] * 3 + ["a dog"] * 7),
        ("a [cat:dog:0.3]", ["a cat"] * 3 + ["a dog"] * 7),
        ("a [cat:dog:.25]", ["a cat"] * 2 + ["a dog"] * 8),
        ("a[ cat: 9 ]", ["a"] * 9 + ["a cat"]),
        ("a[ cat::1]", ["a cat"] + ["a"] * 9),
        ("[cat:dog:0]", ["dog"] * 10),
        ("[cat:dog:-2]", ["dog"] * 10),
        ("[cat:dog:10]", ["cat"] * 10),
        ("[cat:dog:99]", ["cat"] * 10),
        ("[a:[b:c:4]:2]", ["a"] * 2 + ["b"] * 2 + ["c"] * 6),
        ("[cow|horse]", ["cow", "horse"] * 5),
        ("[a|b|]", ["a", "b", "", "a", "b", "", "a", "b", "", "a"]),
        ("[[a|b]:c:4]", ["a", "b", "a", "b"] + ["c"] * 6),
        ("[a|b:0.5]", ["a|b:0.5"] * 10),
    ],
)
def test_a_schedule_is_exact_to_the_step(text: str, expected: list[str]) -> None:
    """A swap at n leaves the first n steps what they were; those that alternate begin with one."""
    assert texts(text, [Moment(step, 10) for step in range(1, 11)]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a:b:0.5]", "bbbb"),
        ("[a:b:10]", "bbbb"),
        ("[a:b:1.5]", "aabb"),
        ("[a:b:13]", "aaab"),
        ("[a|b]", "abab"),
    ],
)
def test_a_schedule_goes_on_in_the_second_pass(text: str, expected: str) -> None:
    """Shares from 1 on, and steps beyond the first pass's, are those of the second one."""
    second = [Moment(step, 4, passes_before=1, steps_before=10) for step in range(1, 5)]
    assert "".join(texts(text, second)) == expected


def test_brackets_of_one_kind_stand_in_the_others() -> None:
    """A weight holds inside a schedule, and around one."""
    assert spans("[(a:2):b:3]") == [("a", 2)]
    assert spans("([a:b:3]:2)", step=4) == [("b", 2)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog AND a cat", [("a dog ", 1), (" a cat", 1)]),
        ("a dog :1.2 AND a cat:.5", [("a dog ", 1.2), (" a cat", 0.5)]),
        ("a dog:-1 AND (a cat:1.5) :2 ", [("a dog", -1), (" a cat ", 2)]),
        ("(a AND b:2) :3", [("a ", 1), (" b:2) ", 3)]),
        ("SAND ANDY", [("SAND ANDY", 1)]),
        ("one picture :2", [("one picture :2", 1)]),
    ],
)
def test_and_composes_branches(text: str, expected: list[tuple[str, float]]) -> None:
    """Each branch has the share that stands at its end, 1 where none does."""
    found = read_a1111(text).branches
    said = [("".join(s.text or "" for s in b.at(Moment(1, 1))), b.share) for b in found]
    assert said == expected


def test_tags_are_taken_out() -> None:
    """What names a network in angle brackets is no text; anything else there is."""
    text = "a <lora:ink:0.8> b<lyco:x> <3 <hypernet:y:1> <other:z>"
    assert read_a1111(text).tags == ("<lora:ink:0.8>", "<lyco:x>", "<hypernet:y:1>")
    assert spans(text) == [("a  b <3  <other:z>", 1)]


@pytest.mark.parametrize("text", ["(", "[", ")", "(a", "[a:", "([)", "[a|", "(a:1.1)", "[a:b:1]"])
def test_depth_and_length_are_no_matter(text: str) -> None:
    """Thousands of brackets, nested or crossing, are read: neither stack nor time runs out."""
    began = time.process_time()
    read_a1111(text * 3000 + "]" * 3000)
    assert time.process_time() - began < 20  # what grew with the square would take minutes
