from __future__ import annotations

import getpass
import json
import socket
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from holdfast.engine.bundle import Redaction, bundle
from holdfast.engine.logbook.audit import audit
from holdfast.engine.logbook.read import read
from holdfast.engine.logbook.write import line

from .audited import events_of

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
    settings = telling_log.with_name("settings.json")
    settings.write_text(json.dumps({"model": "/home/zebulon/model", "device": "CPU"}))
    members, told = bundled(telling_log, "--config", str(settings))
    assert set(members) == {
        "log.jsonl", "doctor.txt", "versions.json", "chart.mmd", "config.json",
    }  # fmt: skip
    assert all(name in told for name in members)
    assert "openvino" in json.loads(members["versions.json"])["packages"]
    assert b"recompile-rolled-back" in members["chart.mmd"]
    assert json.loads(members["config.json"])["device"] == "CPU"


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
    nodes = {json.loads(each)["node"] for each in members["log.jsonl"].splitlines()}
    assert nodes <= {"<host> of <user>", f"{socket.gethostname()} of <user>"}


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


@pytest.mark.parametrize(
    "path", ["/home/ada/a b/model.xml", r"C:\Users\Ada\m.bin", "~/models", r"\\nas\ada\x", "../ada"]
)
def test_path_becomes_a_mark_that_keeps_its_ending(path: str) -> None:
    """A path of any system becomes a mark, the same one each time, and other text stays."""
    hide: Any = Redaction({}).value
    assert hide(path) == hide(path)
    assert hide(path).startswith("<path ")
    assert hide(path).endswith((">", ".xml", ".bin"))
    assert hide("euler, 4 steps; 1/2 of https://example.org/a") == (
        "euler, 4 steps; 1/2 of https://example.org/a"
    )
    assert hide("runwayml/stable-diffusion") == "runwayml/stable-diffusion"


@pytest.mark.parametrize(
    "telling",
    [
        {"hf_token": "s3cret"},
        {"headers": {"Authorization": "s3cret"}},
        {"error": "401 for https://ada:s3cret@example.org/model"},
        {"error": "sent Bearer s3cret and hf_s3cretS3CRETs3cret"},
        {"error": "not found: file:///home/s3cret/model.xml"},
    ],
    ids=lambda telling: next(iter(telling)),
)
def test_access_tokens_are_taken_out(telling: dict[str, Any]) -> None:
    """What opens a hub or a server to others is in no value, however it got there."""
    hidden = json.dumps(Redaction({}).value(telling))
    assert "s3cret" not in hidden
    assert "s3cret" in json.dumps(telling)


def test_words_that_only_look_like_secrets_stay() -> None:
    """Counts of tokens, and names that begin as a token does, are left alone."""
    event = {"tokens": 77, "component": "tokenizer", "shape": "hf_small"}
    assert Redaction({}).value(event) == event
