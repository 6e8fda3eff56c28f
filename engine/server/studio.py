"""One engine behind all doors: jobs that end with their clients, their progress and previews."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.untrusted import Bounds, request_from_untrusted_json
from holdfast.engine.subscribers import Preview

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import Request as HttpRequest
    from PIL import Image

    from holdfast.engine.engine import Engine
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.results.result import Result

_LOOK_SECONDS = 0.1
"""Between two looks whether a client is still there."""

_PREVIEWS = 64
"""Jobs whose latest preview is kept."""


@dataclass(frozen=True)
class Order:
    """
    A client's wish as the engine can serve it.

    Attributes:
        request: What is made.
        told: What is done otherwise than asked, by the name of what was asked.
    """

    request: Request
    told: Mapping[str, str]


class Studio:
    """
    Serves the clients of one engine; the engine stays the host's to open and to close.

    Args:
        engine: Makes the images. With ``strict=False`` it takes what chats and plug-ins send.
        bounds: How much one request may ask for. None: those of `Bounds`.
    """

    def __init__(self, engine: Engine, bounds: Bounds | None = None) -> None:
        self.engine = engine
        self._bounds = bounds or Bounds()
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[Job[Result], str]] = {}
        self._previews: OrderedDict[str, Preview] = OrderedDict()
        self._facts: ModelFacts | None = None
        self._leave = engine.subscribe(self._see, (Preview,))

    def close(self) -> None:
        """Stop the jobs of all clients, and listen to the engine no more."""
        for job in self.jobs():
            job.cancel()
        self._leave()

    async def facts(self) -> ModelFacts:
        """Return what there is to know of the model; the first call waits for the engine."""
        if self._facts is None:
            self._facts = await asyncio.to_thread(self.engine.model_facts)
        return self._facts

    async def order(self, fields: Mapping[str, Any]) -> Order:
        """
        Read a request that a client sent, at the nearest size that the model can make.

        Args:
            fields: Of a request, with pictures as data URLs or base64; unset ones left out.

        Raises:
            InvalidRequest: It is no request, names files, or asks for too much.
        """
        facts = await self.facts()
        return await asyncio.to_thread(_read, dict(fields), facts, self._bounds)

    def submit(self, request: Request, client: str) -> Job[Result]:
        """Queue a request for a client, of whom only the name is known. Raises as the engine."""
        job = self.engine.submit(request)
        with self._lock:
            self._jobs[job.id] = (job, client)
        job.add_done_callback(self._forget)
        return job

    async def make(self, request: Request, http: HttpRequest) -> Result:
        """
        Make a request's images for a client, and stop where the client leaves.

        Raises:
            HoldfastError: As `Engine.run`.
        """
        job = self.submit(request, client_of(http))
        done = asyncio.ensure_future(job.bound())
        done.add_done_callback(_retrieve)
        leaving = asyncio.ensure_future(_leaves(http))
        try:
            await asyncio.wait((done, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                job.cancel()
            return await done
        finally:
            job.cancel()
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving

    def jobs(self) -> list[Job[Result]]:
        """Return the jobs of clients that wait or run, the running one first."""
        with self._lock:
            jobs = [job for job, _ in self._jobs.values()]
        return sorted(jobs, key=lambda job: (job.position is not None, job.position or 0))

    def interrupt(self, client: str) -> None:
        """Stop the client's own oldest job, or else what runs; a first pass that is there stays."""
        with self._lock:
            own = [job for job, owner in self._jobs.values() if owner == client]
        for job in (own or self.jobs())[:1]:
            job.cancel(keep="first_pass")

    def preview(self, job: Job[Any]) -> Preview | None:
        """Return the latest preview of a job."""
        return self._previews.get(job.request_id)

    def forget_facts(self) -> None:
        """Ask anew what the model is: another one was put in its place."""
        self._facts = None

    def _see(self, preview: Preview) -> None:
        if preview.request_id is None:
            return
        self._previews[preview.request_id] = preview
        while len(self._previews) > _PREVIEWS:
            self._previews.popitem(last=False)

    def _forget(self, job: Job[Result]) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)


def client_of(http: HttpRequest) -> str:
    """Return what a client's later requests have in common with this one."""
    host = http.client.host if http.client else ""
    return f"{host} {http.headers.get('authorization', '')}"


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file that tells nothing else."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


async def _leaves(http: HttpRequest) -> None:
    while not await http.is_disconnected():  # noqa: ASYNC110 - there is no event of it
        await asyncio.sleep(_LOOK_SECONDS)


def _retrieve(ended: asyncio.Future[Result]) -> None:
    """Take note of how it ended: nobody may be left who asks."""
    if not ended.cancelled():
        ended.exception()


def _read(fields: dict[str, Any], facts: ModelFacts, bounds: Bounds) -> Order:
    try:
        text = json.dumps(fields)
    except (TypeError, ValueError) as error:
        msg = "The request holds what JSON has no words for."
        raise InvalidRequest(msg) from error
    request = request_from_untrusted_json(text, bounds)
    sizes = _snapped(request, facts)
    told = {what: f"{_by(asked)} was asked for, {_by(made)} is made" for what, asked, made in sizes}
    for what, asked, made in sizes:
        names = ("hires_width", "hires_height") if what == "hires size" else ("width", "height")
        changes: dict[str, Any] = dict(zip(names, made, strict=True))
        if what == "hires size":
            changes["scale"] = None
        if asked != made:
            request = request.but(**changes)
    return Order(request, {what: told[what] for what, asked, made in sizes if asked != made})


_Size = tuple[int, int]


def _snapped(request: Request, facts: ModelFacts) -> Sequence[tuple[str, _Size, _Size]]:
    """Return each size that a request asks for: its name, as asked, and as the model makes it."""
    if isinstance(request, Detail):
        return ()
    given = (request.width or facts.size[0], request.height or facts.size[1])
    if isinstance(request, Inpaint):
        unset = request.width is None or request.height is None
        return () if unset else (("size", given, facts.nearest(*given)),)
    if isinstance(request, Img2Img):
        return (("size", request.size, facts.nearest(*request.size)),)
    if not isinstance(request, Hires):
        return (("size", given, facts.nearest(*given)),)
    first = request.first_size(facts.size)
    made = first if request.first_pass is not None else facts.nearest(*first)
    target = request.target(*made)
    return (("size", first, made), ("hires size", target, facts.nearest(*target)))


def _by(size: _Size) -> str:
    return f"{size[0]}x{size[1]}"
