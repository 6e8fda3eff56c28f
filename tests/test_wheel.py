"""The wheel: whole, and enough without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from holdfast.states import mermaid

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "states")
SOURCES = (*PARTS, "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment in which only the wheel is installed."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)  # noqa: S603 - this interpreter
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip("--python", scripts / "python", "install", "--no-deps", wheel)
    return scripts


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - this interpreter


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run away from the repository; what Holdfast needs comes from this environment."""
    libraries = sysconfig.get_path(
        "purelib"
    )  # As a path, its editable install of Holdfast is inert.
    return subprocess.run(  # noqa: S603 - the commands stand below
        list(map(str, command)),
        cwd=Path(command[0]).parent,
        env={**os.environ, "PYTHONPATH": libraries},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_holds_every_file(wheel: Path):
    """Each file of engine/ and states/ is in it, at the path that it is imported by."""
    there = {
        f"holdfast/{path.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert names == there


def test_the_command_works_without_the_repository(clean: Path):
    """In a clean environment `holdfast chart` prints the chart."""
    done = run(clean / "holdfast", "chart")
    assert (done.returncode, done.stdout, done.stderr) == (0, mermaid(), "")


def test_the_import_works_without_the_repository(clean: Path):
    """There the engine comes from the wheel, and the demo model with it."""
    program = (
        "import holdfast.engine, holdfast.engine.demo as demo; print(holdfast.engine.__file__);"
        "print(len([*demo.model_folder().glob('*/*.safetensors')]))"
    )
    done = run(clean / "python", "-c", program)
    assert done.stderr == ""
    file, weights = done.stdout.split()
    assert Path(file).is_relative_to(clean.parent)
    assert int(weights) >= 3


@pytest.mark.parametrize("name", PARTS)
def test_the_halves_have_no_other_name(clean: Path, name: str):
    """Outside a checkout `import engine` and `import states` fail."""
    done = run(clean / "python", "-c", f"import {name}")
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr
