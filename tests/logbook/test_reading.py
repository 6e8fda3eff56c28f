from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.drawing import svg
from holdfast.engine.logbook.page import page
from holdfast.engine.logbook.perfetto import trace
from holdfast.engine.logbook.reading import (
    LONGEST,
    Entry,
    Problem,
    followed_lines,
    log_lines,
    read,
)
from holdfast.engine.logbook.redaction import Redaction
from holdfast.engine.logbook.replay import courses
from holdfast.engine.logbook.sentences import Story
from holdfast.engine.logbook.timeline import lanes
from holdfast.engine.logbook.writing import JsonLines, line
from tests.support.audited import events_of

if TYPE_CHECKING:
    from pathlib import Path

NASTY = '\x1b[31m\x9b31m\n\r\u2028\u202e</title><script>alert("x")</script>{"event":1}\x00'

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def whole(lines: list[bytes]) -> bool:
    return audit(read(lines)).complete


@pytest.fixture(scope="session", params=["hires_log", "rolled_back_log", "crowd_log"])
def lines(request: pytest.FixtureRequest) -> list[bytes]:
    """The lines of each real log."""
    return list(log_lines(request.getfixturevalue(request.param)))


def test_log_as_written_is_complete(lines: list[bytes]) -> None:
    """The logs that the other tests of this file spoil are complete as they were written."""
    assert whole(lines)


@given(st.data())
def test_log_cut_at_any_byte_is_told_as_incomplete(lines: list[bytes], data: st.DataObject) -> None:
    """A log that is cut at any byte is read to its end, and does not pass as complete."""
    log = b"".join(lines)
    end = data.draw(st.integers(0, len(log) - 1))
    assert not whole(log[:end].splitlines(keepends=True))


@given(st.data())
def test_log_that_lacks_any_line_is_told_as_incomplete(
    lines: list[bytes], data: st.DataObject
) -> None:
    """A log that lacks any one of its lines does not pass as complete."""
    number = data.draw(st.integers(0, len(lines) - 1))
    assert not whole(lines[:number] + lines[number + 1 :])


@given(st.data())
def test_log_with_any_line_doubled_is_told_as_incomplete(
    lines: list[bytes], data: st.DataObject
) -> None:
    """A log in which any line stands a second time, anywhere, does not pass as complete."""
    doubled = data.draw(st.sampled_from(lines))
    place = data.draw(st.integers(0, len(lines)))
    assert not whole([*lines[:place], doubled, *lines[place:]])


@given(st.data())
def test_log_with_any_line_elsewhere_is_told_as_incomplete(
    lines: list[bytes], data: st.DataObject
) -> None:
    """A log in which any line stands in another place does not pass as complete."""
    moved = data.draw(st.integers(0, len(lines) - 1))
    rest = lines[:moved] + lines[moved + 1 :]
    place = data.draw(st.integers(0, len(rest)).filter(lambda place: place != moved))
    assert not whole([*rest[:place], lines[moved], *rest[place:]])


@given(junk=st.lists(st.binary(max_size=80), max_size=8), data=st.data())
def test_bytes_of_any_kind_are_problems_and_spoil_no_event(
    lines: list[bytes], junk: list[bytes], data: st.DataObject
) -> None:
    """Whatever stands between the events, every event is read and nothing is raised."""
    at = data.draw(st.integers(0, len(lines)))
    noise = [each.replace(b"\n", b" ") + b"\n" for each in junk]
    items = read([*lines[:at], *noise, *lines[at:]])
    assert sum(isinstance(item, Entry) for item in items) == len(lines)


@settings(max_examples=300)
@given(value=json_values, data=st.data())
def test_event_with_any_value_under_any_key_is_judged(
    hires_events: list[dict[str, Any]], value: object, data: st.DataObject
) -> None:
    """An event whose keys hold anything at all is an event or a problem, and never an exception."""
    lines = _with_any_value(hires_events, value, data)
    verdict = audit(read(lines))
    assert len(list(courses(read(lines)))) == sum(engine.events for engine in verdict.engines)


