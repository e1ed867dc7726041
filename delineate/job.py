"""What a job is: its states, its fields and the rules of retrying; pure, without I/O.

A job's journey (the transitions are the Lua files of `delineate/queue/lua`):

    enqueue            claim                finish
    -------> queued -----------> processing ------> completed
               ^ ^                |  |  |  bury
               | '--- release ----'  |  '--------> failed
               | '--- retry, reap ---'               |
               |                                     |
               '------------- requeue ---------------+
                                                     |
    queued, processing --- cancel --> cancelled -----'
"""

from __future__ import annotations

import enum
import random
import re
import uuid
from typing import Literal

import msgspec

OnMissing = Literal["fail", "skip"]
JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class JobStatus(enum.StrEnum):
    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED)


class Stage(enum.StrEnum):
    """Where an unfinished job is; `waiting` before the first claim and between attempts."""

    WAITING = "waiting"
    PLANNING = "planning"
    PACKING = "packing"
    FINISHING = "finishing"
    DONE = "done"


class ErrorClass(enum.StrEnum):
    VALIDATION = "validation"
    NOT_FOUND = "not_found"
    PERMISSION = "permission"
    TIMEOUT = "timeout"
    NETWORK = "network"
    INTERNAL = "internal"
    CRASH = "crash"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an attempt, or the job, failed: a stable `code`, its class, and words for the user."""

    code: str
    error_class: ErrorClass
    message: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far an attempt is. `percent` is 0-99 while processing: 100 belongs to completed jobs.

    `current_file` counts finished files, 0 to the job's total_files; bytes are of the archive.
    """

    percent: int
    current_file: int
    stage: Stage
    message: str
    bytes_done: int = 0
    bytes_total: int = 0


class ArchiveResult(msgspec.Struct, frozen=True, kw_only=True):
    """A finished archive: its key in the archive bucket, its size in bytes, and what was left out."""

    key: str
    size: int
    filename: str
    skipped_file_ids: tuple[int, ...] = ()


class SourceFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file as the store described it when the archive was planned.

    `name` is what its owner calls it, unsanitised; `size` is bytes, `modified` Unix
    seconds; `etag` is compared with the ETag of every later answer.
    """

    file_id: int
    key: str
    name: str
    size: int
    etag: str
    modified: float


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """An unfinished multipart upload of an archive: what another attempt needs to go on with it.

    `digest` is of the plan: only a plan with the same digest makes the same parts.
    """

    key: str
    upload_id: str
    digest: str


class SavedPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part that the store has: its `number` from 1, its ETag, and the CRC-32 of each file segment in it."""

    number: int
    etag: str
    crcs: tuple[int, ...]


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for, before it is accepted. `id` is made by the caller so that enqueue can be repeated.

    `fingerprint` is a digest of what was asked: the same idempotency key with another fingerprint is a conflict.
    """

    id: str
    user: str
    file_ids: tuple[int, ...]
    on_missing: OnMissing = "fail"
    idempotency_key: str | None = None
    fingerprint: str = ""
    traceparent: str = ""
    request_id: str = ""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One export request as Redis has it. Times are Unix seconds by the clock of Redis, None if not yet.

    `version` rises with every change and is the SSE event id. `token` is the
    fencing token of the latest lease. `due_at` is set while a retry waits. `span` and
    `previous_span` are the span ids (hex) of the latest attempt and the one before it, if they are traced.
    """

    id: str
    user: str
    status: JobStatus
    file_ids: tuple[int, ...]
    on_missing: OnMissing
    progress: Progress
    attempts: int
    crashes: int
    version: int
    token: int
    created_at: float
    updated_at: float
    started_at: float | None = None
    attempt_started_at: float | None = None
    completed_at: float | None = None
    due_at: float | None = None
    worker: str | None = None
    upload: Upload | None = None
    result: ArchiveResult | None = None
    failure: Failure | None = None
    traceparent: str = ""
    request_id: str = ""
    span: str = ""
    previous_span: str = ""

    @property
    def total_files(self) -> int:
        return len(self.file_ids)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's hold on one attempt. Every later transition shows `token` and is refused when it is old."""

    job: Job
    worker: str
    token: int


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """`attempts` in all; the n-th retry waits `backoff_seconds` x 2^(n-1), plus or minus a fifth."""

    attempts: int
    backoff_seconds: float
    internal_attempts: int = 2

    def delay_before_next(self, error_class: ErrorClass, attempts_made: int) -> float | None:
        """Seconds to wait before the next attempt; None if the job must be buried."""
        allowed = {
            ErrorClass.TIMEOUT: self.attempts,
            ErrorClass.NETWORK: self.attempts,
            ErrorClass.INTERNAL: min(self.internal_attempts, self.attempts),
        }.get(error_class, 1)
        if attempts_made >= allowed:
            return None
        # Jitter, so that the jobs of one outage do not all come back in the same instant.
        spread: float = random.uniform(0.8, 1.2)
        return self.backoff_seconds * 2.0 ** (attempts_made - 1) * spread


def new_job_id() -> str:
    """A random UUID: with anonymous access the id is the capability, so it must not be guessable."""
    return str(uuid.uuid4())
