from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

from holdfast.engine.cli import doctor
from holdfast.engine.cli.doctor import Report, examine


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return examine(tmp_path_factory.mktemp("cache"))


def wrong(report: Report) -> list[str]:
    return [finding.what for finding in report.findings if finding.kind == "wrong"]


def test_this_machine_is_healthy(report: Report):
    """Where these tests run, nothing is found that keeps an engine from working."""
    assert wrong(report) == []
    assert report.healthy


def test_it_tells_what_is_there(report: Report):
    """Versions, the CPU with the precision it computes in, and memory are those of the machine."""
    assert report.versions["openvino"] == metadata.version("openvino")
    assert report.versions["holdfast"] == metadata.version("holdfast")
    needed = {
        Requirement(text).name
        for text in metadata.requires("holdfast") or ()
        if "extra" not in text
    }
    assert needed <= report.versions.keys()
    assert {each.name: each.precision for each in report.devices}["CPU"] in ("bf16", "f32")
    assert report.memory_bytes == psutil.virtual_memory().total


def test_extras_are_told_apart(report: Report):
    """Extras for users are listed with what they lack; those for development are not."""
    assert report.missing["cli"] == ()
    assert not {"test", "dev"} & report.missing.keys()


def test_it_becomes_json(report: Report):
    """The report's JSON is read back as the same facts."""
    facts = json.loads(report.to_json())
    assert facts["devices"][0]["name"] == report.devices[0].name
    assert facts["cache_dir"] == str(report.cache_dir)


def test_a_library_that_is_missing_or_old_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A requirement that is not met is named with what is there instead, and how to meet it."""
    actual = metadata.version
    others = {"structlog": "1.0"}

    def version(name: str) -> str:
        if name == "msgspec":
            raise metadata.PackageNotFoundError
        return others.get(name) or actual(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = examine(tmp_path)
    assert not found.healthy
    assert [(each.what, each.do) for each in found.findings if each.kind == "wrong"] == [
        ("Holdfast needs msgspec>=0.18, but it is not installed.", "pip install 'msgspec>=0.18'"),
        (
            "Holdfast needs structlog>=24.1, but it is there as 1.0.",
            "pip install 'structlog>=24.1'",
        ),
    ]


def test_libraries_that_cannot_be_imported_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What an import raises is told as a finding, and does not end the doctor."""

    def fail() -> None:
        msg = "libgomp.so.1: cannot open shared object file"
        raise OSError(msg)

    monkeypatch.setattr(doctor, "heavy", fail)
    [what] = wrong(examine(tmp_path))
    assert what.startswith("The libraries cannot be imported (OSError: libgomp.so.1: cannot open")


def test_a_torchvision_that_does_not_fit_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One that engines hide is a note with the way to a fitting one, and the machine is healthy."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = examine(tmp_path)
    [note] = [each for each in found.findings if "torchvision" in each.what]
    assert (note.kind, found.healthy) == ("note", True)
    assert "does not fit torch" in note.what
    assert "https://download.pytorch.org/whl/cpu" in note.do


def test_a_cuda_build_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A torch with CUDA is a note: it works, and takes gigabytes for nothing."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    notes = [each for each in examine(tmp_path).findings if "CUDA" in each.what]
    assert [each.kind for each in notes] == ["note"]


def test_the_cure_of_a_cuda_build_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It takes away what CUDA brought, and installs torch with torchvision from one index."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    every = [*metadata.distributions(), Brought("nvidia-cublas"), Brought("triton")]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: every)
    [cure] = [each.do for each in examine(tmp_path).findings if "CUDA" in each.what]
    gone, come = cure.splitlines()
    assert gone == "pip uninstall -y torch torchvision nvidia-cublas triton"
    assert come.startswith("pip install torch torchvision --index-url https://")


class Brought:
    """A distribution that is installed, as far as its name."""

    def __init__(self, name: str) -> None:
        self.metadata = {"Name": name}


def test_no_room_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Little free memory is a note that says what helps."""
    real = psutil.virtual_memory()
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: real._replace(available=2**30))
    [note] = [each for each in examine(tmp_path).findings if "of memory" in each.what]
    assert (note.kind, note.what[:30]) == ("note", "Only 1.0 GiB of memory are fre")


def test_a_cache_that_cannot_be_written_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A cache folder without the right to write is wrong, and another one is advised."""
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    [what] = wrong(examine(tmp_path / "not" / "there"))
    assert what == f"The cache folder {tmp_path / 'not' / 'there'} cannot be written."


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("named", [None, "~/cache"])
def test_a_user_without_a_home_is_told_what_to_set(named: str | None):
    """Where no cache folder can be known, that is a finding, and the rest is told all the same."""
    report = examine(named and Path(named))
    assert wrong(report) == ["There is no cache folder: this user has no home that is known here."]
    assert report.devices
    assert json.loads(report.to_json())["cache_dir"] is None
