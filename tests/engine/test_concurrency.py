"""Many threads, several engines, several processes: each image is the one of a quiet machine."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import (
    Cancelled,
    Engine,
    Hires,
    Img2Img,
    InvalidRequest,
    Lora,
    Txt2Img,
)
from holdfast.engine.subscribers import Event, Finished
from tests.support.engines import live_components
from tests.support.guests import PATIENCE, Guest, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from holdfast.engine.requests.kinds import Request

    Open = Callable[..., Engine]
    Right = Mapping[tuple[str, bool], list[str]]

PROMPT = "a large red circle on a blue background"
THREADS = 8
REQUESTS = 400
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MENU: tuple[Request, ...] = (
    *(Txt2Img(prompt=PROMPT, width=w, height=h, steps=2, seed=w) for w, h in ((64, 64), (48, 80))),
    Txt2Img(prompt="a green star", width=64, height=64, steps=1, guidance=1, seed=3, batch=2),
    *(Img2Img(prompt=PROMPT, image=PICTURE, width=w, steps=2, seed=5) for w in (64, 96)),
    Hires(prompt=PROMPT, width=48, height=48, steps=1, scale=2, hires_steps=1, seed=7),
    Hires(prompt="a dog", width=64, height=32, steps=2, scale=1.5, upscaler="latent", seed=8),
)
BAD = Txt2Img(prompt=PROMPT, width=65, height=64)


@pytest.fixture(scope="module")
def right(
    tiny_ir: Path, ink: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], list[str]]:
    """What one thread makes of each request, without and with a LoRA."""
    made = {}
    with Engine(tiny_ir, cache_dir=tmp_path_factory.mktemp("right")) as engine:
        for inked in (False, True):
            engine.configure(lora=(Lora(ink),) if inked else ())
            made |= {(each.to_json(), inked): pixels(engine.run(each)) for each in MENU}
    assert len({tuple(each) for each in made.values()}) == len(made)
    return made


class Host:
    """One thread of a host, which asks for everything in a random order, and what came of it."""

    def __init__(self, engine: Engine, ink: Path, right: Right, number: int) -> None:
        self._engine = engine
        self._ink = ink
        self._right = right
        self._lot = random.Random(number)  # noqa: S311 - the order is to be the same each time
        self.ends: list[str] = []

    def live(self, requests: int) -> None:
        acts = (self.ask, self.ask_and_leave, self.ask_wrongly, self.change, self.unload)
        for act in self._lot.choices(acts, weights=(74, 13, 6, 5, 2), k=requests):
            self.ends.append(act())

    def ask(self) -> str:
        self.look(self._engine.run(self._lot.choice(MENU)))
        return "done"

    def ask_and_leave(self) -> str:
        job = self._engine.submit(self._lot.choice(MENU), priority=self._lot.randrange(2))
        time.sleep(self._lot.uniform(0, 0.05))
        job.cancel()
        error = job.exception(PATIENCE)
        if error is None:
            self.look(job.result())
            return "done"
        assert isinstance(error, Cancelled)
        return "cancelled"

    def ask_wrongly(self) -> str:
        with pytest.raises(InvalidRequest, match="multiples of 16"):
            self._engine.run(BAD)
        return "refused"

    def change(self) -> str:
        self._engine.configure(lora=self._lot.choice(((), (Lora(self._ink),))))
        return "changed"

    def unload(self) -> str:
        self._engine.unload()
        return "unloaded"

    def look(self, result: Any) -> None:
        assert (
            pixels(result)
            == self._right[result.request.to_json(), bool(result.provenance["loras"])]
        )


@pytest.mark.slow
def test_eight_threads_get_the_images_of_one(open_engine: Open, ink: Path, right: Right) -> None:
    """
    400 mixed requests of 8 threads give images that equal those of one thread to the bit.

    The log tells of every one and breaks no rule; afterwards no thread and no compiled component
    is left.
    """
    threads = set(threading.enumerate())
    before = live_components()
    engine = open_engine()
    hosts = [Host(engine, ink, right, number) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for lived in [pool.submit(host.live, REQUESTS // THREADS) for host in hosts]:
            lived.result()
    assert engine.close(timeout=PATIENCE)
    ends = [end for host in hosts for end in host.ends]
    assert len(ends) == REQUESTS
    assert {*ends} == {"done", "cancelled", "refused", "changed", "unloaded"}
    assert set(threading.enumerate()) == threads
    assert live_components() == before
    log = engine.config.log_file
    assert log is not None
    told = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert told.count("request.completed") == ends.count("done")
    assert told.count("request.failed") == ends.count("refused")
    assert told.count("cancel.observed") == ends.count("cancelled")


def test_two_engines_disturb_each_other_in_nothing(open_engine: Open, right: Right) -> None:
    """Two engines on one model and one cache, each in a thread of its own: all images are right."""

    def work(order: tuple[Request, ...]) -> list[list[str]]:
        engine = open_engine()
        return [pixels(engine.run(request)) for request in order]

    orders = (MENU * 2, MENU[::-1] * 2)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(work, orders))
    for order, found in zip(orders, made, strict=True):
        assert found == [right[request.to_json(), False] for request in order]


@pytest.fixture
def guests(tmp_path: Path) -> Iterator[tuple[Guest, Guest]]:
    pair = Guest(tmp_path), Guest(tmp_path)
    yield pair
    for guest in pair:
        guest.close()


def test_two_processes_share_a_cache(
    guests: tuple[Guest, Guest], tiny_sd: Path, tmp_path: Path, right: Right
) -> None:
    """Two processes that want one model at once: one exports it, and both make the right image."""
    request = MENU[-2]
    logs = [guest.begin(tiny_sd, tmp_path / "cache", request)[1] for guest in guests]
    for guest in guests:
        assert guest.finish() == right[request.to_json(), False]
    events = [json.loads(line)["event"] for log in logs for line in log.read_text().splitlines()]
    assert events.count("export.completed") == 1


# Subscribers --------------------------------------------------------------------------------------


def test_subscribers_can_do_what_they_like(open_engine: Open, right: Right) -> None:
    """One that is stuck, one that raises and one that submits a job: no run waits for any."""
    engine, stuck, heard = open_engine(), threading.Event(), threading.Event()
    found: list[list[str]] = []

    def sleep(_: Event) -> None:
        assert stuck.wait(PATIENCE)

    def fail(_: Event) -> None:
        raise ZeroDivisionError

    def submit(event: Finished) -> None:
        if not found:
            found.append([])
            found.append(pixels(engine.submit(MENU[0]).result()))
            heard.set()
        assert event.status == "done"

    engine.subscribe(sleep)
    engine.subscribe(fail)
    engine.subscribe(submit, [Finished])
    for request in MENU:
        assert pixels(engine.run(request)) == right[request.to_json(), False]
    assert heard.wait(PATIENCE)
    assert found[1] == right[MENU[0].to_json(), False]
    stuck.set()
    assert engine.close(timeout=PATIENCE)
    log = engine.config.log_file
    assert log is not None
    assert log.read_text().count('"event":"subscriber.failed"') > len(MENU)
