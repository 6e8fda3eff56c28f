"""A log of somebody who took every wrong turn, read as a maintainer would read it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from holdfast.engine.cli.log import app
from holdfast.engine.demo import style_lora
from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.coverage import coverage
from holdfast.engine.logbook.events import COMMON, EVENTS
from holdfast.engine.logbook.reading import Entry, log_lines, read
from tests.support.audited import events_of
from tests.support.logs import STRANGERS

if TYPE_CHECKING:
    from pathlib import Path

# What happened, why, and what then: each is one line of `holdfast log show`.
STORY = {
    "how it was set": r"opened for CPU: demo; set to .*precision f32.*queue_limit 1.*cores.* GiB",
    "where it ran": r"load-1 +device CPU is .*, no driver of its own, .*plugin \d{4}\.",
    "a load": r"load-1 +load done in .*the state is compiled-txt2img",
    "a second load": r"load-2 +load failed .*compiled-txt2img: IllegalTransition: .*load-txt2img",
    "a hires": r"hires-3 +done in .*: hires \d+x\d+, seeds 7; .*pass 1 .*pass 2",
    "how it was made": r"hires-3 +pass 2: img2img on .*strength 0.5, guidance 7, .*3 steps",
    "a LoRA": r"configure-4 +settings changed: lora none -> stripes@0.8",
    "why it recompiled": r"configure-4 +.* -> recompiling.img2img \(recompile; lora: .*stripes@0.8",
    "a damaged LoRA": r"configure-5 +configure failed .*compiled-img2img: LoraError: .*damaged",
    "a budget too small": r"configure-6 +configure failed .*InvalidRequest: .*is 1 MiB",
    "what does not fit": r"configure-6 +plan: .*does not fit into the memory budget",
    "no such mode": r"switch-7 +refused, switch .*InvalidRequest: the mode 'inpainting'",
    "no such setting": r"configure-8 +refused, configure .*InvalidRequest: .*steps",
    "a full queue": r"hires-11 +refused, hires .*QueueFull: .*the limit is 1",
    "a cancel in the queue": r"hires-10 +hires cancelled after",
    "a cancel at work": r"hires-9 +cancelled after .*hires",
    "a deadline": r"hires-12 +asked to stop \(its deadline of 1 s passed\)",
    "an unload": r"unload-13 +compiled-\w+ -> unloaded \(unload; asked for",
    "a recompile of nothing": r"recompile-14 +recompile refused in unloaded: legal are",
    "a closed engine": r"hires-15 +refused, hires .*EngineClosed: .*open another",
}


@pytest.fixture(scope="session")
def story(stranger_log: Path) -> str:
    told = CliRunner().invoke(app, ["show", str(stranger_log)])
    assert told.exit_code == 0
    return told.output


@pytest.mark.parametrize("line", STORY.values(), ids=STORY)
def test_each_turn_is_one_line_that_says_what_why_and_what_then(line: str, story: str) -> None:
    """For each thing that happened one line of the story answers what, why and what then."""
    assert re.search(line, story), story


def test_nothing_that_went_wrong_is_told_twice(story: str) -> None:
    """The text of an error stands once in the story, however many events it went through."""
    for text in ("damaged.safetensors", "the mode 'inpainting'", "the limit is 1"):
        assert story.count(text) == 1, text


def test_every_failure_is_a_warning_or_an_error(stranger_log: Path) -> None:
    """Of every job that did not end well the log shows one at level warning."""
    told = CliRunner().invoke(app, ["show", "--level", "warning", str(stranger_log)]).output
    told = "\n".join(line for line in told.splitlines() if "torchvision" not in line)
    for number in (2, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15):
        assert re.search(rf"\w-{number} ", told), number
    assert not re.search(r"(load-1|hires-3|configure-4|unload-13) ", told)


def test_log_of_a_stranger_breaks_no_rule(stranger_log: Path) -> None:
    """Whatever a host does wrong, the engine does right; waiting jobs are told apart."""
    verdict = audit(read(log_lines(stranger_log)))
    assert (verdict.clean, verdict.complete) == (True, True), verdict


def test_every_key_is_in_the_reference(stranger_log: Path) -> None:
    """No event has a key that the reference of events does not have."""
    of_scope = {"request_id", "pass", "mode"}
    for event in events_of(stranger_log):
        spec = EVENTS[event["event"]]
        assert event.keys() <= {*COMMON, *spec.keys, *spec.optional, *of_scope}, event["event"]


def test_nothing_of_it_tells_a_prompt_or_a_path(stranger_log: Path) -> None:
    """Neither a prompt nor a folder's name stands in a log, unless it was asked for."""
    text = stranger_log.read_text()
    assert STRANGERS.prompt not in text
    for folder in (stranger_log.parent, style_lora().parent):
        assert str(folder) not in text


@pytest.fixture
def logs(
    stranger_log: Path, hires_log: Path, rolled_back_log: Path, crowd_log: Path
) -> dict[str, list[Entry]]:
    paths = (stranger_log, hires_log, rolled_back_log, crowd_log)
    return {
        path.parent.name: [each for each in read(log_lines(path)) if isinstance(each, Entry)]
        for path in paths
    }


def test_little_of_the_time_is_explained_by_nothing(logs: dict[str, list[Entry]]) -> None:
    """Of the time that jobs took, at most 5 % is told by no span and no event with its seconds."""
    told = {name: coverage(entries) for name, entries in logs.items()}
    of_engines = [engine for each in told.values() for engine in each.values()]
    seconds = sum(each.seconds for each in of_engines)
    assert seconds > 1
    assert sum(each.unexplained for each in of_engines) <= 0.05 * seconds, told


def test_every_request_is_listed(stranger_log: Path) -> None:
    """Each request is one line: size, passes, seconds, how it ended, why, and where."""
    lines = CliRunner().invoke(app, ["requests", str(stranger_log)]).output.splitlines()
    by_id = {line.split()[2]: line for line in lines}
    assert by_id.keys() == {f"hires-{number}" for number in (3, 9, 10, 11, 12, 15)}
    assert re.search(r"2 passes, .*, completed, lines \d+ to \d+$", by_id["hires-3"])
    for number, ending in {9: "cancelled", 10: "cancelled", 12: "cancelled"}.items():
        assert ending in by_id[f"hires-{number}"]
    assert "refused" in by_id["hires-11"]
    assert "QueueFull" in by_id["hires-11"]
    assert "EngineClosed" in by_id["hires-15"]
