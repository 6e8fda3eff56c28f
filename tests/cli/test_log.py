from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from holdfast.engine.cli.log import app
from holdfast.engine.logbook.reading import followed_lines
from holdfast.engine.logbook.writing import JsonLines, line
from tests.support.audited import events_of
from tests.support.doctored import one

if TYPE_CHECKING:
    from pathlib import Path

run = CliRunner().invoke
NASTY = "\x1b[2J\x9b2J\n\r{}[red]x[/red]"


@pytest.fixture
def broken_log(hires_log: Path, tmp_path: Path) -> Path:
    events = events_of(hires_log)
    one(events, "pass.started", number=2)["pipeline"] = "OVStableDiffusionPipeline"
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    return path


def test_show_tells_each_request_with_its_passes(hires_log: Path) -> None:
    """The story has the compiles, the moves with reason and time, and both passes."""
    told = run(app, ["show", str(hires_log)]).output
    assert (
        "pass 2: img2img on OVStableDiffusionImg2ImgPipeline, 128x128, strength 0.5, guidance 7, "
        "euler, 3 steps, seeds 7, LoRA ink@0.8, from image"
    ) in told
    assert "compiled-img2img -> recompiling.img2img (recompile; lora: none -> ink@0.8)" in told
    assert "compiled unet" in told
    assert "step 1 of 4" not in told
    assert "step 1 of 4" in run(app, ["show", "--debug", str(hires_log)]).output


def test_show_has_colour_only_on_a_terminal(hires_log: Path) -> None:
    """What is written to a file or a pipe has no escape sequence."""
    assert "\x1b" not in run(app, ["show", str(hires_log)]).output


@pytest.mark.parametrize("command", ["show", "requests"])
def test_lines_fit_a_terminal_of_80_columns(command: str, stranger_log: Path) -> None:
    """On a narrow terminal every line is wrapped behind its time and request; nothing is lost."""
    whole = run(app, [command, str(stranger_log)]).output
    shown = run(app, [command, str(stranger_log)], env={"COLUMNS": "80", "FORCE_COLOR": "1"}).output
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert len(lines) > len(whole.splitlines())
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", whole)


def test_show_of_one_request_tells_of_no_other(hires_log: Path) -> None:
    """With --request, --engine and --since only what is asked for is told."""
    told = run(app, ["show", str(hires_log), "--request", "hires-2"]).output
    assert "hires-2" in told
    assert "hires-1" not in told
    for missing in (["--engine", "nobody"], ["--since", "2999-01-01"], ["--request", "hires-9"]):
        nothing = run(app, ["show", str(hires_log), *missing])
        assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert run(app, ["show", str(hires_log), "--since", "2000-01-01"]).output != ""


def test_show_reads_standard_input(hires_log: Path) -> None:
    """A log comes in by standard input as well."""
    piped = run(app, ["show", "-"], input=hires_log.read_bytes()).output
    assert piped == run(app, ["show", str(hires_log)]).output


def test_terminal_is_not_commanded_by_a_log(hires_log: Path, tmp_path: Path) -> None:
    """Escapes, newlines and markup in a log's values reach the terminal as printable text."""
    events = [{**event, "request_id": NASTY, "kind": NASTY} for event in events_of(hires_log)]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    for command in (["show"], ["requests"], ["audit"], ["replay"]):
        told = run(app, [*command, str(path)]).output
        assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in told.replace("\n", ""))
    assert "[red]x[/red]" in run(app, ["show", str(path)]).output


def test_audit_ends_with_one_where_a_rule_is_broken(broken_log: Path) -> None:
    """A broken rule is told with its line, its event and its plain words, and the exit is 1."""
    result = run(app, ["audit", str(broken_log)])
    assert result.exit_code == 1
    assert "pass.started" in result.output
    assert "none after the first is txt2img" in result.output
    told = json.loads(run(app, ["audit", "--json", str(broken_log)]).output)
    assert told["clean"] is False
    assert told["engines"][0]["counts"] == {"pipeline": 1}


