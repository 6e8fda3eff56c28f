"""
What this machine has for Holdfast: versions, devices, memory, cache; what is wrong, what to do.

It goes through the same doors as an engine, so that what it finds is what an engine would meet.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from holdfast.engine.demo import model_folder
from holdfast.engine.errors import InvalidRequest
from holdfast.engine.imports import heavy, runtime
from holdfast.engine.requests.config import users_cache
from holdfast.engine.requests.values import locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from packaging.requirements import Requirement

_NAME = "holdfast"
_FOR_DEVELOPERS = ("dev", "test")
_ROOM = 4 * 2**30
_ROOM_FOR = "a model of Stable Diffusion 1.5's size takes 2 GiB on disk and as much compiled"
_CUDA = ("nvidia-", "cuda-", "triton")
_CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Device:
    """
    A device that OpenVINO sees.

    Attributes:
        name: As an engine's ``device`` takes it.
        full_name: As its maker calls it.
        precision: What it computes in unless told otherwise, for example ``"bf16"``.
        capabilities: What else OpenVINO says that it can.
    """

    name: str
    full_name: str
    precision: str
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """
    Something that a user should know.

    Attributes:
        kind: ``"wrong"``: an engine will not work; ``"note"``: it will, but not at its best.
        what: Is the case.
        do: About it.
    """

    kind: Literal["wrong", "note"]
    what: str
    do: str


@dataclass(frozen=True)
class Report:
    """
    What this machine has for Holdfast.

    Attributes:
        python: Version of the interpreter.
        platform: Operating system, its version, and the machine.
        processors: That this process may use.
        versions: Of Holdfast and of each library that it needs; None: not installed.
        missing: For each extra, the requirements that are not met; empty: all of them are.
        devices: That OpenVINO sees.
        memory_bytes: Of the machine.
        memory_free_bytes: Of it, what a new program could have.
        cache_dir: Where exports go unless an engine is told otherwise; None: nowhere, for lack of
            a home.
        cache_bytes: What lies there.
        cache_free_bytes: What would still fit there.
        findings: What is wrong or worth knowing; empty: nothing.
    """

    python: str
    platform: str
    processors: int
    versions: Mapping[str, str | None]
    missing: Mapping[str, tuple[str, ...]]
    devices: tuple[Device, ...]
    memory_bytes: int
    memory_free_bytes: int
    cache_dir: Path | None
    cache_bytes: int
    cache_free_bytes: int
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that keeps an engine from working."""
        return all(finding.kind != "wrong" for finding in self.findings)

    def to_json(self) -> str:
        """Serialise."""
        return msgspec.json.format(msgspec.json.encode(self, enc_hook=str), indent=2).decode()


