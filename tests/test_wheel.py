"""What is published: whole, well described, and enough without the repository."""

from __future__ import annotations

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import holdfast.engine
from holdfast.states import mermaid

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "states")
SOURCES = (*PARTS, "docs", "pyproject.toml", "LICENSE")


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
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built from a copy of what git tracks."""
    folder = tmp_path_factory.mktemp("archive")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", folder, "source"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.glob("*.tar.gz")
    return built


def tracked() -> list[str]:
    """Every file of the repository that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, and git tells what belongs to the archive")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - git only reads here
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


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


def test_the_archive_holds_every_file(archive: Path):
    """Each file that git tracks, docs and tests among them, is in the source archive."""
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert set(tracked()) <= names


def test_an_index_takes_both(wheel: Path, archive: Path):
    """`twine check --strict` passes the wheel and the archive: their page can be drawn."""
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(archive)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_it_says_who_where_and_for_whom(wheel: Path):
    """Its metadata has authors, addresses, classifiers, and a page whose links are whole."""
    with zipfile.ZipFile(wheel) as opened:
        [name] = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(opened.read(name))
    assert about["Author"]
    addresses = {text.partition(",")[0] for text in about.get_all("Project-URL")}
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= addresses
    pythons = {text.rpartition(" ")[2] for text in about.get_all("Classifier")}
    assert {"3.11", "3.12", "3.13"} <= pythons
    targets = re.findall(r"\]\(([^)]+)\)", about.get_payload())
    assert targets
    assert all(target.startswith("https://") for target in targets)


def test_the_version_is_that_of_the_package():
    """`holdfast.engine.__version__` is what the package's metadata says."""
    assert holdfast.engine.__version__ == importlib.metadata.version("holdfast")


def test_the_lowest_versions_can_be_installed_together():
    """Every lower bound of the package and of its extras exists and agrees with the others."""
    extras = [f"--extra={name}" for name in ("cli", "otel", "hosts", "serve", "train", "bench")]
    done = subprocess.run(  # noqa: S603 - this interpreter
        [
            sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--resolution=lowest-direct",
            "--python-version=3.11", *extras, str(ROOT / "pyproject.toml"),
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if "error sending request" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
