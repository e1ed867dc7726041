"""One lease in this process: run the job, then settle it - finish, retry, bury or hand back.

The outcome is recorded however long Redis is away. Only a lease that is lost
(the job was cancelled, or the worker was declared dead) ends without a word:
somebody else has the say then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from delineate.config import Config
from delineate.errors import InternalError, JobError, LeaseLost, QueueUnavailable
from delineate.job import ErrorClass, Failure, JobStatus, Lease, RetryPolicy
from delineate.queue import Queue
from delineate.storage import Storage
from delineate.telemetry import spans
from delineate.telemetry.logs import job_fields, working_for
from delineate.telemetry.metrics import (
    ATTEMPT_FAILURES,
    DOWNLOADS_ACTIVE,
    EXPORT_JOB_DURATION,
    EXPORT_JOBS,
    count_download,
)
from delineate.worker.report import Reporter
from delineate.worker.run_job import run_job
from delineate.worker.tasks import beside, until_recorded
from delineate.worker.upload import ArchiveUpload

log = logging.getLogger(__name__)


class Attempt:
    """Runs in a task of its own from `start` until `on_end` is called."""

    def __init__(self, lease: Lease, queue: Queue, storage: Storage, config: Config) -> None:
        self.lease = lease
        self.task: asyncio.Task[None]
        self._queue = queue
        self._storage = storage
        self._config = config
        self._upload = ArchiveUpload(lease, queue, storage)
        self._lost = False
        self._ending = False

    def start(self, on_end: Callable[[Attempt], None]) -> None:
        self.task = asyncio.create_task(self._run(), name=f"job {self.lease.job.id}")
        self.task.add_done_callback(lambda task: self._ended(task, on_end))

    def _ended(self, task: asyncio.Task[None], on_end: Callable[[Attempt], None]) -> None:
        on_end(self)
        if not task.cancelled() and (error := task.exception()):
            # The job is still in this worker's list, where the next audit finds it.
            log.error("a bug kept an attempt from being settled", exc_info=error, extra=_about(self.lease))

    def lose(self) -> None:
        """The lease is gone: stop, and change nothing more."""
        if self._ending:
            return  # the transition on its way finds out by itself, and may be the very reason
        self._lost = True
        self.task.cancel()

    async def _run(self) -> None:
        job = self.lease.job
        working_for(job.request_id, **job_fields(job), attempt=job.attempts)
        with spans.attempt(self.lease) as span:
            status = await self._attempt()
            span.set_attribute(spans.OUTCOME, status)

    async def _attempt(self) -> str:
        """How it ended: one of metrics.DOWNLOAD_STATUSES."""
        log.info("job claimed")
        started = time.monotonic()
        status = "failed"  # also of a bug
        lost = False
        try:
            with DOWNLOADS_ACTIVE.track_inprogress():
                status = await self._pack_and_finish(started)
        except asyncio.CancelledError:
            lost = self._lost
            status = "dropped" if lost else "handed_back"
        except LeaseLost:
            lost, status = True, "dropped"
        finally:
            count_download(status, time.monotonic() - started)
        if lost:
            await self._drop()
        elif status == "handed_back":
            await hand_back(self._queue, self.lease)
        return status

    async def _drop(self) -> None:
        # Every heartbeat reports the lease as lost until this attempt has ended; that must not cut the abort short.
        self._ending = True
        log.info("job dropped: it was cancelled or taken over")
        await self._upload.abort_if_unwanted()

    async def _pack_and_finish(self, started: float) -> str:
        """Whether the attempt completed or failed, once that is recorded."""
        lease, queue = self.lease, self._queue
        reporter = Reporter(queue, lease, self._config.worker.progress_interval, self.lose)
        try:
            async with beside(reporter.run()):
                result = await run_job(lease.job, self._storage, self._config, self._upload, reporter.report)
        except JobError as error:
            spans.fail_attempt(error, error.code)
            await self._fail(error, started)
        except LeaseLost:
            raise
        except (Exception, asyncio.CancelledError) as error:
            # One that nobody asked for is a bug too: taken for a drain's, it would hand the job back, for ever.
            if isinstance(error, asyncio.CancelledError) and self.task.cancelling():
                raise
            log.exception("a bug ended an attempt")
            spans.fail_attempt(error, "internal_error")
            await self._fail(InternalError(f"Something went wrong on our side ({type(error).__name__})."), started)
        else:
            with spans.step("finish"):
                await self._settle(lambda: queue.finish(lease, result))
            self._count(JobStatus.COMPLETED, started)
            seconds = round(time.monotonic() - started, 3)
            log.info("job completed", extra={"context": {"size": result.size, "seconds": seconds}})
            return "completed"
        return "failed"

    async def _fail(self, error: JobError, started: float) -> None:
        config, lease, queue = self._config.queue, self.lease, self._queue
        policy = RetryPolicy(
            attempts=config.attempts, backoff_seconds=config.backoff, internal_attempts=config.internal_attempts
        )
        error_class = ErrorClass(error.error_class)
        delay = policy.delay_before_next(error_class, lease.job.attempts)
        # Advice belongs to the end: while we try again ourselves the user need not.
        message = str(error) if delay is not None else f"{error} {error.advice}".rstrip()
        failure = Failure(code=error.code, error_class=error_class, message=message)
        context: dict[str, object] = {"code": error.code, "cause": f"{error} {error.__cause__ or ''}".strip()}
        if delay is None:
            log.warning("job failed", extra={"context": context})
            await self._settle(lambda: queue.bury(lease, failure))
            self._count(JobStatus.FAILED, started)
            ATTEMPT_FAILURES.labels(error_class.value, "final").inc()
        else:
            context["retryInSeconds"] = round(delay, 1)
            log.warning("attempt failed", extra={"context": context})
            await self._settle(lambda: queue.retry(lease, failure, delay))
            ATTEMPT_FAILURES.labels(error_class.value, "retried").inc()

    async def _settle(self, call: Callable[[], Awaitable[None]]) -> None:
        """Have an outcome recorded, however long Redis is away. Raises LeaseLost."""
        self._ending = True
        await until_recorded(call, lambda error: log.warning("the outcome is not recorded yet: %s", error))

    def _count(self, status: JobStatus, started: float) -> None:
        EXPORT_JOBS.labels(status).inc()
        EXPORT_JOB_DURATION.labels(status).observe(time.monotonic() - started)


async def hand_back(queue: Queue, lease: Lease) -> None:
    """Release a lease that this worker cannot serve to its end; without Redis, the others will find the job."""
    try:
        await queue.release(lease)
        log.info("job handed back", extra=_about(lease))
    except (LeaseLost, QueueUnavailable) as error:
        log.warning("job not handed back: %s", error, extra=_about(lease))


def _about(lease: Lease) -> dict[str, object]:
    """For a record that is logged outside the attempt's own task."""
    return {"context": job_fields(lease.job), "request_id": lease.job.request_id}