def test_audit_of_a_sound_log_ends_with_zero(hires_log: Path) -> None:
    """A sound log ends with 0; so does one that is cut off, and it is told as cut off."""
    result = run(app, ["audit", str(hires_log)])
    assert (result.exit_code, "no rule is broken" in result.output) == (0, True)
    cut = run(app, ["audit", "-"], input=hires_log.read_bytes()[:6000])
    assert cut.exit_code == 0
    assert "not all of it: ended during" in cut.output


@pytest.mark.parametrize("command", ["show", "requests", "audit", "replay"])
@pytest.mark.parametrize("content", [b"", b"not a log\n", b'{"level":"info"}\n'])
def test_file_without_an_event_is_bad_input(command: str, content: bytes, tmp_path: Path) -> None:
    """A file that holds no event, or that is not there, ends with 2."""
    path = tmp_path / "x.jsonl"
    assert run(app, [command, str(path)]).exit_code == 2
    path.write_bytes(content)
    assert run(app, [command, str(path)]).exit_code == 2


def test_replay_tells_where_the_engine_stood(hires_log: Path, rolled_back_log: Path) -> None:
    """At any line, replay tells the state, what is held, the LoRAs and what is under way."""
    events = events_of(hires_log)
    at = events.index(one(events, "component.compile.started", component="unet")) + 1
    told = run(app, ["replay", str(hires_log), "--at", str(at)]).output
    assert "state: unloaded" in told
    assert "under way: job hires-1, request hires-1, component.compile of unet" in told
    moment = one(events, "state.changed", trigger="recompiled")["timestamp"]
    assert (
        "state: recompiling.img2img" in run(app, ["replay", str(hires_log), "--at", moment]).output
    )
    assert "state: unloaded" in run(app, ["replay", str(rolled_back_log)]).output


def test_replay_finds_a_snapshot_that_does_not_add_up(hires_log: Path, tmp_path: Path) -> None:
    """A snapshot other than what its events add up to is told, and ends with 1."""
    events = events_of(hires_log)
    one(events, "engine.snapshot")["state"] = "compiled-txt2img"
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, events)))
    result = run(app, ["replay", str(path)])
    assert result.exit_code == 1
    assert "snapshot differs: state" in result.output


def test_log_is_followed_while_it_grows(hires_log: Path, tmp_path: Path) -> None:
    """Following a log gives each line once it is whole, as it is written."""
    events = events_of(hires_log)
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as sink:
        sink(events[0])
        followed = followed_lines(path)
        assert next(followed) == line(events[0])
        writer = threading.Timer(0.3, sink, [events[1]])
        writer.start()
        assert next(followed) == line(events[1])
        writer.join()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be renamed there")
@pytest.mark.parametrize("how", ["renamed", "emptied"])
def test_log_is_followed_over_its_rotation(how: str, tmp_path: Path) -> None:
    """Following a log that rotates goes on with the new file, and misses nothing of the old."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"first, and a long one\nsecond\n")
    followed = followed_lines(path)
    assert next(followed) == b"first, and a long one\n"
    if how == "renamed":
        path.rename(tmp_path / "log.jsonl.1")
    else:
        assert next(followed) == b"second\n"
    path.write_bytes(b"third\n")
    rest = [next(followed)] if how == "emptied" else [next(followed), next(followed)]
    assert rest == ([b"third\n"] if how == "emptied" else [b"second\n", b"third\n"])


def test_logs_are_read_where_no_model_can_run(hires_log: Path) -> None:
    """Reading a log needs none of torch, OpenVINO, diffusers, transformers and optimum."""
    code = (
        "import sys\n"
        "for name in ('torch', 'openvino', 'diffusers', 'transformers', 'optimum', 'nncf'):\n"
        "    sys.modules[name] = None\n"
        "from holdfast.engine.cli.log import app\n"
        "app()\n"
    )
    ran = subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-c", code, "audit", str(hires_log)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, "no rule is broken" in ran.stdout) == (0, True), ran.stderr
