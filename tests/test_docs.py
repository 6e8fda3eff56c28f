"""The pages hold: examples run, links lead somewhere, generated parts are fresh."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from holdfast.engine.cli import main
from holdfast.engine.logbook.auditing import audit
from holdfast.engine.logbook.reading import log_lines, read
from holdfast.engine.logbook.sentences import WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from _pytest.mark import ParameterSet

ROOT = Path(__file__).parents[1]
TWIN = ROOT / "docs" / "pypi.md"  # README.md with whole addresses
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {TWIN})
ELSEWHERE = frozenset(
    {"logs.md"}
)  # Its recipes set up logging for a whole process: tests/logbook runs them.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)")


def blocks(language: str, *, elsewhere: frozenset[str] = ELSEWHERE) -> Iterator[ParameterSet]:
    """Every code block of the pages in a language, named by its page and line."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if block[1] == language and page.name not in elsewhere:
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


MISTYPED = """
from holdfast.engine import Engine, EngineConfig, Hires, Img2Img, Preview, Txt2Img

engine = Engine(modle="demo")  # type: ignore[call-arg]
EngineConfig(memory_budget=[4])  # type: ignore[arg-type]
engine.configure(memroy_budget="4GiB")  # type: ignore[call-arg]
engine.configure(log_file="run.jsonl")  # type: ignore[call-arg]
engine.plan(precison="f32")  # type: ignore[call-arg]
Txt2Img(prompt=5)  # type: ignore[arg-type]
Hires(image_width=5)  # type: ignore[call-arg]
Img2Img(prompt="x")  # type: ignore[call-arg]
Img2Img(image="photo.png").but(strenght=0.5)  # type: ignore[call-arg]


def finished(event: Preview) -> None: ...


engine.subscribe(finished)  # type: ignore[arg-type]
engine.subscribe(finished, [Preview])
engine.subscribe(lambda event: event.image.size, [Preview])
engine.subscribe(lambda event: event.status, [Preview])  # type: ignore[attr-defined]
"""
"""What type checkers must refuse: an ignore that nothing needs is an error itself."""


def test_the_examples_pass_strict_type_checking(tmp_path: Path):
    """`mypy --strict` passes every Python block and example, and refuses what is mistyped."""
    files = {"mistyped": MISTYPED}
    for index, (place, code) in enumerate(
        each.values for each in blocks("python", elsewhere=frozenset())
    ):
        files[f"block_{index}"] = f"# {place}{code}"
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    targets = [*tmp_path.glob("*.py"), *(ROOT / "docs" / "embedding").glob("*.py")]
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, targets)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


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


def test_every_page_is_listed():
    """Each page of `docs/` stands in their table of contents."""
    contents = {TWIN.name, "README.md"}  # itself, and one that is made for a package index
    contents |= set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= contents


def loaded(name: str) -> ModuleType:
    """Return a script of ``docs/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """``docs/reference.py``."""
    return loaded("reference")


def test_generated_parts_are_fresh(reference: ModuleType):
    """The parts of the pages that are made from the code are as `make docs` makes them now."""
    for page in (*reference.PARTS, *reference.WHOLE):
        assert (ROOT / page).read_text(encoding="utf-8") == reference.renewed(page)


def test_the_way_of_a_request_goes_along_imports(reference: ModuleType):
    """Each step of the way that the rooms' picture shows is an import that is there."""
    arrows = reference.imported()
    assert all(below in arrows[room] for room, below, _ in reference.WAY)


def test_the_types_of_what_may_be_given_are_fresh():
    """`engine/requests/given.py` is as `make docs` makes it from the fields now."""
    typed = loaded("typed")
    assert typed.TARGET.read_text(encoding="utf-8") == typed.module()


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


def test_every_event_has_words(reference: ModuleType):
    """`holdfast log show` has a sentence for each event of the reference, and for no other."""
    assert WORDS.keys() == reference.EVENTS.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path, capsys: pytest.CaptureFixture[str]):
    """Every `holdfast COMMAND` that a page names is a command."""
    for command in set(re.findall(r"`holdfast ([a-z]+)", page.read_text(encoding="utf-8"))):
        assert main([command, "--help"]) == 0, command
        assert f"Usage: holdfast {command}" in capsys.readouterr().out
