from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from holdfast.engine import Cancelled, Engine, Hires, Txt2Img
from tests.support.audited import assert_clean

from .conftest import EXAMPLES, PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from .conftest import Halt

    Example = Callable[..., ModuleType]

PROMPT = "a large red circle on a blue background"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    """Every example fits on a page or two: under 80 lines."""
    assert len(path.read_text().splitlines()) < 80


# A plain script -----------------------------------------------------------------------------------


def test_a_script_makes_both_passes(
    engine: Engine, example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script's image is the engine's own, with its infotext, and the terminal saw progress."""
    script = example("script")
    assert script.make(engine, PROMPT, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        right = engine.run(Hires(prompt=PROMPT, seed=7, scale=2.0)).images[0]
        assert image.tobytes() == right.tobytes()
        assert image.info["parameters"].startswith(PROMPT)
    assert "% " in capsys.readouterr().out


def test_an_interrupted_script_keeps_the_first_pass(
    engine: Engine,
    example: Example,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    halt: Halt,
) -> None:
    """Ctrl-C in the second pass leaves the first pass's image, and the script knows."""
    script = example("script")
    halt.go_on(1)

    def interrupt(progress: Any) -> None:
        if progress.pass_number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "show", interrupt)
    assert not script.make(engine, PROMPT, tmp_path / "out.png")
    halt.go_on(2)
    right = engine.run(Hires(prompt=PROMPT, seed=7, scale=2.0)).first_pass[0]
    with Image.open(tmp_path / "out.png") as image:
        assert image.tobytes() == right.tobytes()


# asyncio ------------------------------------------------------------------------------------------


