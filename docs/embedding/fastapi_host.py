"""
A web service: submit a request, follow it by server-sent events, fetch the image, cancel.

The id of a job is the only key to it and cannot be guessed: no visitor stops another one's job.
Run it with `uvicorn fastapi_host:service`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse

from holdfast.engine import Engine, HoldfastError, InvalidRequest, Job, Result
from holdfast.engine import request_from_untrusted_json as read

jobs: dict[str, Job[Result]] = {}


@asynccontextmanager
async def life(service: FastAPI) -> AsyncIterator[None]:
    """Open the engine with the service, and close it too."""
    service.state.engine = Engine("demo")
    yield
    await asyncio.to_thread(service.state.engine.close, cancel=True)


service = FastAPI(title="Holdfast", lifespan=life)


@service.exception_handler(HoldfastError)
async def explain(_: Request, error: HoldfastError) -> JSONResponse:
    """Answer with what Holdfast says."""
    return JSONResponse({"detail": str(error)}, 422 if isinstance(error, InvalidRequest) else 500)


async def find(job_id: str) -> Job[Result]:
    """Return the job of an id."""
    if job_id not in jobs:
        raise HTTPException(404, "no such job")
    return jobs[job_id]


@service.post("/jobs", status_code=202)
async def submit(request: Request) -> dict[str, str]:
    """Queue a request, given as its JSON: its pictures stand in it, and its cost has a bound."""
    asked = await asyncio.to_thread(read, await request.body())
    job = service.state.engine.submit(asked)
    jobs[job.id] = job
    return {"id": job.id}


@service.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def events(job: Annotated[Job[Result], Depends(find)]) -> AsyncIterator[dict[str, Any]]:
    """Tell five times a second where a job stands, until it has ended."""
    ended = False
    while not ended:
        ended = job.done()
        yield {"status": job.status, "position": job.position, **asdict(job.progress)}
        await asyncio.sleep(0.2)


@service.get("/jobs/{job_id}/image")
async def image(job: Annotated[Job[Result], Depends(find)]) -> Response:
    """Wait for a job's image."""
    png = await asyncio.to_thread((await job).png)
    return Response(png, media_type="image/png")


@service.delete("/jobs/{job_id}")
async def cancel(job: Annotated[Job[Result], Depends(find)]) -> dict[str, bool]:
    """Stop a job, and forget it."""
    return {"asked": jobs.pop(job.id).cancel()}
