from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine import Engine
from holdfast.engine.logbook.auditing import Verdict, audit
from holdfast.engine.logbook.reading import read
from holdfast.engine.logbook.rules import RULES
from holdfast.engine.logbook.writing import line

if TYPE_CHECKING:
    from pathlib import Path

from tests.support.audited import Journals, assert_clean, assert_sound, events_of
from tests.support.doctored import DOCTORED, Doctoring, one, renumber


def audited(events: list[dict[str, Any]]) -> Verdict:
    return audit(read(line(event) for event in events))


@pytest.mark.parametrize("log", ["hires_log", "detail_log", "rolled_back_log", "crowd_log"])
def test_log_of_a_sound_engine_is_whole_and_breaks_no_rule(
    log: str, request: pytest.FixtureRequest
) -> None:
    """The log of a sound engine is whole, breaks no rule, and adds up to its own snapshot."""
    assert_clean(request.getfixturevalue(log))


@pytest.mark.parametrize("doctoring", DOCTORED, ids=lambda d: f"{d.rule}: {d.change}")
def test_audit_finds_exactly_the_rule_that_a_doctored_log_breaks(
    doctoring: Doctoring, request: pytest.FixtureRequest
) -> None:
    """Audit finds in a doctored log the one rule that it breaks, and no other."""
    events = events_of(request.getfixturevalue(doctoring.log))
    doctoring.apply(events)
    verdict = audited(events)
    assert set(verdict.engines[0].counts) == {doctoring.rule}
    assert verdict.engines[0].breaches[0].words


def test_every_rule_has_a_doctored_log() -> None:
    """No rule of the table is without a log that breaks it."""
    assert {rule.id for rule in RULES} == {doctoring.rule for doctoring in DOCTORED}


@pytest.mark.parametrize("doctoring", DOCTORED, ids=lambda d: f"{d.rule}: {d.change}")
def test_test_whose_engine_breaks_a_rule_fails(
    doctoring: Doctoring, request: pytest.FixtureRequest
) -> None:
    """What every log of every test is held against fails on each doctored log."""
    events = events_of(request.getfixturevalue(doctoring.log))
    doctoring.apply(events)
    with pytest.raises(AssertionError):
        assert_sound([line(event) for event in events], whole=True)


@pytest.mark.parametrize("spoil", [{"state": "unloaded"}, {"held": []}, {"lora": ["ink@0.8"]}])
def test_test_whose_engine_is_not_where_its_log_says_fails(
    spoil: dict[str, Any], hires_log: Path
) -> None:
    """A snapshot other than what the events add up to fails the test that made the log."""
    events = events_of(hires_log)
    one(events, "engine.snapshot").update(spoil)
    with pytest.raises(AssertionError):
        assert_sound([line(event) for event in events], whole=True)


def test_every_engine_of_a_test_is_listened_to(journals: Journals) -> None:
    """The log of an engine that is opened and closed is there to be judged, without any file."""
    with Engine():
        pass
    (lines,) = journals.take(closed=True)
    assert_sound(lines, whole=True)
    assert json.loads(lines[0])["event"] == "engine.opened"


def test_breach_names_line_event_and_fault(hires_log: Path) -> None:
    """A breach tells the line, the number and the name of the event, and what is wrong."""
    events = events_of(hires_log)
    event = one(events, "pass.started", number=2)
    event["pipeline"] = "OVStableDiffusionPipeline"
    breach = audited(events).engines[0].breaches[0]
    assert (breach.line, breach.seq, breach.event) == (
        events.index(event) + 1,
        event["seq"],
        "pass.started",
    )
    assert "OVStableDiffusionPipeline" in breach.words


@given(data=st.data())
def test_jobs_that_are_cancelled_while_they_wait_touch_no_other(
    hires_events: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Jobs that are queued and cancelled beside the one that runs change nothing told of it."""
    events = [dict(event) for event in hires_events]
    for number in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(1, len(events) - 2))
        about = {**events[0], "request_id": f"txt2img-{90 + number}", "kind": "txt2img"}
        for event in (
            {"event": "request.queued", "ahead": 1},
            {"event": "cancel.requested", "keep": "nothing", "why": "the holder asked for it"},
            {
                "event": "cancel.observed",
                "phase": "queued",
                "seconds_to_stop": 0.0,
                "kept": "nothing",
            },
            {"event": "job.cancelled", "state": "unloaded", "seconds": 0.1},
        ):
            place = data.draw(st.integers(place, len(events) - 1))
            events.insert(place, {**about, **event})
            place += 1
    renumber(events)
    assert_sound([line(event) for event in events], whole=True)
    for event in events:
        if event["event"] == "component.compile.completed":
            event["component"] = "another"  # its plan is still in force, and finds that
            break
    assert "plan" in audited(events).engines[0].counts


def test_device_that_fell_back_with_a_word_breaks_no_rule(hires_log: Path) -> None:
    """A device other than the one asked for is no breach where the log tells of the degradation."""
    events = events_of(hires_log)
    told = {**events[0], "event": "degradation", "kind": "device", "asked": "GPU", "given": "CPU"}
    events.insert(1, told)
    renumber(events)
    one(events, "component.compile.completed")["device_asked"] = "GPU"
    assert audited(events).clean


def test_what_a_log_does_not_tell_is_held_against_nobody(hires_log: Path) -> None:
    """A log in which compiles do not tell their LoRAs breaks no rule about them."""
    events = events_of(hires_log)
    for event in events:
        if event["event"].startswith("component.compile."):
            event.pop("lora", None)
    assert audited(events).clean


def test_log_that_ends_in_a_compile_is_cut_off_and_not_broken(hires_log: Path) -> None:
    """A log that stops inside a compile is told as cut off, with what it ended in and how long."""
    events = events_of(hires_log)
    started = one(events, "component.compile.started", component="unet")
    beat = {**started, "event": "compile.heartbeat", "seq": started["seq"] + 1}
    beat["timestamp"] = "2999-01-01T00:00:41+00:00"
    started["timestamp"] = "2999-01-01T00:00:00+00:00"
    verdict = audited([*events[: events.index(started) + 1], beat])
    assert verdict.clean
    assert not verdict.complete
    assert verdict.engines[0].missing == ["ended during component.compile of unet, 41 s in"]


def test_log_without_debug_events_is_incomplete_and_not_broken(hires_log: Path) -> None:
    """A log from which the host left out level debug breaks no rule and is told as incomplete."""
    events = [event for event in events_of(hires_log) if event["level"] != "debug"]
    verdict = audited(events)
    assert verdict.clean
    assert not verdict.complete


def test_several_engines_in_one_log_are_judged_apart(hires_log: Path, crowd_log: Path) -> None:
    """Engines whose events are interleaved in one file are each held against the rules."""
    one_engine, other = events_of(hires_log), events_of(crowd_log)
    for event in other:
        event["engine_id"] = "other"
    one(other, "pass.started", number=2)["pipeline"] = "OVStableDiffusionPipeline"
    mixed = [e for pair in zip(one_engine, other, strict=False) for e in pair]
    mixed += other[len(one_engine) :]
    verdict = audited(mixed)
    assert [dict(engine.counts) for engine in verdict.engines] == [{}, {"pipeline": 1}]
    assert verdict.complete
