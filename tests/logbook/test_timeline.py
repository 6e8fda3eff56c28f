from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from holdfast.engine.logbook.cli import app
from holdfast.engine.logbook.drawing import svg
from holdfast.engine.logbook.read import log_lines, read
from holdfast.engine.logbook.timeline import TooMuch, lanes
from holdfast.engine.logbook.write import line

from .audited import events_of
from .doctored import one

if TYPE_CHECKING:
    from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
NASTY = '\x1b[31m\x9b31m\n</title></svg><script>document.title="taken"</script>{"event":1}'
SVG = "{http://www.w3.org/2000/svg}"


def drawn(log: Path, output: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["timeline", str(log), "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    return output.read_text()


def in_browser(page: Path, find: str) -> str:
    """The page's elements after its script has run and looked for a text."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome here to open the page in")
    ran = subprocess.run(  # noqa: S603 - the browser that was found above
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--window-size=1400,900", "--dump-dom", f"{page.as_uri()}#{find}"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in ran.stderr, ran.stderr
    return ran.stdout


@pytest.fixture
def nasty_log(hires_log: Path, tmp_path: Path) -> Path:
    events = events_of(hires_log)
    for event in events:
        event["component" if "component" in event else "kind"] = NASTY
        event["prompt"] = NASTY
        event["engine_id"] = NASTY
    path = tmp_path / "nasty.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    return path


@pytest.mark.parametrize(
    ("log", "find", "bars"),
    [
        ("hires_log", "recompiling.img2img", 1),
        ("rolled_back_log", "asked%20for%2012%20GiB", 2),
        ("crowd_log", "hires-10%20waits", 1),
    ],
)
def test_page_shows_the_log_in_a_browser(
    log: str, find: str, bars: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In a real browser the page shows every event, and its search finds the bar that tells it."""
    path = request.getfixturevalue(log)
    drawn(path, tmp_path / "page.html")
    shown = in_browser(tmp_path / "page.html", find)
    assert len(re.findall(r"<li value=", shown)) == len(events_of(path))
    assert "No rule is broken." in shown
    found = re.findall(r'<g [^>]*class="bar[^"]*\bfound\b[^"]*"[^>]*aria-label="([^"]*)"', shown)
    assert len(found) >= bars
    wanted = find.replace("%20", " ")
    assert all(wanted in html.unescape(label) for label in found)
    assert re.search(r'id="count"[^>]*>\d+ found<', shown)


def test_page_marks_what_breaks_a_rule(hires_log: Path, tmp_path: Path) -> None:
    """On the page of a log with the original bug the verdict names the line, the bar is marked."""
    events = events_of(hires_log)
    started = one(events, "pass.started", number=2)
    started["pipeline"] = "OVStableDiffusionPipeline"
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    drawn(path, tmp_path / "page.html")
    shown = in_browser(tmp_path / "page.html", "")
    number = events.index(started) + 1
    assert f'<a data-line="{number}">Line {number}</a>, pass.started breaks' in shown
    (marked,) = re.findall(r'<g (?=[^>]*class="[^"]*\bbroken\b)[^>]*data-line="(\d+)"', shown)
    assert int(marked) == number


def test_page_needs_nothing_from_the_network(hires_log: Path, tmp_path: Path) -> None:
    """The page names no other file, and tells the browser to load none."""
    page = drawn(hires_log, tmp_path / "page.html")
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(""", page)


def test_picture_is_whole_and_has_every_pass(hires_log: Path, tmp_path: Path) -> None:
    """The static picture is well-formed SVG with a bar for each pass."""
    root = ET.fromstring(drawn(hires_log, tmp_path / "log.svg"))  # noqa: S314 - our own picture
    labels = [text.text for text in root.iter(f"{SVG}text")]
    assert labels.count("2 img2img") == 3
    assert "recompiling.img2img" in labels


def test_trace_has_every_span_with_its_length(hires_log: Path, tmp_path: Path) -> None:
    """The Perfetto trace has each pass as a complete event as long as the log says, in µs."""
    trace: list[dict[str, Any]] = json.loads(drawn(hires_log, tmp_path / "log.json"))["traceEvents"]
    passes = [each for each in trace if each.get("cat") in ("txt2img", "img2img")]
    told = [e["seconds"] for e in events_of(hires_log) if e["event"] == "pass.completed"]
    assert [each["dur"] / 1e6 for each in passes] == pytest.approx(told, abs=0.05)
    assert {each["ph"] for each in trace} == {"M", "X", "i", "C"}
    names = {each["args"]["name"] for each in trace if each["name"] == "thread_name"}
    assert {"state", "requests", "passes", "unet"} <= names


def test_text_in_a_log_is_only_ever_text(nasty_log: Path, tmp_path: Path) -> None:
    """Markup, escapes and newlines in a log are shown as text: nothing of it runs or breaks out."""
    page = drawn(nasty_log, tmp_path / "page.html")
    assert "<script>document" not in page
    assert "\x1b" not in page
    ET.fromstring(drawn(nasty_log, tmp_path / "log.svg"))  # noqa: S314 - our own picture
    shown = in_browser(tmp_path / "page.html", "unet")
    assert "<title>nasty.jsonl</title>" in shown


@pytest.mark.parametrize("kind", ["html", "svg", "json"])
def test_prompts_are_drawn_only_where_that_is_asked_for(
    kind: str, hires_log: Path, tmp_path: Path
) -> None:
    """Of a log with prompts the drawing shows none, unless it is told to."""
    events = events_of(hires_log)
    one(events, "prompt.encoded")["prompt"] = "portrait of Zebulon Quill"
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    assert "Zebulon" not in drawn(path, tmp_path / f"log.{kind}")
    assert "Zebulon" in drawn(path, tmp_path / f"log.{kind}", "--with-prompts")


def test_log_with_more_than_a_page_can_show_is_refused(hires_log: Path) -> None:
    """A log with too many bars, or none, is refused in words; steps are left out first."""
    engines = lanes(read(log_lines(hires_log)))
    bars = sum(len(each) for lane in engines for each in lane.bars.values())
    assert 'class="bar step' in svg(engines, limit=bars)
    assert 'class="bar step' not in svg(engines, limit=bars - 1)
    with pytest.raises(TooMuch, match="more than the 5"):
        svg(engines, limit=5)
    with pytest.raises(TooMuch, match="nothing to draw"):
        svg([])