def examine(cache_dir: Path | None = None) -> Report:
    """
    Look at this machine. Imports the heavy libraries, as a load does.

    Args:
        cache_dir: As an engine's; None: the user's cache folder.
    """
    cache = _cache(cache_dir)
    memory = psutil.virtual_memory()
    needed, extras = _requirements()
    devices: list[Device] = []
    findings = [
        *_unmet(needed),
        *_libraries(devices),
        *_demo(),
        *_cache_room(cache),
        *_memory_room(memory.available),
    ]
    return Report(
        python=platform.python_version(),
        platform=platform.platform(),
        processors=len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else psutil.cpu_count() or 1,
        versions={_NAME: _version(_NAME), **{each.name: _version(each.name) for each in needed}},
        missing={
            extra: tuple(f"{each.name}{each.specifier}" for each in wanted if not _met(each))
            for extra, wanted in extras.items()
        },
        devices=tuple(devices),
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        cache_dir=cache,
        cache_bytes=0 if cache is None else _bytes(cache),
        cache_free_bytes=0 if cache is None else shutil.disk_usage(_present(cache)).free,
        findings=tuple(findings),
    )


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Return what Holdfast needs, and what each of its extras adds, as its package says."""
    from packaging.requirements import Requirement

    with contextlib.suppress(metadata.PackageNotFoundError):
        about = metadata.distribution(_NAME)
        every = [Requirement(text) for text in about.requires or ()]
        names = about.metadata.get_all("Provides-Extra") or []
        here = {name: [each for each in every if _of(each, name)] for name in ("", *names)}
        needed = here.pop("")
        extras = {
            name: [each for each in wanted if each not in needed and each.name != _NAME]
            for name, wanted in here.items()
            if name not in _FOR_DEVELOPERS
        }
        return needed, extras
    return [], {}


def _of(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _unmet(needed: list[Requirement]) -> Iterator[Finding]:
    for each in needed:
        if not _met(each):
            version = _version(each.name)
            there = "is not installed" if version is None else f"is there as {version}"
            what = f"Holdfast needs {each.name}{each.specifier}, but it {there}."
            yield Finding("wrong", what, f"pip install '{each.name}{each.specifier}'")


def _libraries(devices: list[Device]) -> Iterator[Finding]:
    """Import what a load imports, and note in `devices` what OpenVINO sees."""
    try:
        runtime()
        devices += _devices()
        heavy()
        import torch
    except Exception as error:  # noqa: BLE001 - whatever the imports raise is what is looked for
        what = f"The libraries cannot be imported ({type(error).__name__}: {error})."
        yield Finding("wrong", what, "pip install --force-reinstall holdfast")
        return
    if not devices:
        yield Finding("wrong", "OpenVINO sees no device here.", "Install the device's driver.")
    if torch.version.cuda is not None:
        what = f"torch {torch.__version__} is a CUDA build: gigabytes that Holdfast has no use for."
        yield Finding("note", what, _cpu_build(*_of_cuda()))
    if sys.modules.get("torchvision", torch) is None:
        what = (
            f"torchvision {_version('torchvision')} does not fit torch {torch.__version__} and "
            "cannot be imported; engines hide it from transformers, and need it for nothing."
        )
        yield Finding("note", what, _cpu_build())
    if getattr(sys, "frozen", False) or not sys.executable:
        what = "There is no Python interpreter beside this frozen application to export models."
        yield Finding("note", what, "Give engines folders of OpenVINO IR.")


def _of_cuda() -> list[str]:
    """Return the packages that a CUDA build of torch brought along."""
    names = {about.metadata["Name"].lower() for about in metadata.distributions()}
    return sorted(name for name in names if name.startswith(_CUDA))


def _cpu_build(*beside: str) -> str:
    """Return how to come by a CPU build of torch; torchvision with it, or it brings CUDA back."""
    gone = " ".join(("torch", "torchvision", *beside))
    return f"pip uninstall -y {gone}\npip install torch torchvision {_CPU_INDEX}"


def _devices() -> Iterator[Device]:
    import openvino as ov

    core = ov.Core()
    for name in core.available_devices:
        precision: ov.Type = core.get_property(name, "INFERENCE_PRECISION_HINT")
        yield Device(
            name=name,
            full_name=core.get_property(name, "FULL_DEVICE_NAME"),
            precision=precision.to_string(),
            capabilities=tuple(core.get_property(name, "OPTIMIZATION_CAPABILITIES")),
        )


def _demo() -> Iterator[Finding]:
    if not any(model_folder().glob("unet/*.safetensors")):
        what = f"The demo model's weights are not in {model_folder()}."
        yield Finding("note", what, "pip install --force-reinstall holdfast")


def _cache(cache_dir: Path | None) -> Path | None:
    try:
        return users_cache() if cache_dir is None else locate(cache_dir)
    except (InvalidRequest, ValueError):  # which `_cache_room` tells
        return None


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _cache_room(cache: Path | None) -> Iterator[Finding]:
    if cache is None:
        what = "There is no cache folder: this user has no home that is known here."
        yield Finding("wrong", what, "Set HOME or XDG_CACHE_HOME, or give engines a cache_dir.")
        return
    there = _present(cache)
    if not os.access(there, os.W_OK):
        what = f"The cache folder {cache} cannot be written."
        yield Finding("wrong", what, f"Make {there} writable, or give engines another cache_dir.")
    free = shutil.disk_usage(there).free
    if free < _ROOM:
        what = f"Only {free / 2**30:.1f} GiB of disk are free for the cache; {_ROOM_FOR}."
        yield Finding("note", what, f"Make room, or give engines a cache_dir beside {cache}.")


def _memory_room(memory_free: int) -> Iterator[Finding]:
    if memory_free < _ROOM:
        what = f"Only {memory_free / 2**30:.1f} GiB of memory are free; {_ROOM_FOR}."
        yield Finding("note", what, "End other programs, or set precision='int8'.")


def _present(folder: Path) -> Path:
    """Return the nearest folder above that is there."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())
