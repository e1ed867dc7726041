"""The older endpoints for one file: is it there, and fetch it while the client waits.

The older names of the export endpoints are beside them, in exports.py and events.py.
"""

from __future__ import annotations

import asyncio

from delineate.api.documents import Availability, StartDocument, created_document
from delineate.api.exports import POLL_SECONDS, enqueue
from delineate.api.feeds import Feed
from delineate.api.handler import Answer, Headers, Request, Route, json_answer
from delineate.api.schemas import ExportRequest, parse_file, require_json
from delineate.errors import QueueUnavailable
from delineate.job import Job, JobStatus


async def check_file(request: Request) -> Answer:
    require_json(request.headers)
    file_id = parse_file(request.body).file_id
    found = await request.services.storage.stat_source(file_id)
    key, size = (found[0], found[1].size) if found else (None, None)
    return json_answer(Availability(file_id=file_id, available=found is not None, s3_key=key, size=size))


async def start_download(request: Request) -> Answer:
    """Waits up to api.request_timeout for the job's end; later than that the job goes on and the client polls."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    require_json(request.headers)
    file_id = parse_file(request.body).file_id
    enqueued, headers = await enqueue(request, ExportRequest((file_id,)))
    job, feed = enqueued.job, None
    headers = (*headers, ("Location", created_document(job).links.status))
    try:
        feed = await request.services.feeds.join(job.id)
        ended = await _end_of(feed, request, began + request.services.config.api.request_timeout)
        link = feed.link
    except QueueUnavailable:
        ended = None  # it was accepted, so it runs: that Redis went away since is no reason to say otherwise
    finally:
        if feed is not None:
            request.services.feeds.leave(feed)
    if ended is None:
        return _still_running(job, headers)
    document = StartDocument(
        file_id=file_id,
        job_id=ended.id,
        status=ended.status,
        download_url=link.url if link else None,
        size=ended.result.size if ended.result and ended.status is JobStatus.COMPLETED else None,
        processing_time_ms=round((loop.time() - began) * 1000),
        message=ended.failure.message if ended.failure else ended.progress.message,
    )
    return json_answer(document, headers=headers)


async def _end_of(feed: Feed, request: Request, deadline: float) -> Job | None:
    """The job once it has ended; None if the time is over first, or the process has to end."""
    changed = asyncio.Event()
    feed.watchers.add(changed.set)
    try:
        async with asyncio.timeout_at(deadline):
            while feed.final is None and not feed.gone and not request.services.draining.is_set():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        pass
    finally:
        feed.watchers.discard(changed.set)
    return feed.final


def _still_running(job: Job, headers: Headers) -> Answer:
    return json_answer(created_document(job), status=202, headers=(*headers, ("Retry-After", str(POLL_SECONDS))))


ROUTES = [
    Route("POST", "/v1/download/check", check_file),
    Route("POST", "/v1/download/start", start_download, patient=True, makes_job=True),
]
