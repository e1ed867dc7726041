"""Exports: ask for one, look at it, fetch it, cancel it, try it again, list them."""

from __future__ import annotations

import logging
import re

from delineate.api.auth import open_session
from delineate.api.documents import (
    DownloadDocument,
    JobPage,
    created_document,
    job_document,
    job_path,
    timestamp,
)
from delineate.api.handler import Answer, Headers, Request, Route, invalid_query, json_answer
from delineate.api.links import Link
from delineate.api.schemas import ExportRequest, parse_export, parse_idempotency_key, require_json
from delineate.errors import ArchiveExpired, JobNotFound, JobNotReady
from delineate.job import Job, JobStatus, NewJob, new_job_id
from delineate.queue import Enqueued
from delineate.telemetry import spans, tracing
from delineate.telemetry.logs import job_fields
from delineate.telemetry.metrics import DOWNLOAD_LINKS

_log = logging.getLogger(__name__)

# The reference polls every 2 to 5 seconds.
POLL_SECONDS = 2
DEFAULT_PAGE, LARGEST_PAGE = 20, 100
_CURSOR = re.compile(r"[0-9A-Za-z_.:-]{1,64}")
_LIMIT = re.compile(r"[0-9]{1,4}")
_ETAGS = re.compile(r'\*|(?:W/)?"[^"]*"')


async def create_export(request: Request) -> Answer:
    require_json(request.headers)
    enqueued, headers = await enqueue(request, parse_export(request.body))
    document = created_document(enqueued.job)
    return json_answer(document, headers=(*headers, ("Location", document.links.status)))


async def enqueue(request: Request, wanted: ExportRequest) -> tuple[Enqueued, Headers]:
    """Accept the job for the caller's session; the headers belong to the answer."""
    key = parse_idempotency_key(request.headers)
    session = open_session(request, idempotency_key=key)
    with spans.sending() as span:
        enqueued = await request.services.queue.enqueue(
            NewJob(
                id=new_job_id(),
                user=session.user,
                file_ids=wanted.file_ids,
                on_missing=wanted.on_missing,
                idempotency_key=key,
                fingerprint=wanted.fingerprint() if key is not None else "",
                traceparent=tracing.traceparent(),
                request_id=request.request_id,
            )
        )
        spans.sent(span, enqueued.job)
    spans.about(enqueued.job)
    if not enqueued.replayed:
        context = {**job_fields(enqueued.job), "files": enqueued.job.total_files}
        _log.info("job accepted", extra={"context": context})
    replayed: Headers = (("Idempotency-Replayed", "true"),) if enqueued.replayed else ()
    return enqueued, (*session.headers, *replayed)


async def show_export(request: Request) -> Answer:
    services = request.services
    job = await _existing(request)
    link: Link | None = None
    position: int | None = None
    if job.status is JobStatus.COMPLETED:
        link = await services.links.link(job)
    elif job.status is JobStatus.QUEUED:
        position = await services.queue.position(job.id)
    # Weak: what changes by the second (etaSeconds) is no reason to send the rest again.
    etag = f'W/"{job.version}-{services.links.epoch() if link else position or 0}"'
    headers: Headers = (("ETag", etag), ("Cache-Control", "private, no-cache"))
    if not job.status.is_final:
        headers = (*headers, ("Retry-After", str(POLL_SECONDS)))
    if _matches(request.headers.get("If-None-Match", ""), etag):
        return Answer(status=304, headers=headers)
    return json_answer(job_document(job, link=link, position=position), headers=headers)


async def download_export(request: Request) -> Answer:
    redirect = request.query("redirect")
    job = await _existing(request)
    if job.status is not JobStatus.COMPLETED or job.result is None:
        DOWNLOAD_LINKS.labels("not_ready").inc()
        raise _not_ready(job)
    try:
        link = await request.services.links.fresh(job)
    except ArchiveExpired:
        DOWNLOAD_LINKS.labels("expired").inc()
        raise
    DOWNLOAD_LINKS.labels("ready").inc()
    document = DownloadDocument(
        job_id=job.id,
        download_url=link.url,
        expires_at=timestamp(link.expires_at),
        filename=job.result.filename,
        size=job.result.size,
    )
    if redirect in ("1", "true"):
        return json_answer(document, status=302, headers=(("Location", link.url),))
    return json_answer(document)


async def cancel_export(request: Request) -> Answer:
    job = await request.services.queue.cancel(request.job_id)
    spans.about(job)
    _log.info("job cancelled", extra={"context": job_fields(job)})
    return json_answer(job_document(job))


async def retry_export(request: Request) -> Answer:
    job = await request.services.queue.requeue(request.job_id)
    spans.about(job)
    _log.info("job retried", extra={"context": job_fields(job)})
    return json_answer(job_document(job), headers=(("Location", job_path(job.id)),))


async def list_exports(request: Request) -> Answer:
    """Without links, which would have to be signed for each job: `.../download` has them."""
    text = request.query("limit")
    limit = DEFAULT_PAGE if text is None else int(text) if _LIMIT.fullmatch(text) else 0
    if not 1 <= limit <= LARGEST_PAGE:
        raise invalid_query("limit", f"must be an integer from 1 to {LARGEST_PAGE}")
    cursor = request.query("cursor")
    if cursor is not None and not _CURSOR.fullmatch(cursor):
        raise invalid_query("cursor", "must be a nextCursor of an earlier answer")
    session = open_session(request)
    try:
        jobs, following = await request.services.queue.list_jobs(session.user, limit, cursor)
    except ValueError:
        raise invalid_query("cursor", "must be a nextCursor of an earlier answer") from None
    page = JobPage(jobs=[job_document(job) for job in jobs], next_cursor=following)
    return json_answer(page, headers=session.headers)


async def _existing(request: Request) -> Job:
    job = await request.services.queue.get(request.job_id)
    if job is None:
        raise JobNotFound("there is no such job")
    spans.about(job)
    return job


def _not_ready(job: Job) -> JobNotReady:
    if job.status is JobStatus.FAILED and job.failure is not None:
        return JobNotReady(f"the export failed: {job.failure.message}", code="job_failed")
    if job.status is JobStatus.CANCELLED:
        return JobNotReady("the export was cancelled", code="job_cancelled")
    return JobNotReady("the export is not finished yet", retry_after=POLL_SECONDS)


def _matches(wanted: str, etag: str) -> bool:
    """RFC 9110 13.1.2: weak comparison with any of a list, or `*`."""
    if not wanted:
        return False
    found = _ETAGS.findall(wanted)
    return "*" in found or etag.removeprefix("W/") in (tag.removeprefix("W/") for tag in found)


ROUTES = [
    Route("POST", "/v1/export", create_export, makes_job=True),
    Route("POST", "/v1/download/initiate", create_export, makes_job=True),
    Route("GET", "/v1/export/{jobId}", show_export),
    Route("GET", "/v1/download/status/{jobId}", show_export),
    Route("GET", "/v1/export/{jobId}/download", download_export),
    Route("DELETE", "/v1/export/{jobId}", cancel_export),
    Route("DELETE", "/v1/download/{jobId}", cancel_export),
    Route("POST", "/v1/export/{jobId}/retry", retry_export),
    Route("GET", "/v1/exports", list_exports),
]
