from __future__ import annotations

import getpass
import json
import socket
import zipfile
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.bundle import bundle
from holdfast.engine.logbook.reading import read
from holdfast.engine.logbook.writing import line
from tests.support.audited import events_of

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "portrait of Zebulon Quill"
app = typer.Typer()
app.command()(bundle)


@pytest.fixture
def telling_log(hires_log: Path, tmp_path: Path) -> Path:
    """A log that tells everything that it should not."""
    events = events_of(hires_log)
    for event in events:
        event["prompt"] = PROMPT
        event["error"] = f"InvalidRequest: {PROMPT!r} is too long in '/home/zebulon quill/x y.png'"
        event["path"] = r"C:\Users\zebulon\models\secret.safetensors"
        event["node"] = f"{socket.gethostname()} of {getpass.getuser()}"
        event["why"] = event["node"]
        event["host_user"] = "Zebulon"
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(map(line, events)) + b"host line with zebulon\n")
    return path


def bundled(log: Path, *options: str) -> tuple[dict[str, bytes], str]:
    output = log.with_suffix(".zip")
    result = CliRunner().invoke(app, [str(log), "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(output) as members:
        return {name: members.read(name) for name in members.namelist()}, result.output


def test_bundle_has_what_a_report_needs_and_says_so(telling_log: Path) -> None:
    """The bundle has log, doctor's report, versions, settings and chart, and prints their names."""
    members, told = bundled(telling_log)
    assert set(members) == {
        "log.jsonl", "doctor.txt", "versions.json", "chart.mmd", "settings.json",
    }  # fmt: skip
    assert all(name in told for name in members)
    assert "openvino" in json.loads(members["versions.json"])["packages"]
    assert b"recompile-rolled-back" in members["chart.mmd"]
    (settings,) = json.loads(members["settings.json"]).values()
    assert (settings["device"], settings["precision"]) == ("CPU", "f32")


def test_bundle_tells_nothing_of_a_person(telling_log: Path) -> None:
    """No prompt, no path, no name of the user or the machine is anywhere in the bundle."""
    members, _ = bundled(telling_log)
    for content in members.values():
        for secret in (
            PROMPT,
            "Zebulon",
            "zebulon",
            "quill",
            "Users",
            "/home/",
            str(telling_log.parent),
        ):
            assert secret.encode() not in content
    events = [json.loads(each) for each in members["log.jsonl"].splitlines()]
    told = {event["why"] for event in events if "why" in event}
    assert told <= {"<host> of <user>", f"{socket.gethostname()} of <user>"}
    assert not any(event.keys() & {"node", "host_user"} for event in events)


def test_redacted_log_is_still_whole_and_clean(telling_log: Path) -> None:
    """What is left of the log in a bundle is complete and breaks no rule."""
    members, _ = bundled(telling_log)
    verdict = audit(read(members["log.jsonl"].splitlines(keepends=True)))
    assert verdict.clean
    assert verdict.complete


def test_prompts_are_in_the_bundle_where_they_are_asked_for(telling_log: Path) -> None:
    """With --with-prompts the prompts stay, and the command says so; paths go all the same."""
    members, told = bundled(telling_log, "--with-prompts")
    assert PROMPT.encode() in members["log.jsonl"]
    assert b"quill" not in members["log.jsonl"]
    assert "with prompts" in told
