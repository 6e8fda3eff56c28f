"""The pages hold: examples run, links lead somewhere, generated parts are fresh."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from holdfast.engine.cli import main
from holdfast.engine.logbook.audit import audit
from holdfast.engine.logbook.read import log_lines, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ELSEWHERE = {"logs.md"}  # Its recipes set up logging for a whole process: tests/logbook runs them.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)")


def blocks(language: str) -> Iterator[object]:
    """Every code block of the pages in a language, named by its page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if block[1] == language and page.name not in ELSEWHERE:
                line = text.count("\n", 0, block.start()) + 1
                name = f"{page.relative_to(ROOT)}:{line}"
                # Blank lines before it: a traceback then names the page's own lines.
                yield pytest.param(name, "\n" * line + block[2], id=name)


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(autouse=True)
def folder(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of an example, with what a reader would have there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "green").save("photo.png")
    return tmp_path


@pytest.mark.parametrize(("place", "code"), [*blocks("python")])
def test_example_runs(place: str, code: str, folder: Path):
    """A Python example of the pages runs as it stands; a log that it writes passes the audit."""
    exec(compile(code, place, "exec"), {"__name__": "example"})  # noqa: S102 - our own pages
    for log in folder.glob("*.jsonl"):
        assert audit(read(log_lines(str(log)))).clean


@pytest.mark.parametrize(("place", "code"), [*blocks("sh")])
def test_commands_run(place: str, code: str):
    """The lines of a shell example that call `holdfast` end with 0, one after the other."""
    for line in code.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True) or [""]
        if command == "holdfast":
            assert main(arguments) == 0, f"{place}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    """Every link to a file leads to one that is there."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """``docs/reference.py``."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_fresh(reference: ModuleType):
    """The parts of the pages that are made from the code are as `make docs` makes them now."""
    for page in reference.PARTS:
        assert (ROOT / page).read_text(encoding="utf-8") == reference.renewed(page)


def test_every_event_that_is_emitted_is_in_the_reference(reference: ModuleType):
    """Each event name that the code emits, or begins a span with, is a row of the reference."""
    names = set(reference.EVENTS)
    prefixes = {name.rpartition(".")[0] for name in names}
    sources = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "states").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    emitted = set(re.findall(r'emit\(\s*"([\w.]+)"', code))
    spans = set(re.findall(r'\.span\(\s*"([\w.]+)"', code))
    assert emitted
    assert emitted <= names
    assert spans
    assert spans <= prefixes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]):
    """Every `holdfast COMMAND` that a page names is a command."""
    for command in set(re.findall(r"`holdfast ([a-z]+)", page.read_text(encoding="utf-8"))):
        assert main([command, "--help"]) == 0, command
        assert f"Usage: holdfast {command}" in capsys.readouterr().out
