"""The job queue: what the API and the workers ask of Redis, in the words of the job model.

Every transition is one Lua script, atomic and safe to repeat, so a call whose
reply is lost is simply made again for as long as `redis.operation_timeout`
allows. After that it raises QueueUnavailable, and the caller knows that it
does not know, with one exception: a refused `enqueue` is withdrawn in the
background until Redis confirms that the job will never run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar, cast

import msgspec
from redis.asyncio import Redis

from delineate.config import Config
from delineate.errors import (
    IdempotencyConflict,
    JobFinished,
    JobNotFound,
    JobNotRetryable,
    LeaseLost,
    QueueFull,
    QueueUnavailable,
)
from delineate.job import ArchiveResult, ErrorClass, Failure, Job, Lease, NewJob, Progress
from delineate.queue.connection import connect, unavailable
from delineate.queue.keys import Keys
from delineate.queue.record import POISON, CorruptRecord, encode_failure, encode_result, parse_job
from delineate.queue.scripts import Fenced, Hash, Hold, Scripts, Settled

T = TypeVar("T")
log = logging.getLogger(__name__)

FORGET_DEAD_WORKERS_SECONDS = 600
TOMBSTONE_SECONDS = 3600
FULL_RETRY_AFTER_SECONDS = 30.0


class Enqueued(msgspec.Struct, frozen=True):
    """The accepted job; `replayed` if an idempotency key brought an earlier one back."""

    job: Job
    replayed: bool


class QueueStats(msgspec.Struct, frozen=True):
    """Jobs by state and live workers, all at one moment."""

    waiting: int
    active: int
    delayed: int
    failed: int
    workers: int


class RateLimit(msgspec.Struct, frozen=True):
    """What one counted request left: `reset_seconds` until the limit is whole, `retry_after` until one more fits."""

    allowed: bool
    limit: int
    remaining: int
    reset_seconds: float
    retry_after: float


class Reaped(msgspec.Struct, frozen=True):
    """A job taken from a dead worker; `buried` if it had lost too many."""

    worker: str
    job_id: str
    buried: bool


@asynccontextmanager
async def open_queue(config: Config) -> AsyncIterator[Queue]:
    """The queue of `config.redis`; connections are opened when first needed, so this never fails."""
    commands = connect(config.redis)
    # A blocking command keeps its connection busy and answers late, on purpose.
    blocking = connect(config.redis, reply_timeout=config.queue.claim_wait + 3)
    queue = Queue(config, commands, blocking)
    try:
        yield queue
    finally:
        await queue.aclose()
        await commands.aclose()
        await blocking.aclose()


class Queue:
    """Made by `open_queue`. Methods raise QueueUnavailable when Redis cannot serve."""

    def __init__(self, config: Config, commands: Redis, blocking: Redis) -> None:
        self._config = config
        self._commands = commands
        self._blocking = blocking
        self._keys = Keys(config.redis.prefix)
        self._scripts = Scripts(commands, self._keys)
        self._withdrawals: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Give up withdrawals that Redis has not confirmed."""
        for task in self._withdrawals:
            task.cancel()
        await asyncio.gather(*self._withdrawals, return_exceptions=True)

    # For clients of the service

    async def enqueue(self, new: NewJob) -> Enqueued:
        """Accept `new`: its record, the caller's list and the wait list, all at once or not at all.

        Safe to repeat with the same `new.id`. Raises QueueFull, IdempotencyConflict,
        and QueueUnavailable when it could not be confirmed; then the job never runs.
        """
        retention = self._config.retention
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
                    max_waiting=self._config.queue.max_waiting,
                    user_jobs_seconds=int(retention.user_jobs),
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
                f"{self._config.queue.max_waiting} jobs are waiting already; repeat the request later",
                retry_after=FULL_RETRY_AFTER_SECONDS,
            )
        if outcome == "conflict":
            raise IdempotencyConflict("this Idempotency-Key was used before with another body")
        job = parse_job(record, new.id)
        if job is None:
            raise CorruptRecord(new.id, "it is empty")
        return Enqueued(job, replayed=outcome == "replayed")

    async def get(self, job_id: str) -> Job | None:
        """Raises CorruptRecord if its record is damaged."""
        key = self._keys.job(job_id)
        fields = await self._repeat("reading a job", lambda: cast(Awaitable[Hash], self._commands.hgetall(key)))
        return parse_job(fields, job_id)

    async def position(self, job_id: str) -> int | None:
        """Place in line, 1 is next; None when the job is not waiting."""
        return await self._repeat("reading the line", lambda: self._position(job_id))

    async def _position(self, job_id: str) -> int | None:
        # One transaction, so that length and index belong together.
        async with self._commands.pipeline(transaction=True) as pipe:
            pipe.llen(self._keys.wait)
            pipe.lpos(self._keys.wait, job_id, rank=-1)
            length, index = await pipe.execute()
        return None if index is None else length - index

    async def cancel(self, job_id: str) -> Job:
        """The cancelled job, also if it was cancelled before. Raises JobNotFound, JobFinished."""
        keep = int(self._config.retention.job)
        outcome = await self._repeat("cancelling a job", lambda: self._scripts.cancel(job_id, keep))
        job = await self.get(job_id)
        if outcome == "missing" or job is None:
            raise JobNotFound(f"there is no job {job_id}")
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
                # The cursor is a time and how many jobs of that very millisecond were seen.
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
        return QueueStats(*await self._repeat("counting jobs", self._scripts.stats))

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

    # For workers

    async def register(self, worker: str) -> None:
        """Make `worker` known; needed before its first claim."""
        await self._repeat("registering a worker", lambda: self._beat(worker, register=True, leases=[]))

    async def heartbeat(self, worker: str, leases: Iterable[Lease]) -> set[tuple[str, int]]:
        """Stay alive for `queue.dead_after` seconds; job id and token of every lease that is lost.

        One try: the next heartbeat is the retry. Raises LeaseLost if the worker was declared dead: all are lost.
        """
        with unavailable("heartbeat"):
            async with asyncio.timeout(self._config.redis.operation_timeout):
                return await self._beat(worker, register=False, leases=list(leases))

    async def _beat(self, worker: str, *, register: bool, leases: list[Lease]) -> set[tuple[str, int]]:
        life_ms = int(self._config.queue.dead_after * 1000)
        try:
            return await self._scripts.heartbeat(
                worker, life_ms, register=register, holds=[_hold(lease) for lease in leases]
            )
        except Fenced:
            raise LeaseLost(f"worker {worker} was declared dead") from None

    async def retire(self, worker: str) -> list[str]:
        """Leave the fleet; the ids of jobs that were still in the worker's list and went back uncharged."""
        return await self._repeat("retiring a worker", lambda: self._scripts.retire(worker))

    async def claim(self, worker: str, count: int, *, job_ids: Iterable[str] = ()) -> list[Lease]:
        """Take `job_ids` that lie in the worker's own list, then the oldest waiting jobs up to `count` in all.

        A reply that is lost leaves jobs in the worker's list (`held_ids` shows
        them, `job_ids` claims them), so nothing is lost and this is not repeated here.
        Raises LeaseLost if the worker was declared dead.
        """
        with unavailable("claiming jobs"):
            async with asyncio.timeout(self._config.redis.operation_timeout):
                try:
                    records = await self._scripts.claim(worker, count, list(job_ids))
                except Fenced:
                    raise LeaseLost(f"worker {worker} was declared dead") from None
        leases = []
        for fields in records:
            try:
                job = parse_job(fields, fields.get("id", "?"))
            except CorruptRecord as error:
                await self._bury_corrupt(worker, fields, error)
                continue
            if job is not None:
                leases.append(Lease(job=job, worker=worker, token=job.token))
        return leases

    async def _bury_corrupt(self, worker: str, fields: Hash, error: CorruptRecord) -> None:
        """A record nobody can read must not stop the worker, nor be claimed for ever."""
        log.error("%s; it is buried", error, extra={"context": {"jobId": error.job_id}})
        failure = Failure(
            code="corrupt_record", error_class=ErrorClass.INTERNAL, message="The job's record is damaged."
        )
        hold = Hold(error.job_id, worker, int(fields["token"]))
        keep = int(self._config.retention.failed)
        await self._repeat(
            "burying a job", lambda: self._scripts.bury(hold, encode_failure(failure), failure.message, keep)
        )

    async def wait_for_work(self, worker: str) -> str | None:
        """Wait up to `queue.claim_wait` seconds for a job; its id, moved to the worker's list but not claimed.

        The list it lands in names its owner, so a crash right after loses nothing.
        Never repeated here: a BLMOVE whose reply was lost has moved a job.
        Source: https://redis.io/docs/latest/commands/blmove/ (pattern: reliable queue)
        """
        with unavailable("waiting for work"):
            return cast(
                str | None,
                await self._blocking.blmove(
                    self._keys.wait,
                    self._keys.active(worker),
                    self._config.queue.claim_wait,  # type: ignore[arg-type]
                    "RIGHT",
                    "LEFT",
                ),
            )

    async def held_ids(self, worker: str) -> list[str]:
        """Every id in the worker's own list, claimed or not."""
        key = self._keys.active(worker)
        return await self._repeat(
            "reading the own list", lambda: cast(Awaitable[list[str]], self._commands.lrange(key, 0, -1))
        )

    async def progress(self, lease: Lease, progress: Progress) -> None:
        """Publish how far the attempt is. One try: the next report is the retry. Raises LeaseLost."""
        with unavailable("reporting progress"):
            async with asyncio.timeout(self._config.redis.operation_timeout):
                taken = await self._scripts.progress(
                    _hold(lease),
                    percent=progress.percent,
                    current_file=progress.current_file,
                    stage=progress.stage,
                    message=progress.message,
                    bytes_done=progress.bytes_done,
                    bytes_total=progress.bytes_total,
                )
        if not taken:
            raise LeaseLost(f"job {lease.job.id} is no longer this worker's")

    async def finish(self, lease: Lease, result: ArchiveResult) -> None:
        """Publish the archive; the job is completed. Raises LeaseLost."""
        keep = int(self._config.retention.job)
        message = "The archive is ready"
        await self._settle(lease, lambda: self._scripts.finish(_hold(lease), encode_result(result), message, keep))

    async def retry(self, lease: Lease, failure: Failure, delay_seconds: float) -> None:
        """Have the job tried again after `delay_seconds`. Raises LeaseLost."""
        delay_ms, message = math.ceil(delay_seconds * 1000), f"Trying again in {delay_seconds:.0f} s: {failure.message}"
        await self._settle(lease, lambda: self._scripts.retry(_hold(lease), delay_ms, encode_failure(failure), message))

    async def release(self, lease: Lease) -> None:
        """Hand the job back, next in line, without charging an attempt. Raises LeaseLost."""
        await self._settle(lease, lambda: self._scripts.release(_hold(lease)))

    async def bury(self, lease: Lease, failure: Failure) -> None:
        """Fail the job for good; it becomes a dead letter. Raises LeaseLost."""
        keep = int(self._config.retention.failed)
        await self._settle(
            lease, lambda: self._scripts.bury(_hold(lease), encode_failure(failure), failure.message, keep)
        )

    async def _settle(self, lease: Lease, call: Callable[[], Awaitable[Settled]]) -> None:
        if await self._repeat("settling a job", call) == 0:
            raise LeaseLost(f"job {lease.job.id} is no longer this worker's")

    # For the janitor

    async def promote(self) -> int:
        """Move due retries to the front of the line; how many there were."""
        return await self._repeat("promoting retries", self._scripts.promote)

    async def reap(self) -> list[Reaped]:
        """Take the jobs of workers without heartbeat away from them."""
        moved = await self._repeat(
            "reaping dead workers",
            lambda: self._scripts.reap(
                max_crashes=self._config.queue.max_crashes,
                failed_seconds=int(self._config.retention.failed),
                forget_seconds=FORGET_DEAD_WORKERS_SECONDS,
                failure=encode_failure(POISON),
                message=POISON.message,
            ),
        )
        return [Reaped(worker, job_id, buried=outcome == "buried") for worker, job_id, outcome in moved]

    async def sweep(self) -> int:
        """Drop dead letters whose record has ended; how many there were."""
        return await self._repeat("sweeping dead letters", self._scripts.sweep)

    # Inside

    async def _repeat(self, doing: str, call: Callable[[], Awaitable[T]]) -> T:
        """`call`, which is safe to repeat, until it answers or `redis.operation_timeout` is over.

        A restart of Redis takes a few hundred milliseconds, so the waits between
        tries are short and bridge it, and a Redis that is away is reported within a second.
        """
        waits = iter((0.05, 0.15, 0.4))
        try:
            async with asyncio.timeout(self._config.redis.operation_timeout):
                while True:
                    try:
                        with unavailable(doing):
                            return await call()
                    except QueueUnavailable:
                        wait = next(waits, None)
                        if wait is None:
                            raise
                        await asyncio.sleep(wait)
        except TimeoutError as error:
            raise QueueUnavailable(f"{doing}: Redis did not answer in time") from error

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


def _hold(lease: Lease) -> Hold:
    return Hold(lease.job.id, lease.worker, lease.token)


def _parse_cursor(cursor: str | None) -> tuple[str, int]:
    if cursor is None:
        return "+inf", 0
    before, _, seen = cursor.partition("-")
    if not (before.isascii() and before.isdigit() and seen.isascii() and seen.isdigit() and len(cursor) < 40):
        raise ValueError("the cursor is not one that this service gave out")
    return before, int(seen)