@settings(max_examples=60)
@given(value=json_values | st.just(NASTY) | st.just(10**400), data=st.data())
def test_event_with_any_value_under_any_key_is_told_and_drawn(
    hires_events: list[dict[str, Any]], value: object, data: st.DataObject
) -> None:
    """Whatever an event holds, it is told in one printable line, and drawn as well-formed text."""
    lines = _with_any_value(hires_events, value, data)
    entries = [item for item in read(lines) if isinstance(item, Entry)]
    story = Story()
    for entry in entries:
        where, told = story.tell(entry)
        assert (where + told).plain.isprintable()
    drawn = lanes(entries)
    ET.fromstring(svg(drawn))  # noqa: S314 - our own picture
    assert json.loads(trace(drawn))["traceEvents"]
    assert "</html>" in page(drawn, entries, audit(read(lines)), "log")


def test_engine_with_a_single_event_is_drawn(hires_events: list[dict[str, Any]]) -> None:
    """Of whichever event a log consists, it makes a picture."""
    for event in hires_events:
        ET.fromstring(svg(lanes(read([line(event)]))))  # noqa: S314 - our own picture


def _with_any_value(
    events: list[dict[str, Any]], value: object, data: st.DataObject
) -> list[bytes]:
    number = data.draw(st.integers(0, len(events) - 1))
    key = data.draw(st.sampled_from(sorted(events[number])))
    return [
        line({**event, key: value} if place == number else event)
        for place, event in enumerate(events)
    ]


def test_lines_of_the_host_are_told_as_foreign_and_harm_nothing(lines: list[bytes]) -> None:
    """A host's own JSON lines in the same file are told as foreign; the log stays complete."""
    host = b'{"level":"info","message":"listening on port 80"}\n'
    verdict = audit(read([*lines[:5], host, *lines[5:]]))
    assert verdict.complete
    assert verdict.problems == [Problem(6, "foreign", "no event of a Holdfast engine")]


EVENT = b'{"event":"x","engine_id":"e","seq":1,"timestamp":86400.5}'


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (b"\0" * 4096 + EVENT + b"\n", ["broken", "event"]),
        (EVENT + b"\0" * 4096, ["event", "cut"]),
        (EVENT + b"\n" + b"\0" * 4096, ["event", "broken"]),
        (b"\xef\xbb\xbf" + EVENT + b"\n", ["event"]),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n" + EVENT + b"\n", ["broken", "event"]),
        (EVENT[:-1] + b',"a":' + b"[" * 500 + b"]" * 500 + b"}\n", ["foreign"]),
        (EVENT[:-1] + b',"a":' + b"1" * 5000 + b"}\n" + EVENT + b"\n", ["broken", "event"]),
        (b"x" * LONGEST + b"x\n" + EVENT + b"\n", ["broken", "event"]),
        (b"x" * LONGEST * 3 + b"\n" + EVENT + b"\n", ["broken", "event"]),
        (EVENT + b"\n" + b"x" * LONGEST * 2, ["event", "broken"]),
    ],
    ids=lambda value: str(len(value)),
)
def test_any_file_is_read_to_its_end(text: bytes, kinds: list[str], tmp_path: Path) -> None:
    """Zero bytes of a power cut, deep nesting, huge numbers and endless lines cost nothing else."""
    (tmp_path / "log").write_bytes(text)
    items = list(read(log_lines(tmp_path / "log")))
    assert [getattr(item, "kind", "event") for item in items] == kinds
    bundled = [Redaction({}).event(item.event) for item in items if isinstance(item, Entry)]
    assert len(bundled) == kinds.count("event")


