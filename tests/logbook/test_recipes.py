from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Engine
from holdfast.engine.logbook.reading import Entry, log_lines, read
from holdfast.engine.logbook.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterator

LOGS = Path(__file__).parents[2] / "docs" / "logs.md"
RECIPES = re.findall(r"```python\n(.*?)```", LOGS.read_text(), re.DOTALL)
DYING = """
import os, signal, sys
import openvino
from holdfast.engine import Engine

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

openvino.Core.compile_model = die
Engine(model=sys.argv[1], cache_dir=sys.argv[2], flight_recorder=sys.argv[3]).load()
"""


def shown(recipe: str) -> Iterator[tuple[str, str]]:
    """What a recipe says it writes: the text, and the file that it is in."""
    return re.findall(r"# shown: (.*) in (\S+)", recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_and_shows_what_it_says(recipe: str, tmp_path: Path) -> None:
    """A recipe of the page runs as it stands, silently, and writes what it says."""
    ran = subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-W", "error::ResourceWarning", "-c", recipe],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    for text, file in shown(recipe):
        assert text in (tmp_path / file).read_text()


def test_structlog_may_be_configured_before_the_import_too(tmp_path: Path) -> None:
    """The host's structlog set-up holds whether it stands before or after the import."""
    (recipe,) = (each for each in RECIPES if "RotatingFileHandler" in each)
    line = "from holdfast.engine import Engine\n"
    late = recipe.replace(line, "").replace("with Engine()", f"{line}with Engine()")
    test_recipe_runs_and_shows_what_it_says(late, tmp_path)


def test_page_lists_the_rules_as_they_are() -> None:
    """The page's table of rules is the table that logs are held against."""
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", LOGS.read_text(), re.MULTILINE)
    assert rows == [(rule.id, rule.words) for rule in RULES]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_engine_tells_what_the_process_before_it_died_in(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """After a process was killed in a compile, the next engine on the path logs what it was in."""
    flight, log = tmp_path / "flight", tmp_path / "log.jsonl"
    killed = subprocess.run(  # noqa: S603 - our own interpreter on our own text
        [sys.executable, "-c", DYING, settings["model"], str(settings["cache_dir"]), str(flight)],
        check=False,
    )
    assert killed.returncode < 0
    with Engine(**settings, flight_recorder=flight, log_file=log):
        pass
    entries = [item for item in read(log_lines(log)) if isinstance(item, Entry)]
    (found,) = (entry.event for entry in entries if entry.name == "engine.crash_found")
    assert found["died_in"] == "component.compile of text_encoder"
    assert found["pid"] > 0
