"""What clients get: jobs as JSON documents, camelCase, with times in RFC 3339."""

from __future__ import annotations

import datetime

import msgspec
from msgspec import UNSET, UnsetType

from delineate.api.links import Link
from delineate.api.schemas import FileId
from delineate.job import Job, JobStatus, Stage
from delineate.queue.progress import JobEvent


class JobLinks(msgspec.Struct, frozen=True, rename={"status": "self"}):
    status: str
    progress: str
    download: str


class Created(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An accepted export. `totalFileIds` is `totalFiles` under its older name."""

    job_id: str
    status: JobStatus
    total_files: int
    total_file_ids: int
    created_at: str
    links: JobLinks


class JobFailure(msgspec.Struct, frozen=True):
    code: str
    message: str


class JobDocument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A job as polling sees it; `filename` is in the `completed` event only."""

    job_id: str
    status: JobStatus
    progress: int
    current_file: int
    total_files: int
    stage: Stage
    message: str
    attempts: int
    queue_position: int | UnsetType = UNSET
    eta_seconds: int | UnsetType = UNSET
    created_at: str
    updated_at: str
    started_at: str | UnsetType = UNSET
    completed_at: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    download_url: str | UnsetType = UNSET
    expires_at: str | UnsetType = UNSET
    filename: str | UnsetType = UNSET
    skipped_files: tuple[int, ...] | UnsetType = UNSET
    error: JobFailure | UnsetType = UNSET


class ProgressDocument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The data of a `progress` event."""

    job_id: str
    status: JobStatus
    progress: int
    current_file: int
    total_files: int
    stage: Stage
    message: str
    attempts: int
    bytes_done: int
    bytes_total: int
    updated_at: str


class JobPage(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    jobs: list[JobDocument]
    next_cursor: str | None


class DownloadDocument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    job_id: str
    download_url: str
    expires_at: str
    filename: str
    size: int


class Availability(msgspec.Struct, frozen=True, kw_only=True, rename={"s3_key": "s3Key"}):
    file_id: FileId
    available: bool
    s3_key: str | None
    size: int | None


class StartDocument(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename={"job_id": "jobId", "download_url": "downloadUrl", "processing_time_ms": "processingTimeMs"},
):
    file_id: FileId
    job_id: str
    status: JobStatus
    download_url: str | None
    size: int | None
    processing_time_ms: int
    message: str


class HealthDocument(msgspec.Struct, frozen=True):
    status: str
    checks: dict[str, str]


def timestamp(unix_seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds, e.g. 2026-11-03T10:30:00.250Z."""
    moment = datetime.datetime.fromtimestamp(unix_seconds, datetime.UTC)
    return f"{moment.isoformat(timespec='milliseconds')[:-6]}Z"


def job_path(job_id: str) -> str:
    return f"/v1/export/{job_id}"


def created_document(job: Job) -> Created:
    path = job_path(job.id)
    return Created(
        job_id=job.id,
        status=job.status,
        total_files=job.total_files,
        total_file_ids=job.total_files,
        created_at=timestamp(job.created_at),
        links=JobLinks(path, f"{path}/progress", f"{path}/download"),
    )


def job_document(
    job: Job, *, link: Link | None = None, position: int | None = None, with_filename: bool = False
) -> JobDocument:
    """`link` belongs to a completed job, `position` to a waiting one."""
    result = job.result if job.status is JobStatus.COMPLETED else None
    failure = job.failure if job.status is JobStatus.FAILED else None
    return JobDocument(
        job_id=job.id,
        status=job.status,
        progress=_percent(job.status, job.progress.percent),
        current_file=job.progress.current_file,
        total_files=job.total_files,
        stage=job.progress.stage,
        message=job.progress.message,
        attempts=job.attempts,
        queue_position=UNSET if position is None else position,
        eta_seconds=_eta_seconds(job),
        created_at=timestamp(job.created_at),
        updated_at=timestamp(job.updated_at),
        started_at=_optional_time(job.started_at),
        completed_at=_optional_time(job.completed_at),
        size=result.size if result else UNSET,
        download_url=link.url if link else UNSET,
        expires_at=timestamp(link.expires_at) if link else UNSET,
        filename=result.filename if result and with_filename else UNSET,
        skipped_files=result.skipped_file_ids if result and result.skipped_file_ids else UNSET,
        error=JobFailure(failure.code, failure.message) if failure else UNSET,
    )


def progress_document(job: Job) -> ProgressDocument:
    """The first event of a stream: the same fields as the events that follow."""
    return ProgressDocument(
        job_id=job.id,
        status=job.status,
        progress=_percent(job.status, job.progress.percent),
        current_file=job.progress.current_file,
        total_files=job.total_files,
        stage=job.progress.stage,
        message=job.progress.message,
        attempts=job.attempts,
        bytes_done=job.progress.bytes_done,
        bytes_total=job.progress.bytes_total,
        updated_at=timestamp(job.updated_at),
    )


def event_document(job_id: str, event: JobEvent) -> ProgressDocument:
    return ProgressDocument(
        job_id=job_id,
        status=event.status,
        progress=_percent(event.status, event.progress),
        current_file=event.current_file,
        total_files=event.total_files,
        stage=event.stage,
        message=event.message,
        attempts=event.attempts,
        bytes_done=event.bytes_done,
        bytes_total=event.bytes_total,
        updated_at=timestamp(event.updated_at / 1000),
    )


def _percent(status: JobStatus, percent: int) -> int:
    # 100 is a promise that the archive is there.
    return 100 if status is JobStatus.COMPLETED else max(0, min(percent, 99))


def _optional_time(unix_seconds: float | None) -> str | UnsetType:
    return UNSET if unix_seconds is None else timestamp(unix_seconds)


def _eta_seconds(job: Job) -> int | UnsetType:
    """By the attempt's mean speed up to the last report; unset while there is nothing to go by."""
    done, total, began = job.progress.bytes_done, job.progress.bytes_total, job.attempt_started_at
    if job.status is not JobStatus.PROCESSING or began is None or not 0 < done <= total:
        return UNSET
    # Both times are by the clock of Redis, so that this machine's need not agree with it.
    return round(max(job.updated_at - began, 0.0) * (total - done) / done)
