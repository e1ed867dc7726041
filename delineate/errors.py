"""Every error delineate raises on purpose, and who has to act on it.

DelineateError
 |- RequestError               the client acts: its request cannot be served as it is
 |   |- InvalidRequest         400  something in the body, path, query or headers is wrong
 |   |- Unauthorized           401
 |   |- Forbidden              403
 |   |- JobNotFound            404  no such job, or it is not the caller's
 |   |- RouteNotFound          404  no such path
 |   |- MethodNotAllowed       405
 |   |- JobNotReady            409  no archive to download yet, or never
 |   |- JobFinished            409  too late to cancel
 |   |- JobNotRetryable        409  only failed and cancelled jobs go back
 |   |- JobUnfinished          409  only ended jobs can be purged
 |   |- ArchiveExpired         410
 |   |- BodyTooLarge           413
 |   |- WrongContentType       415
 |   |- IdempotencyConflict    422  same key, other body
 |   |- RateLimited            429  with retry_after
 |   |- TooManyJobs            429  with retry_after: this caller has enough jobs in line
 |   '- QueueFull              503  with retry_after
 |- JobError                   an attempt at a job failed; `error_class` says whether it is tried again
 |   |- FilesMissing           not_found: never again
 |   |- AccessRefused          permission: never again
 |   |- ArchiveTooLarge        validation: never again
 |   |- SourceChanged          network: a file changed between plan and read
 |   |- StorageTimeout         timeout: again, with backoff
 |   |- StorageUnavailable     network: again, with backoff
 |   |- JobTimeout             timeout: again, with backoff
 |   '- InternalError          internal: once more, and logged as an alert
 |- QueueUnavailable           the caller waits and repeats; a client sees 503 with Retry-After
 |- QueuePaused                the worker waits: an operator wants no job to be claimed
 |- LeaseLost                  nobody acts: another worker, or a cancel, owns the job now
 '- OperatorError              the operator acts; printed as one line, exit code 2
     |- ConfigError            what, where and what is allowed
     |- BucketMissing
     '- StartupError           a port in use, a missing tool, a server that did not come up
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class Detail(NamedTuple):
    """One thing that is wrong with a request: `path` is a JSON path such as `$.file_ids[3]`."""

    path: str
    message: str


class DelineateError(Exception):
    """Root of the tree; never raised itself."""


class RequestError(DelineateError):
    """The client must change or repeat its request.

    `status` is the HTTP status, `code` a stable snake_case identifier that
    clients may compare, `retry_after` seconds for the header of that name.
    """

    status: ClassVar[int] = 400
    default_code: ClassVar[str] = "bad_request"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        details: Sequence[Detail] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.details = tuple(details)
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    status, default_code = 400, "invalid_request"


class JobNotFound(RequestError):
    status, default_code = 404, "job_not_found"


class RouteNotFound(RequestError):
    status, default_code = 404, "not_found"


class JobNotReady(RequestError):
    status, default_code = 409, "job_not_ready"


class JobFinished(RequestError):
    status, default_code = 409, "job_finished"


class JobNotRetryable(RequestError):
    status, default_code = 409, "job_not_retryable"


class JobUnfinished(RequestError):
    status, default_code = 409, "job_unfinished"


class ArchiveExpired(RequestError):
    status, default_code = 410, "archive_expired"


class BodyTooLarge(RequestError):
    status, default_code = 413, "body_too_large"


class WrongContentType(RequestError):
    status, default_code = 415, "unsupported_media_type"


class IdempotencyConflict(RequestError):
    status, default_code = 422, "idempotency_conflict"


class RateLimited(RequestError):
    status, default_code = 429, "rate_limited"


class TooManyJobs(RequestError):
    status, default_code = 429, "too_many_jobs"


class QueueFull(RequestError):
    status, default_code = 503, "queue_full"


class JobError(DelineateError):
    """An attempt failed. The message is shown to the user, so it says what they can do.

    `error_class` is one of `delineate.job.ErrorClass`' values and decides about retries.
    """

    error_class: ClassVar[str] = "internal"
    code: ClassVar[str] = "internal_error"


class FilesMissing(JobError):
    """`file_ids`: every id that has no object, in the order asked for."""

    error_class, code = "not_found", "files_missing"

    def __init__(self, file_ids: Sequence[int]) -> None:
        shown = ", ".join(str(file_id) for file_id in file_ids[:10])
        more = f" and {len(file_ids) - 10} more" if len(file_ids) > 10 else ""
        missing = "One file does" if len(file_ids) == 1 else f"{len(file_ids)} files do"
        super().__init__(
            f'{missing} not exist: {shown}{more}. Leave out what is missing, or ask with "on_missing": "skip".'
        )
        self.file_ids = tuple(file_ids)


class AccessRefused(JobError):
    error_class, code = "permission", "access_refused"


class ArchiveTooLarge(JobError):
    error_class, code = "validation", "archive_too_large"


class SourceChanged(JobError):
    error_class, code = "network", "source_changed"


class StorageTimeout(JobError):
    error_class, code = "timeout", "storage_timeout"


class StorageUnavailable(JobError):
    error_class, code = "network", "storage_unavailable"


class JobTimeout(JobError):
    error_class, code = "timeout", "job_timeout"


class InternalError(JobError):
    error_class, code = "internal", "internal_error"


class QueueUnavailable(DelineateError):
    """Redis could not be reached, or did not answer in time, or cannot take writes now."""


class QueuePaused(DelineateError):
    """Waiting jobs are not given out until an operator resumes the queue."""


class LeaseLost(DelineateError):
    """This worker's token for the job is no longer the current one; it must change nothing more."""


class OperatorError(DelineateError):
    """The process cannot go on until an operator changes something; the message is the one line to print."""


class ConfigError(OperatorError):
    pass


class BucketMissing(OperatorError):
    pass


class StartupError(OperatorError):
    pass