def test_a_loop_awaits_many_jobs(engine: Engine, example: Example) -> None:
    """Results come in the order of the requests; progress ends at 1; the loop is never blocked."""
    host = example("asyncio_host")
    fractions: list[float] = []
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    async def main() -> list[Any]:
        beating = asyncio.create_task(beat())
        results: list[Any] = await host.gallery(engine, fractions.append)
        beating.cancel()
        return results

    results = asyncio.run(main())
    assert [result.seeds for result in results] == [(1,), (2,), (3,)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert beats > 100


@pytest.mark.usefixtures("halt")
def test_a_loop_stops_jobs(engine: Engine, example: Example) -> None:
    """A deadline that passes is a Cancelled, and a visitor who leaves takes his job along."""
    host = example("asyncio_host")
    engine.run(Txt2Img(prompt=PROMPT, steps=1))
    error = asyncio.run(host.impatient(engine, 0.05))
    assert isinstance(error, Cancelled)
    assert "its deadline of 0.05 s passed" in str(error)

    async def leave() -> None:
        task = asyncio.create_task(host.visitor(engine))
        await asyncio.sleep(0.01)  # until it is submitted the job before may count as running
        while engine.activity != "running":
            assert not task.done()
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert engine.run(Txt2Img(prompt=PROMPT, steps=1)).images
    log = (engine.config.log_file or EXAMPLES).read_text().splitlines()
    assert [json.loads(line)["event"] for line in log].count("cancel.observed") == 2


# FastAPI ------------------------------------------------------------------------------------------


@pytest.fixture
def web(engine: Engine, example: Example, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the service, which runs in a real server: only that one streams."""
    host = example("fastapi_host", "fastapi", "httpx", "uvicorn")
    import httpx
    import uvicorn

    monkeypatch.setattr(host, "Engine", lambda _: engine)
    server = uvicorn.Server(uvicorn.Config(host.service, port=0, log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))
    serving = threading.Thread(target=server.run, args=([listening],))
    serving.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        yield client
    server.should_exit = True
    serving.join(PATIENCE)
    assert not serving.is_alive()
    assert engine.close(timeout=PATIENCE)


def told(client: Any, job_id: str) -> Iterator[dict[str, Any]]:
    with client.stream("GET", f"/jobs/{job_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


def test_a_service_streams_progress_and_serves_the_image(engine: Engine, web: Any) -> None:
    """Server-sent events tell of a request until it is done; its image is a PNG."""
    request = Hires(prompt=PROMPT, seed=7, steps=8)
    posted = web.post("/jobs", json=json.loads(request.to_json()))
    assert posted.status_code == 202
    job_id = posted.json()["id"]
    events = list(told(web, job_id))
    assert events[-1]["status"] == "done"
    assert events[-1]["fraction"] == 1
    fractions = [event["fraction"] for event in events]
    assert fractions == sorted(fractions)
    served = web.get(f"/jobs/{job_id}/image")
    assert served.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(served.content)) as image:
        assert image.tobytes() == engine.run(request).images[0].tobytes()


@pytest.mark.usefixtures("halt")
def test_a_service_stops_a_job_for_its_holder_only(web: Any) -> None:
    """An id stops its own job; another one, such as the log tells, stops none."""
    long = Hires(prompt=PROMPT, seed=7, steps=20)
    first, second = (
        web.post("/jobs", json=json.loads(long.to_json())).json()["id"] for _ in range(2)
    )
    for guess in ("hires-1", "hires-2", first[:-1], "0"):
        assert web.delete(f"/jobs/{guess}").status_code == 404
    assert web.delete(f"/jobs/{second}").json() == {"asked": True}
    assert web.get(f"/jobs/{second}/image").status_code == 404
    statuses: list[str] = []
    for event in told(web, first):
        if not statuses:
            assert web.delete(f"/jobs/{first}").json() == {"asked": True}
        statuses.append(event["status"])
    assert statuses[0] in ("queued", "running")
    assert statuses[-1] == "cancelled"


def test_a_service_says_what_is_wrong(web: Any) -> None:
    """A bad request is answered with the engine's words."""
    for request, words in (
        ({"kind": "txt2img", "steps": 0}, "steps"),
        ({"kind": "poem"}, "kind"),
    ):
        answer = web.post("/jobs", json=request)
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
    job_id = web.post("/jobs", json={"kind": "txt2img", "width": 65}).json()["id"]
    assert list(told(web, job_id))[-1]["status"] == "failed"
    answer = web.get(f"/jobs/{job_id}/image")
    assert answer.status_code == 422
    assert "multiples of 16" in answer.json()["detail"]
    assert web.get("/jobs/none/events").status_code == 404


def test_a_server_that_is_asked_to_end_gives_all_back(
    tiny_ir: Path, tmp_path: Path, example: Example
) -> None:
    """Under uvicorn a SIGTERM amid a run stops it and closes the engine; the log is whole."""
    example("fastapi_host", "fastapi", "httpx", "uvicorn")
    import httpx

    log = tmp_path / "log.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = textwrap.dedent(f"""
        import fastapi_host
        import uvicorn
        from holdfast.engine import Engine
        settings = {{"cache_dir": {str(tmp_path)!r}, "log_file": {str(log)!r}}}
        fastapi_host.Engine = lambda _: Engine({str(tiny_ir)!r}, **settings)
        uvicorn.run(fastapi_host.service, port={port}, timeout_graceful_shutdown=1)
    """)
    with subprocess.Popen(  # noqa: S603 - our own interpreter, on the program above
        [sys.executable, "-c", program],
        cwd=EXAMPLES, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as server:  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
                post_when_ready(client, server)
                while '"step.completed"' not in log.read_text():
                    assert server.poll() is None
                    time.sleep(0.05)
            server.send_signal(signal.SIGTERM)
            server.wait(PATIENCE)
        finally:
            server.kill()
    assert_clean(log)
    names = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert names[-1] == "engine.closed"
    assert "request.cancelled" in names
    assert "request.completed" not in names


def post_when_ready(client: Any, server: subprocess.Popen[bytes]) -> None:
    """Submit a run of minutes as soon as the server takes it."""
    import httpx

    request = Txt2Img(prompt=PROMPT, seed=7, width=64, height=64, steps=900, batch=8)
    long = json.loads(request.to_json())
    while True:
        assert server.poll() is None
        try:
            assert client.post("/jobs", json=long).status_code == 202
        except httpx.ConnectError:
            time.sleep(0.1)
        else:
            return


# All ----------------------------------------------------------------------------------------------


def test_an_example_says_nothing_when_it_is_imported() -> None:
    """Loading the examples without any extra package prints nothing and loads no model."""
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, script, asyncio_host; print('torch' in sys.modules)",
        ],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert (ran.stdout, ran.stderr) == ("False\n", "")