def test_endless_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """A line far longer than any event is never held whole, in a file or followed."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(12 * LONGEST)  # a hole takes no room on the disk
        file.seek(0, 2)
        file.write(b"\n" + EVENT + b"\n")
    tracemalloc.start()
    assert sum(isinstance(item, Entry) for item in read(log_lines(path))) == 1
    followed = followed_lines(path)
    assert len(next(followed)) <= LONGEST + 1
    assert next(followed) == EVENT + b"\n"
    assert tracemalloc.get_traced_memory()[1] < 8 * LONGEST
    tracemalloc.stop()


def test_timestamps_of_a_host_that_stamps_in_seconds_are_read() -> None:
    """Seconds since 1970, which structlog's own stamper writes, are moments too."""
    (entry,) = read([b'{"event":"x","engine_id":"e","seq":1,"timestamp":86400.5}\n'])
    assert isinstance(entry, Entry)
    assert entry.at.isoformat() == "1970-01-02T00:00:00.500000+00:00"


@given(st.dictionaries(st.text(), json_values | st.text() | st.just(NASTY), max_size=4))
def test_any_event_is_one_line_that_says_the_same(facts: dict[str, Any]) -> None:
    """Whatever an event carries is one line of printable text, and read back as it was."""
    written = line(facts)
    assert written.endswith(b"\n")
    text = written[:-1].decode()
    assert len(text.splitlines()) <= 1
    assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in text)
    assert json.loads(text) == facts


class Unwritable:
    def __str__(self) -> str:
        msg = "not even this"
        raise ValueError(msg)

    __repr__ = __str__


def test_event_is_written_though_a_value_has_no_text(tmp_path: Path) -> None:
    """A value whose own str() and repr() fail costs the event nothing but that value."""
    path = tmp_path / "new" / "log.jsonl"
    with JsonLines(path) as sink:
        sink(
            {
                "event": "x",
                "seq": 1,
                "bad": Unwritable(),
                "nan": float("nan"),
                "path": tmp_path,
                "name": "caf\udce9",
            }
        )
    event = json.loads(path.read_text())
    assert event["seq"] == 1
    assert event["nan"] is None
    assert event["path"] == str(tmp_path)
    assert "Unwritable" in event["bad"]
    assert "dce9" in event["name"]


def test_next_engine_begins_on_a_line_of_its_own(
    hires_events: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The cut-off last line of a process that died does not swallow the next process's event."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, hires_events))[:-20])
    with JsonLines(path) as sink:
        for event in hires_events:
            sink({**event, "engine_id": "next"})
    verdict = audit(read(log_lines(path)))
    assert [engine.missing for engine in verdict.engines][1] == []
    assert verdict.problem_counts == {"broken": 1}


@pytest.mark.slow
def test_log_of_a_million_events_is_audited_in_bounded_memory(
    crowd_log: Path, tmp_path: Path
) -> None:
    """A million events are audited in under 300 MB, and found clean and complete."""
    path = tmp_path / "million.jsonl"
    events = events_of(crowd_log)
    names = [event["event"] for event in events]
    begin, end = [i for i, name in enumerate(names) if name == "job.started"][2:4]
    repeated = range(1_000_000 // (end - begin) + 1)
    with path.open("wb") as file:
        seq = 0
        for block in (events[:begin], *(events[begin:end] for _ in repeated), events[end:]):
            for event in block:
                seq += 1
                file.write(line({**event, "seq": seq}))
    code = (
        "import pathlib, re, sys, time\n"
        "from holdfast.engine.logbook.auditing import audit\n"
        "from holdfast.engine.logbook.reading import log_lines, read\n"
        "began = time.perf_counter()\n"
        "verdict = audit(read(log_lines(sys.argv[1])))\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]\n"
        "print(verdict.clean, verdict.complete, verdict.engines[0].events, peak,\n"
        "      time.perf_counter() - began)\n"
    )
    told = subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    ).stdout.split()
    figures = f"{told[2]} events, {float(told[4]):.1f} s, {int(told[3]) / 1024:.0f} MB"
    print(figures)  # noqa: T201 - a figure for the report; it decides nothing
    assert told[:2] == ["True", "True"]
    assert int(told[2]) >= 1_000_000
    assert int(told[3]) * 1024 < 300e6
