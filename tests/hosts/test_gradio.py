from __future__ import annotations

import gc
import io
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import Engine, Hires

from .conftest import Halt, absent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    Example = Callable[..., ModuleType]

PROMPT = "a large red circle on a blue background"
PATIENCE = 600_000
"""Milliseconds, as browsers count."""

# Gradio leaves the sockets of its event loops to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def served(engine: Engine, example: Example) -> Iterator[str]:
    """The address of the host's page."""
    host = example("gradio_host", "gradio", "playwright")
    blocks = host.page(engine)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_port=None)
    yield address
    blocks.close()
    del blocks
    gc.collect()


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium of the system."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        absent("no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A browser window on the page, with cookies and a session of its own."""

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_context().new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(address)
        self.said = self.page.get_by_label("Status")

    def ask(self, steps: int) -> None:
        number = self.page.get_by_role("spinbutton").last
        number.fill(str(steps))
        number.press("Tab")
        self.page.get_by_role("button", name="Generate").click()

    def cancel(self) -> None:
        self.page.get_by_role("button", name="Cancel").click()

    def wait(self, words: str) -> str:
        """Wait until the status has these words, and return all of it."""
        from playwright.sync_api import expect

        expect(self.said).to_have_value(re.compile(words), timeout=PATIENCE)
        return str(self.said.input_value())

    def wait_for_image(self, label: str) -> Image.Image:
        """Wait until there is a picture under a label, and return it."""
        self._shown(label).wait_for()
        image = self.image(label)
        assert image is not None
        return image

    def _shown(self, label: str) -> Any:
        return self.page.locator(f'.block:has(label:text-is("{label}")) img')

    def image(self, label: str) -> Image.Image | None:
        """Return the picture under a label, as the browser got it."""
        shown = self._shown(label)
        if not shown.count():
            return None
        answer = self.page.request.get(shown.get_attribute("src"))
        with Image.open(io.BytesIO(answer.body())) as image:
            return image.convert("RGB")


def test_a_page_shows_previews_progress_and_both_passes(
    engine: Engine, served: str, browser: Any, halt: Halt
) -> None:
    """A click on Generate shows previews and the first pass on the way, then the second pass."""
    visitor = Visitor(browser, served)
    visitor.ask(steps=20)
    visitor.wait(r"running: pass 1, \d+%")
    preview = visitor.wait_for_image("Preview")
    assert preview.size == (256, 256)
    halt.go_on(1)
    visitor.wait(r"running: pass 2, \d+%")
    first_pass = visitor.wait_for_image("First pass")
    halt.go_on(2)
    visitor.wait("done")
    right = engine.run(Hires(prompt=PROMPT, seed=7, steps=20, scale=2.0))
    assert first_pass.tobytes() == right.first_pass[0].tobytes()
    for label, image in (("First pass", right.first_pass[0]), ("Second pass", right.images[0])):
        shown = visitor.image(label)
        assert shown is not None
        assert shown.tobytes() == image.tobytes()


def test_a_visitor_stops_his_own_job(engine: Engine, served: str, browser: Any, halt: Halt) -> None:
    """Cancel keeps the first pass of the visitor who clicks it, and touches nobody else's job."""
    mine, other = Visitor(browser, served), Visitor(browser, served)
    mine.ask(steps=20)
    mine.wait(r"running: pass 1, \d+%")
    other.cancel()
    halt.go_on(1)
    mine.wait("running: pass 2")
    mine.cancel()
    said = mine.wait("was asked to stop")
    assert "kept: first_pass" in said
    assert mine.image("First pass") is not None
    assert mine.image("Second pass") is None
    assert engine.activity == "idle"
