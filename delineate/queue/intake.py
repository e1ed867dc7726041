"""What clients of the service ask of the queue: accept, show, cancel, retry, list, count.

A refused `enqueue` is withdrawn in the background until Redis confirms that
the job will never run: its reply may have been lost, and the client was told no.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import cast

import msgspec
from redis.asyncio import Redis

from delineate.config import Config
from delineate.errors import (
    IdempotencyConflict,
    JobFinished,
    JobNotFound,
    JobNotRetryable,
    QueueFull,
    QueueUnavailable,
    TooManyJobs,
)
from delineate.job import Job, JobStatus, NewJob
from delineate.queue.base import Connected
from delineate.queue.connection import unavailable
from delineate.queue.record import CorruptRecord, parse_job
from delineate.telemetry.metrics import EXPORT_JOBS

log = logging.getLogger(__name__)

TOMBSTONE_SECONDS = 3600
LAST_WITHDRAWAL_SECONDS = 2.0
FULL_RETRY_AFTER_SECONDS = 30.0
# The newest ones; the list of a caller that never rests must not grow for days.
USER_JOBS_KEPT = 10_000


class Enqueued(msgspec.Struct, frozen=True):
    """The accepted job; `replayed` if an idempotency key brought an earlier one back."""

    job: Job
    replayed: bool


class QueueStats(msgspec.Struct, frozen=True):
    """Jobs by state and live workers, all at one moment; how long the oldest waiting job has waited, in seconds."""

    waiting: int
    active: int
    delayed: int
    failed: int
    workers: int
    paused: bool
    oldest_waiting_seconds: float


class RateLimit(msgspec.Struct, frozen=True):
    """What one counted request left: `reset_seconds` until the limit is whole, `retry_after` until one more fits."""

    allowed: bool
    limit: int
    remaining: int
    reset_seconds: float
    retry_after: float


class Intake(Connected):
    def __init__(self, config: Config, commands: Redis, blocking: Redis) -> None:
        super().__init__(config, commands, blocking)
        self._withdrawals: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Give withdrawals that Redis has not confirmed a last moment, then give them up."""
        if self._withdrawals:
            await asyncio.wait(self._withdrawals, timeout=LAST_WITHDRAWAL_SECONDS)
        for task in self._withdrawals:
            task.cancel()
        await asyncio.gather(*self._withdrawals, return_exceptions=True)

    async def enqueue(self, new: NewJob) -> Enqueued:
        """Accept `new`: its record, the caller's list and the wait list, all at once or not at all.

        Safe to repeat with the same `new.id`. Raises QueueFull, TooManyJobs, IdempotencyConflict,
        and QueueUnavailable when it could not be confirmed; then the job never runs,
        unless another call with the same idempotency key is given it first.
        """
        queue, retention = self._config.queue, self._config.retention
        try:
            outcome, record = await self._repeat(
                "accepting a job",
                lambda: self._scripts.enqueue(
                    job_id=new.id,
                    user=new.user,
                    file_ids=new.file_ids,
                    on_missing=new.on_missing,
                    idempotency_key=new.idempotency_key,
                    fingerprint=new.fingerprint,
                    traceparent=new.traceparent,
                    request_id=new.request_id,
                    max_waiting=queue.max_waiting,
                    max_waiting_of_user=queue.max_waiting_of_user,
                    user_jobs_seconds=int(retention.user_jobs),
                    user_jobs_kept=USER_JOBS_KEPT,
                    idempotency_seconds=int(retention.idempotency),
                ),
            )
        except (QueueUnavailable, asyncio.CancelledError):
            self._withdraw_later(new)
            raise
        if outcome == "withdrawn":
            raise QueueUnavailable("accepting a job: it was given up before Redis answered")
        if outcome == "full":
            raise QueueFull(
                f"{queue.max_waiting} jobs are waiting already; repeat the request later",
                retry_after=FULL_RETRY_AFTER_SECONDS,
            )
        if outcome == "user_full":
            raise TooManyJobs(
                f"{queue.max_waiting_of_user} of your exports are waiting already; repeat it when some are done",
                retry_after=FULL_RETRY_AFTER_SECONDS,
            )
        if outcome == "conflict":
            raise IdempotencyConflict("this Idempotency-Key was used before with another body")
        job = parse_job(record, new.id)
        if job is None:
            raise CorruptRecord(new.id, "it is empty")
        return Enqueued(job, replayed=outcome == "replayed")

    async def position(self, job_id: str) -> int | None:
        """Place in line, 1 is next; None when the job is not in line.

        Users take turns, so it is an upper bound for a user's further jobs.
        """
        return await self._repeat("reading the line", lambda: self._scripts.position(job_id))

    async def cancel(self, job_id: str) -> Job:
        """The cancelled job, also if it was cancelled before. Raises JobNotFound, JobFinished."""
        keep = int(self._config.retention.job)
        outcome = await self._repeat("cancelling a job", lambda: self._scripts.cancel(job_id, keep))
        job = await self.get(job_id)
        if outcome == "missing" or job is None:
            raise JobNotFound(f"there is no job {job_id}")
        if outcome == "cancelled":
            EXPORT_JOBS.labels(JobStatus.CANCELLED).inc()
        if outcome == "finished":
            raise JobFinished(f"job {job_id} is {job.status} already; only unfinished jobs can be cancelled")
        return job

    async def requeue(self, job_id: str) -> Job:
        """A failed or cancelled job, waiting again from the start. Raises JobNotFound, JobNotRetryable, QueueFull."""
        nonce, limit = uuid.uuid4().hex, self._config.queue.max_waiting
        outcome = await self._repeat("retrying a job", lambda: self._scripts.requeue(job_id, limit, nonce))
        if outcome == "full":
            raise QueueFull(f"{limit} jobs are waiting already", retry_after=FULL_RETRY_AFTER_SECONDS)
        job = None if outcome == "missing" else await self.get(job_id)
        if job is None:
            raise JobNotFound(f"there is no job {job_id}")
        if outcome != "requeued":
            raise JobNotRetryable(f"job {job_id} is {outcome}; only failed and cancelled jobs can be retried")
        return job

    async def list_jobs(self, user: str, limit: int, cursor: str | None) -> tuple[list[Job], str | None]:
        """The user's jobs, newest first, and the cursor of the next page, None at the end.

        Jobs whose record has ended or is damaged are left out. Raises ValueError for a cursor that is not ours.
        """
        return await self._repeat("listing jobs", lambda: self._list_jobs(user, limit, cursor))

    async def _list_jobs(self, user: str, limit: int, cursor: str | None) -> tuple[list[Job], str | None]:
        before, seen = _parse_cursor(cursor)
        jobs: list[Job] = []
        key = self._keys.user_jobs(user)
        while True:
            page = cast(
                list[tuple[str, float]],
                await self._commands.zrevrangebyscore(key, before, "-inf", seen, limit + 1, withscores=True),
            )
            async with self._commands.pipeline(transaction=False) as pipe:
                for job_id, _ in page:
                    pipe.hgetall(self._keys.job(job_id))
                records = await pipe.execute()
            for (job_id, score), fields in zip(page, records, strict=True):
                if len(jobs) == limit:
                    return jobs, f"{before}-{seen}"
                # The cursor is a time and how many jobs of that very microsecond were seen.
                before, seen = (before, seen + 1) if str(int(score)) == before else (str(int(score)), 1)
                try:
                    job = parse_job(fields, job_id)
                except CorruptRecord as error:
                    log.error("%s", error, extra={"context": {"jobId": job_id}})
                    continue
                if job is not None:
                    jobs.append(job)
            if len(page) <= limit:
                return jobs, None

    async def stats(self) -> QueueStats:
        waiting, active, delayed, failed, workers, paused, oldest_ms = await self._repeat(
            "counting jobs", self._scripts.stats
        )
        return QueueStats(waiting, active, delayed, failed, workers, bool(paused), oldest_ms / 1000)

    async def ping(self) -> None:
        await self._repeat("ping", self._commands.ping)

    async def count_request(self, caller: str) -> RateLimit:
        """Count one request of `caller` against `rate_limit`; one try only, since it must not cost a caller time."""
        limits = self._config.rate_limit
        with unavailable("counting a request"):
            async with asyncio.timeout(self._config.redis.operation_timeout):
                allowed, remaining, reset_ms, wait_ms = await self._scripts.limit(
                    caller, limits.requests, int(limits.window * 1000)
                )
        return RateLimit(bool(allowed), limits.requests, remaining, reset_ms / 1000, wait_ms / 1000)

    def _withdraw_later(self, new: NewJob) -> None:
        task = asyncio.create_task(self._withdraw(new), name=f"withdraw {new.id}")
        self._withdrawals.add(task)
        task.add_done_callback(self._withdrawals.discard)

    async def _withdraw(self, new: NewJob) -> None:
        wait = 0.1
        while True:
            try:
                await self._repeat(
                    "withdrawing a job",
                    lambda: self._scripts.withdraw(new.id, new.user, new.idempotency_key, TOMBSTONE_SECONDS),
                )
            except QueueUnavailable:
                await asyncio.sleep(wait)
                wait = min(wait * 2, 5.0)
            else:
                log.info("a refused job was withdrawn", extra={"context": {"jobId": new.id}})
                return


def _parse_cursor(cursor: str | None) -> tuple[str, int]:
    if cursor is None:
        return "+inf", 0
    before, _, seen = cursor.partition("-")
    if not (before.isascii() and before.isdigit() and seen.isascii() and seen.isdigit() and len(cursor) < 40):
        raise ValueError("the cursor is not one that this service gave out")
    return before, int(seen)
