"""What every test folder shares: models, exported once a session, and the audit of every log."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from .logbook.audited import Journals, assert_sound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

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
    """``tests/models.py``, which builds models and is no test itself."""
    spec = importlib.util.spec_from_file_location("models", Path(__file__).parent / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["models"] = module  # Its dataclasses look themselves up there.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_sd(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion as a diffusers folder, float32. Copy it to change it."""
    folder: Path = models.build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory in which `tiny_sd` is exported."""
    from holdfast.engine.source import resolve

    cache = tmp_path_factory.mktemp("cache")
    resolve(tiny_sd, cache, ignore)
    return cache


@pytest.fixture(scope="session")
def tiny_ir(tiny_sd: Path, tiny_cache: Path) -> Path:
    """The same model as OpenVINO IR, float32. Copy it to change it."""
    from holdfast.engine.source import resolve

    return resolve(tiny_sd, tiny_cache, ignore).path
