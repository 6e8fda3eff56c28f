"""One engine behind all doors: jobs that end with their clients, their progress and previews."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.passes.images import as_rgb
from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.pictures import read_picture
from holdfast.engine.requests.untrusted import Bounds, request_from_untrusted_json
from holdfast.engine.requests.upscalers import upscale_image
from holdfast.engine.requests.values import Reading, read_as
from holdfast.engine.results.result import Degradation
from holdfast.engine.server.visits import note_request
from holdfast.engine.subscribers import Preview

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from fastapi import Request as HttpRequest
    from PIL import Image

    from holdfast.engine.engine import Engine
    from holdfast.engine.jobs.job import Job
    from holdfast.engine.models.facts import ModelFacts
    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.requests.sizes import Fit
    from holdfast.engine.results.result import Result

Size = tuple[int, int]
BY_VALUE = Reading(files=False, formats=("PNG", "JPEG", "WEBP"), pixels=Bounds().picture)
"""How pictures of clients are read."""

_LOOK_SECONDS = 0.1
"""Between two looks whether a client is still there."""

_PREVIEWS = 64
"""Jobs whose latest preview is kept."""

_SEEDS = 2**32


@dataclass(frozen=True)
class Order:
    """
    A client's wish as the engine can serve it.

    Attributes:
        request: What is made; its seed is settled.
        told: What is done otherwise than asked.
    """

    request: Request
    told: tuple[Degradation, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image."""
        first = self.request.seed or 0
        return tuple(range(first, first + self.request.batch))


class Studio:
    """
    Serves the clients of one engine; the engine stays the host's to open and to close.

    Args:
        engine: Makes the images. With ``strict=False`` it takes what chats and plug-ins send.
        bounds: How much one request may ask for. None: those of `Bounds`.
        interrupts: Whose jobs a client may stop: ``"all"``, its own first, as in A1111; or
            ``"own"``, known by address and credentials.
        aliases: Further names of the model for OpenAI's clients, each with words that are added
            to its prompts, such as ``{"ink": "<lora:ink:0.8>"}``.
    """

    def __init__(
        self,
        engine: Engine,
        bounds: Bounds | None = None,
        *,
        interrupts: Literal["all", "own"] = "all",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.aliases = dict(aliases or {})
        self._bounds = bounds or Bounds()
        self._interrupts = interrupts
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[Job[Result], str]] = {}
        self._previews: OrderedDict[str, Preview] = OrderedDict()
        self._facts: tuple[str | Path, ModelFacts] | None = None
        self._leave = engine.subscribe(self._see, (Preview,))

    def close(self) -> None:
        """Stop the jobs of all clients, and listen to the engine no more."""
        for job in self.jobs():
            job.cancel()
        self._leave()

    async def facts(self) -> ModelFacts:
        """Return what there is to know of the model; the first call of each one waits for it."""
        model = self.engine.config.model
        if self._facts is None or self._facts[0] != model:
            self._facts = (model, await asyncio.to_thread(self.engine.model_facts))
        return self._facts[1]

    async def order(
        self,
        fields: Mapping[str, Any],
        told: Sequence[Degradation] = (),
        fit: Fit = "crop",
    ) -> Order:
        """
        Read a request that a client sent, at the nearest size that the model can make.

        Args:
            fields: Of a request, with pictures as data URLs or base64; unset ones left out.
            told: What of the wish is otherwise in them. A strict engine refuses it.
            fit: How a picture that is redrawn in is brought to the size that is asked for.

        Raises:
            InvalidRequest: It is no request, names files, or asks for too much.
        """
        facts = await self.facts()
        strict = self.engine.config.strict
        if strict and told:
            first = told[0]
            msg = (
                f"{first.kind}: {first.asked} is not possible here. Leave it out; an engine with "
                f"strict=False would do this instead: {first.given}."
            )
            raise InvalidRequest(msg)
        return await asyncio.to_thread(self._read, dict(fields), tuple(told), facts, fit, strict)

    def submit(self, order: Order, http: HttpRequest) -> Job[Result]:
        """Queue an order of a client. Raises as the engine."""
        job = self.engine.submit(order.request)
        note_request(http, job.request_id)
        with self._lock:
            self._jobs[job.id] = (job, client_of(http))
        job.add_done_callback(self._forget)
        for each in order.told:
            self.engine.emit("degradation", kind=each.kind, asked=each.asked, given=each.given,
                             request_id=job.request_id)  # fmt: skip
        return job

    async def make(self, order: Order, http: HttpRequest) -> Result:
        """
        Make the images of an order, and stop where the client leaves.

        Raises:
            HoldfastError: As `Engine.run`.
        """
        job = self.submit(order, http)
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

    def interrupt(self, http: HttpRequest) -> None:
        """Stop the client's own oldest job, or else what runs; a first pass that is there stays."""
        client = client_of(http)
        with self._lock:
            own = [job for job, owner in self._jobs.values() if owner == client]
        others = self.jobs() if self._interrupts == "all" else []
        for job in (own or others)[:1]:
            job.cancel(keep="first_pass")

    def preview(self, job: Job[Any]) -> Preview | None:
        """Return the latest preview of a job."""
        return self._previews.get(job.request_id)

    def _see(self, preview: Preview) -> None:
        if preview.request_id is None:
            return
        self._previews[preview.request_id] = preview
        while len(self._previews) > _PREVIEWS:
            self._previews.popitem(last=False)

    def _forget(self, job: Job[Result]) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)

    def _read(
        self,
        fields: dict[str, Any],
        told: tuple[Degradation, ...],
        facts: ModelFacts,
        fit: Fit,
        strict: bool,  # noqa: FBT001 - the engine's setting, at the moment of the order
    ) -> Order:
        if fields.get("seed") is None:  # also what was stopped has one to tell
            fields["seed"] = secrets.randbelow(_SEEDS)
        if not strict:
            told += tuple(_made_smaller(fields, facts, self._bounds.pixels))
        try:
            text = json.dumps(fields)
        except (TypeError, ValueError) as error:
            msg = "The request holds what JSON has no words for."
            raise InvalidRequest(msg) from error
        request = request_from_untrusted_json(text, self._bounds)
        if strict:
            return Order(request, told)
        for what, asked, made in _snapped(request, facts):
            if asked != made:
                request = _sized(request, what, made)
                told += (Degradation(what, _by(asked), _by(made)),)
        if isinstance(request, Inpaint) and request.area == "whole":
            request = _brought(request, fit)
        return Order(request, told)


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


