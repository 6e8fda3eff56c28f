from __future__ import annotations

import datetime as dt
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from holdfast.engine.cli.log import app
from holdfast.engine.logbook.axis import Axis
from holdfast.engine.logbook.drawing import svg
from holdfast.engine.logbook.reading import log_lines, read
from holdfast.engine.logbook.timeline import TooMuch, lanes
from holdfast.engine.logbook.writing import line
from tests.support.audited import events_of
from tests.support.doctored import of_many_requests, one

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Callable[[Path], Any]]:
    """Shows the timeline of a log in a browser; its script may not complain."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome here to open the page in")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def opened(log: Path) -> Any:
            drawn(log, tmp_path / "page.html")
            page.goto((tmp_path / "page.html").as_uri())
            return page

        yield opened
        browser.close()
    assert complaints == []


@pytest.fixture
def opened_page(open_page: Callable[[Path], Any], stranger_log: Path) -> Any:
    """The timeline of a log with errors."""
    return open_page(stranger_log)


def here(page: Any) -> int:
    """The line that the page shows as the present one."""
    return int(page.locator("li.here").get_attribute("value"))


def test_errors_are_walked_and_zoomed_to(opened_page: Any, stranger_log: Path) -> None:
    """The keys n and p go to each error in turn, f zooms to the first, 0 shows all again."""
    events = events_of(stranger_log)
    errors = [number for number, event in enumerate(events, start=1) if event["level"] == "error"]
    width = opened_page.locator("svg.plot").bounding_box()["width"]
    for error in (*errors, errors[0]):
        opened_page.keyboard.press("n")
        assert here(opened_page) == error
    opened_page.keyboard.press("p")
    assert here(opened_page) == errors[-1]
    opened_page.keyboard.press("f")
    assert here(opened_page) == errors[0]
    assert opened_page.locator("svg.plot").bounding_box()["width"] > width
    box = opened_page.locator(".bar.here rect").bounding_box()
    assert 0 <= box["x"] <= 1400
    opened_page.keyboard.press("0")
    assert opened_page.locator("svg.plot").bounding_box()["width"] == width
    assert opened_page.locator("#verdict a").first.inner_text() == f"Line {errors[0]}"


def test_search_goes_over_every_line_and_event_name(opened_page: Any, stranger_log: Path) -> None:
    """What is looked for is counted over all lines, by an event's name too, and walked by Enter."""
    events = events_of(stranger_log)
    places = [n for n, event in enumerate(events, start=1) if event["event"] == "cancel.observed"]
    opened_page.fill("#find", "cancel.observed")
    assert opened_page.inner_text("#count") == f"{len(places)} found"
    for number, place in enumerate(places, start=1):
        opened_page.keyboard.press("Enter")
        assert here(opened_page) == place
        assert opened_page.inner_text("#count") == f"{number} of {len(places)} found"


def test_request_is_zoomed_to(opened_page: Any) -> None:
    """A request that is chosen fills the page, and the selection can be zoomed to again."""
    option = opened_page.locator("#request option", has_text="hires-3").first
    opened_page.select_option("#request", value=option.get_attribute("value"))
    rect = opened_page.locator(".bar.request.here rect")
    wide = rect.bounding_box()["width"]
    assert 900 < wide < 1300
    opened_page.keyboard.press("0")
    opened_page.keyboard.press("z")
    assert rect.bounding_box()["width"] == pytest.approx(wide, rel=0.01)


def test_page_of_300_requests_is_searched_and_walked(
    open_page: Callable[[Path], Any], crowd_log: Path, tmp_path: Path
) -> None:
    """A page of 300 requests has a bar for each; one is found, walked to, and zoomed to."""
    events = of_many_requests(events_of(crowd_log), "hires-10", 290)
    log = tmp_path / "many.jsonl"
    log.write_bytes(b"".join(map(line, events)))
    page = open_page(log)
    requests = page.locator(".plot .bar.request")
    assert requests.count() == 300
    wanted = [
        n for n, event in enumerate(events, start=1) if event.get("request_id") == "again-250"
    ]
    page.fill("#find", "again-250")
    assert page.inner_text("#count") == f"{len(wanted)} found"
    for place in (*wanted, wanted[0]):
        page.keyboard.press("Enter")
        assert here(page) == place
    page.fill("#find", "pass.started")
    assert page.inner_text("#count") == "600 found"
    assert requests.nth(259).locator("rect").first.bounding_box()["width"] < 20
    option = page.locator("#request option", has_text="again-250").first
    page.select_option("#request", value=option.get_attribute("value"))
    assert 900 < page.locator(".bar.request.here rect").bounding_box()["width"] < 1300


def test_two_runs_in_one_file_are_not_squeezed(hires_log: Path) -> None:
    """Each engine has an axis of its own, and what is idle within one is folded."""
    runs = []
    idle_until = one(events_of(hires_log), "request.queued", request_id="hires-2")["seq"]
    for number in range(2):
        for event in events_of(hires_log):
            at = dt.datetime.fromisoformat(event["timestamp"]) + dt.timedelta(days=number)
            at += dt.timedelta(hours=5 * (number == 1 and event["seq"] >= idle_until))
            runs.append({**event, "engine_id": f"run{number}", "timestamp": at.isoformat()})
    axes = [
        Axis([bar for row in each.bars.values() for bar in row])
        for each in lanes(read(map(line, runs)))
    ]
    for axis, each in zip(axes, lanes(read(map(line, runs))), strict=True):
        (hires, *_) = each.bars["requests"]
        assert axis.share(hires.end) - axis.share(hires.begin) > 0.1
    folds = [piece for piece in axes[1].pieces if piece.is_fold]
    assert any(piece.end - piece.begin > 4 * 3600 for piece in folds)
    assert all(piece.right - piece.left < 0.02 for piece in folds)
    assert axes[1].pieces[-1].right == pytest.approx(1.0)


def test_name_of_the_output_decides_its_format_or_is_refused(
    hires_log: Path, tmp_path: Path
) -> None:
    """An ending that is no format's is refused in words, unless the format is given."""
    run = CliRunner().invoke
    refused = run(app, ["timeline", str(hires_log), "-o", str(tmp_path / "log.png")])
    assert refused.exit_code == 2
    assert not (tmp_path / "log.png").exists()
    given = ["timeline", str(hires_log), "-o", str(tmp_path / "log.png"), "--format", "svg"]
    assert run(app, given).exit_code == 0
    assert (tmp_path / "log.png").read_text().startswith("<?xml")


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
