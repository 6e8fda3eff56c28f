"""The house stands as its plan says: rooms, their one direction, and the names a host may use."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import holdfast.engine
import holdfast.engine.demo
import holdfast.engine.logbook
import holdfast.engine.server
import holdfast.states

ROOT = Path(__file__).parents[1]
PUBLIC = {
    module.__name__: frozenset(module.__all__)
    for module in (
        holdfast.engine,
        holdfast.engine.demo,
        holdfast.engine.logbook,
        holdfast.engine.server,
        holdfast.states,
    )
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "embedding").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def codes() -> dict[str, str]:
    """Every piece of Python that the docs show, by its place."""
    found = {file.name: file.read_text(encoding="utf-8") for file in EXAMPLES}
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            found[f"{page.name} {number}"] = block
    return found


def imports(code: str) -> set[tuple[str, str]]:
    """Module and name of everything of Holdfast that a piece of Python imports."""
    nodes = [*ast.walk(ast.parse(code))]
    names = {
        (node.module or "", each.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }
    names |= {
        (each.name, "") for node in nodes if isinstance(node, ast.Import) for each in node.names
    }
    return {(module, name) for module, name in names if module.startswith("holdfast")}


@pytest.mark.parametrize("place", codes())
def test_the_docs_use_public_names_alone(place: str):
    """Whatever an example imports from Holdfast is public where it imports it from."""
    for module, name in imports(codes()[place]):
        assert name in PUBLIC.get(module, ()), f"from {module} import {name}"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there(module: str):
    """Each listed name can be had, is no submodule, and is listed by dir()."""
    home = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert not isinstance(getattr(home, name), ModuleType), name
    assert PUBLIC[module] <= set(dir(home))


def test_an_unknown_name_is_an_attribute_error():
    """A name that is not public is refused as Python refuses it, and the module is named."""
    with pytest.raises(AttributeError, match=r"'holdfast\.engine' has no attribute 'Engin'"):
        _ = holdfast.engine.Engin


def test_every_public_name_of_the_engine_is_in_the_docs():
    """Each name that a host may import from `holdfast.engine` is written of on some page."""
    words = set(re.findall(r"\w+", "\n".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert PUBLIC["holdfast.engine"] <= words


def test_importing_the_engine_loads_no_room():
    """`import holdfast.engine` brings in nothing but itself and its door of imports."""
    program = (
        "import holdfast.engine, sys; print(*sorted(m for m in sys.modules if 'holdfast.' in m))"
    )
    ran = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert ran.stdout.strip() == "holdfast.engine holdfast.engine.imports"


def calling(name: str) -> list[str]:
    """The files of the engine that call a function or method of this name."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "engine").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) == name
    ]


def test_one_file_compiles():
    """Only ``compiling/compiler.py`` names ``compile_model``, called or handed on."""
    assert set(calling("compile_model")) == {"engine/compiling/compiler.py"}


def test_every_room_says_its_purpose():
    """The docstring of each room's ``__init__.py`` says in a sentence what it is for."""
    for init in sorted((ROOT / "engine").rglob("__init__.py")):
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert re.match(r"[A-Z].+\.", text), init


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w/.]+)` \|", re.MULTILINE)
PATH = re.compile(r"`((?:\w+/)+(?:\w+\.\w+)?|\w+\.py)`")


def test_the_page_has_a_row_for_each_room():
    """Each folder and file of the engine stands once in the table of rooms, and nothing else."""
    rooms = {path.name for path in (ROOT / "engine").glob("[!_]*.py")}
    rooms |= {f"{path.parent.name}/" for path in (ROOT / "engine").glob("*/__init__.py")}
    assert sorted(ROW.findall(ARCHITECTURE)) == sorted(rooms | {"states/"})


@pytest.mark.parametrize("path", sorted(set(PATH.findall(ARCHITECTURE))))
def test_a_file_that_the_page_names_is_there(path: str):
    """Each file and folder that the page names is in the repository, or in a room of the engine."""
    assert [*ROOT.glob(path), *(ROOT / "engine").glob(path), *(ROOT / "engine").glob(f"*/{path}")]


@pytest.mark.parametrize("room", sorted(path.name for path in (ROOT / "tests").glob("[!_]*/")))
def test_each_folder_of_tests_is_a_rooms(room: str):
    """Tests stand under the name of a room; beside them only what all of them share."""
    shared = {"support", "benchmarks", "hosts"}  # helpers; measurements; whole applications
    assert room in shared | {"engine", "states"} or (ROOT / "engine" / room).is_dir()
