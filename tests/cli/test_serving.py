from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import pytest

from holdfast.engine.cli import main

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 300.0
COMMAND = """
import signal, sys
from holdfast.engine.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
sys.exit(main())
"""


def test_one_command_serves_this_machine(tiny_ir: Path, tiny_cache: Path, tmp_path: Path) -> None:
    """It says where it listens, which others cannot reach; credentials may be variables."""
    log = tmp_path / "log.jsonl"
    command = [
        sys.executable, "-c", COMMAND,
        "serve", "--port", "0", "--model", str(tiny_ir), "--cache-dir", str(tiny_cache),
        "--log", str(log),
    ]  # fmt: skip
    environment = os.environ | {"HOLDFAST_API_AUTH": "ann:word,bob:word", "HOLDFAST_API_KEY": "k"}
    with subprocess.Popen(  # noqa: S603 - this interpreter
        command, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stderr is not None
        said = server.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert address, said
        path = f"{address[0]}/sdapi/v1/options"
        assert httpx.get(path, timeout=PATIENCE).status_code == 401
        assert httpx.get(path, auth=("bob", "word"), timeout=PATIENCE).status_code == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 130
        assert "Traceback" not in server.stderr.read()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    answered = [each["status"] for each in events if each["event"] == "http.answered"]
    assert answered == [401, 200]
    assert events[-1]["event"] == "engine.closed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--api-auth", "ann"], "USER:WORD"),
        (["--host", "203.0.113.1"], "cannot be listened on"),
        (["--alias", "ink"], "NAME=WORDS"),
        (["--queue-limit", "0"], "queue-limit"),
        (["--interrupts", "none"], "interrupts"),
    ],
)
def test_a_wrong_option_is_named(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with 2 before anything is loaded."""
    assert main(["serve", *options]) == 2
    assert words in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing library is named with the extra that brings it."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "pip install 'holdfast[serve]'" in capsys.readouterr().err