def _made_smaller(fields: dict[str, Any], facts: ModelFacts, most: int) -> Iterator[Degradation]:
    """Bound the size of a picture that is drawn over at no size in particular, as photos are."""
    if fields.get("kind") != "img2img" or "width" in fields or "height" in fields:
        return
    try:
        with read_as(BY_VALUE):
            width, height = read_picture(fields.get("image")).size
    except ValueError:
        return  # the request itself says what is wrong with it
    if width * height <= most:
        return
    factor = math.sqrt(most / (width * height))
    step = facts.multiple
    made = tuple(max(1, int(side * factor) // step) * step for side in (width, height))
    fields["width"], fields["height"] = made
    yield Degradation("size", _by((width, height)), _by((made[0], made[1])))


def _snapped(request: Request, facts: ModelFacts) -> Sequence[tuple[str, Size, Size]]:
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


def _sized(request: Request, what: str, size: Size) -> Request:
    """Return a request at another size."""
    changes: dict[str, Any] = {"width": size[0], "height": size[1]}
    if what == "hires size":
        changes = {"hires_width": size[0], "hires_height": size[1], "scale": None}
    changed: Request = request.but(**changes)
    return changed


def _brought(request: Inpaint, fit: Fit) -> Inpaint:
    """Bring picture and mask to the size that is asked for; what stays is that of the picture."""
    if request.width is None or request.height is None:
        return request
    size = (request.width, request.height)
    if request.mask is None or request.image.size == size or any(request.outpaint):
        return request
    mask = upscale_image(request.mask.convert("RGB"), "lanczos", size, fit).convert("L")
    image = upscale_image(as_rgb(request.image), "lanczos", size, fit)
    return request.but(image=image, mask=mask)


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
