"""
What every test folder shares: models, exported once a session, engines on them, LoRAs, workers of
jobs, and the audit of every log.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from holdfast.engine import Engine
from holdfast.engine.imports import heavy, quiet
from tests.support import models as builders
from tests.support.audited import Journals, assert_clean, assert_sound
from tests.support.engines import write_lora
from tests.support.families import BUILDERS
from tests.support.workbench import PATIENCE, Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType

    from tests.support.lora_graphs import Shapes

pytest_plugins = ["tests.support.logs"]

hypothesis.settings.register_profile("patient", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("patient")  # the speed of the machine decides no test


def ignore(event: str, /, **facts: Any) -> None:
    """Take the place of an engine's log where none is looked at."""


@pytest.fixture(scope="session", autouse=True)
def journals() -> Iterator[Journals]:
    """Listens in on every engine of the session; what is left open at its end is judged then."""
    kept = Journals()
    with pytest.MonkeyPatch.context() as patch:
        kept.watch(patch)
        yield kept
    for closed in (True, False):
        for lines in kept.take(closed=closed):
            assert_sound(lines, whole=closed)


@pytest.fixture(autouse=True)
def every_log_is_sound(request: pytest.FixtureRequest, journals: Journals) -> Iterator[None]:
    """
    Audits and replays the log of each engine of this process, once a test has closed it.

    A test that breaks the rules on purpose carries ``@pytest.mark.unaudited(reason)``.
    """
    yield
    for lines in journals.take(closed=True):
        if request.node.get_closest_marker("unaudited") is None:
            assert_sound(lines, whole=True)


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """What builds models: ``tests/support/models.py``."""
    return builders


@pytest.fixture(scope="session")
def tiny_sd(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion as a diffusers folder, float32. Copy it to change it."""
    folder: Path = models.build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which `tiny_sd` is exported."""
    from holdfast.engine.models.source import resolve

    cache = tmp_path_factory.mktemp("cache")
    resolve(tiny_sd, cache, ignore)
    return cache


@pytest.fixture(scope="session")
def tiny_ir(tiny_sd: Path, tiny_cache: Path) -> Path:
    """The same model as OpenVINO IR, float32. Copy it to change it."""
    from holdfast.engine.models.source import resolve

    return resolve(tiny_sd, tiny_cache, ignore).path


@pytest.fixture(scope="session")
def family(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a family's tiny model as a diffusers folder, written once: exports are shared."""

    @functools.cache
    def written(name: str) -> Path:
        heavy()
        with quiet():
            return BUILDERS[name](tmp_path_factory.mktemp(name) / "model", tiny_sd)

    return written


@pytest.fixture
def open_engine(
    request: pytest.FixtureRequest, tiny_ir: Path, tiny_cache: Path, tmp_path: Path
) -> Iterator[Callable[..., Engine]]:
    """
    Opens engines on the tiny model; afterwards each log must stand the audit.

    A test that breaks the rules on purpose carries ``@pytest.mark.unaudited(reason)``.
    """
    opened: list[Engine] = []

    def open_one(**settings: Any) -> Engine:
        log = tmp_path / f"engine-{len(opened)}.jsonl"
        defaults = {"model": tiny_ir, "cache_dir": tiny_cache, "log_file": log}
        opened.append(Engine(**{**defaults, **settings}))
        return opened[-1]

    yield open_one
    for engine in opened:
        engine.close()
    if request.node.get_closest_marker("unaudited") is None:
        for engine in opened:
            assert_clean(engine.config.log_file)


@pytest.fixture
def full_disk() -> Callable[..., AbstractContextManager[None]]:
    """Returns a context in which no file can grow beyond so many bytes, as on a full disk."""
    resource = pytest.importorskip("resource", reason="a POSIX matter")

    @contextlib.contextmanager
    def full(most: int = 0) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home, as in a container that runs under any number."""
    pwd = pytest.importorskip("pwd", reason="a POSIX matter")

    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def benches() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.gate.set()
        assert bench.worker.close(timeout=PATIENCE)


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches()


@pytest.fixture(scope="session")
def settings(tiny_ir: Path, tiny_cache: Path) -> dict[str, Any]:
    """Settings of engines on the tiny model, all with one cache."""
    return {"model": str(tiny_ir), "precision": "f32", "cache_dir": tiny_cache}


@pytest.fixture(scope="session")
def ink(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny model's UNet."""
    return write_lora(tiny_ir, tmp_path_factory.mktemp("ink") / "ink.safetensors")


@pytest.fixture(scope="session")
def chalk(tiny_ir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny model's UNet and text encoder."""
    everything = {"unet": lambda _: True, "text_encoder": lambda _: True}
    path = tmp_path_factory.mktemp("chalk") / "chalk.safetensors"
    return write_lora(tiny_ir, path, seed=2, wanted=everything)


@pytest.fixture(scope="session")
def shapes(tiny_ir: Path) -> Shapes:
    """The shape of each weight of the tiny model that a LoRA can change."""
    from holdfast.engine.lora import targets
    from tests.support.lora_graphs import read

    return {
        component: {
            module: target.shape
            for module, target in targets(read(tiny_ir, component)).items()
            if not target.obstacle
        }
        for component in ("unet", "text_encoder")
    }
