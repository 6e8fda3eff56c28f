from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.engine import Engine, Hires

from .conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from .conftest import Halt

    Example = Callable[..., ModuleType]

PROMPT = "a large red circle on a blue background"


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch, example: Example) -> Any:
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    host = example("qt_host", "PySide6")
    from PySide6.QtWidgets import QApplication

    host.application = QApplication.instance() or QApplication([])
    return host


def turn(until: Callable[[], bool]) -> None:
    """Let the windows live until something holds."""
    from PySide6.QtCore import QCoreApplication

    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline
        QCoreApplication.processEvents()
        time.sleep(0.01)


def shows(window: Any, size: tuple[int, int]) -> bool:
    """Whether the picture in a window is of this size."""
    picture = window.picture.pixmap()
    return (picture.width(), picture.height()) == size


def test_a_window_shows_previews_progress_and_the_image(
    engine: Engine, desktop: Any, halt: Halt
) -> None:
    """Clicking Generate runs both passes; previews and progress come while the window lives."""
    window = desktop.Window(engine)
    window.button.click()
    assert window.button.text() == "Stop"
    places = []
    for pass_number, preview in ((1, (8, 8)), (2, (16, 16))):
        turn(functools.partial(shows, window, preview))
        places.append(window.bar.value())
        halt.go_on(pass_number)
    turn(lambda: window.button.text() == "Generate")
    assert 0 < places[0] < places[1] < window.bar.value() == 1000
    right = engine.run(Hires(prompt=PROMPT, seed=7, scale=2.0)).images[0]
    shown = window.picture.pixmap().toImage()
    assert (shown.width(), shown.height()) == right.size
    for place in ((0, 0), (5, 9), (right.width - 1, right.height - 1)):
        assert shown.pixelColor(*place).getRgb()[:3] == right.getpixel(place)
    window.close()


def test_a_window_stops_its_job(engine: Engine, desktop: Any, halt: Halt) -> None:
    """Clicking Stop in the second pass ends the job and leaves the first pass in the window."""
    halt.go_on(1)
    window = desktop.Window(engine)
    window.button.click()
    job = window.job
    turn(lambda: job.progress.pass_number == 2)
    window.button.click()
    turn(lambda: window.button.text() == "Generate")
    assert job.status == "cancelled"
    shown = window.picture.pixmap().toImage()
    assert (shown.width(), shown.height()) == job.kept[0].size
    assert shown.pixelColor(3, 3).getRgb()[:3] == job.kept[0].getpixel((3, 3))
    window.close()


def test_events_may_come_after_a_window_has_gone(engine: Engine, desktop: Any, halt: Halt) -> None:
    """A window that is closed and deleted while its job runs is touched by nobody afterwards."""
    import shiboken6

    window = desktop.Window(engine)
    window.button.click()
    job = window.job
    turn(lambda: job.progress.pass_number == 1)
    window.close()
    shiboken6.delete(window)
    for pass_number in (1, 2):
        halt.go_on(pass_number)
    assert job.result(PATIENCE).images
    turn(lambda: not [each for each in threading.enumerate() if "subscriber" in each.name])
