"""What workers ask of the queue: register, claim, report, settle. Every call after a claim shows its fencing token."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

from delineate.errors import LeaseLost, QueuePaused
from delineate.job import ArchiveResult, ErrorClass, Failure, Job, JobStatus, Lease, Progress, SavedPart, Upload
from delineate.queue.base import Connected
from delineate.queue.connection import unavailable
from delineate.queue.record import CorruptRecord, encode, parse_job, parse_part
from delineate.queue.scripts import Fenced, Hash, Hold, Paused, Settled
from delineate.telemetry import tracing
from delineate.telemetry.metrics import EXPORT_JOB_WAIT, EXPORT_JOBS

log = logging.getLogger(__name__)


class Leases(Connected):
    async def register(self, worker: str) -> None:
        """Make `worker` known; needed before its first claim."""
        await self._repeat("registering a worker", lambda: self._beat(worker, register=True, leases=[]))

    async def heartbeat(self, worker: str, leases: Iterable[Lease]) -> set[tuple[str, int]]:
        """Stay alive for `queue.dead_after` seconds; job id and token of every lease that is lost.

        One try, short enough that another one fits before the lease ends.
        Raises LeaseLost if the worker was declared dead: all are lost.
        """
        queue, operation_timeout = self._config.queue, self._config.redis.operation_timeout
        with unavailable("heartbeat"):
            async with asyncio.timeout(min(operation_timeout, (queue.dead_after - queue.heartbeat) / 2)):
                return await self._beat(worker, register=False, leases=list(leases))

    async def _beat(self, worker: str, *, register: bool, leases: list[Lease]) -> set[tuple[str, int]]:
        life_ms = int(self._config.queue.dead_after * 1000)
        try:
            return await self._urgent.heartbeat(
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
        Raises LeaseLost if the worker was declared dead, QueuePaused if that is why there is nothing.
        """
        keep = int(self._config.retention.failed)
        nonce = f"{random.getrandbits(52):013x}" if tracing.enabled() else ""
        with unavailable("claiming jobs"):
            async with asyncio.timeout(self._config.redis.operation_timeout):
                try:
                    records = await self._scripts.claim(worker, count, list(job_ids), keep, nonce)
                except Fenced:
                    raise LeaseLost(f"worker {worker} was declared dead") from None
                except Paused:
                    raise QueuePaused("the queue is paused") from None
        leases = []
        for job_id, fields in records:
            if not fields:
                log.error("the record of job %s is damaged; it is buried", job_id, extra={"context": {"jobId": job_id}})
                EXPORT_JOBS.labels(JobStatus.FAILED).inc()
                continue
            try:
                job = parse_job(fields, job_id)
            except CorruptRecord as error:
                await self._bury_corrupt(Hold(job_id, worker, int(fields["token"])), error)
                continue
            if job is not None:
                _count_wait(job, fields)
                leases.append(Lease(job=job, worker=worker, token=job.token))
        return leases

    async def _bury_corrupt(self, hold: Hold, error: CorruptRecord) -> None:
        """A record nobody can read must not stop the worker, nor be claimed for ever."""
        log.error("%s; it is buried", error, extra={"context": {"jobId": hold.job_id}})
        failure = Failure(
            code="corrupt_record", error_class=ErrorClass.INTERNAL, message="The job's record is damaged."
        )
        keep = int(self._config.retention.failed)
        await self._repeat("burying a job", lambda: self._scripts.bury(hold, encode(failure), failure.message, keep))
        EXPORT_JOBS.labels(JobStatus.FAILED).inc()

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

    async def begin_upload(self, lease: Lease, upload: Upload) -> None:
        """Remember an upload before its first part, so that it is continued or aborted whatever happens.

        Raises LeaseLost.
        """
        await self._held("recording an upload", lease, lambda: self._scripts.begin_upload(_hold(lease), encode(upload)))

    async def save_part(self, lease: Lease, part: SavedPart) -> None:
        """Remember a part that the store has. Raises LeaseLost."""
        await self._held(
            "recording a part", lease, lambda: self._scripts.save_part(_hold(lease), part.number, encode(part))
        )

    async def saved_parts(self, job_id: str) -> list[SavedPart]:
        """The remembered parts of the job's upload, in no order."""
        key = self._keys.parts(job_id)
        values = await self._repeat("reading parts", lambda: cast(Awaitable[list[str]], self._commands.hvals(key)))
        return [part for value in values if (part := parse_part(value))]

    async def finish(self, lease: Lease, result: ArchiveResult) -> None:
        """Publish the archive; the job is completed. Raises LeaseLost."""
        keep = int(self._config.retention.job)
        message = "The archive is ready"
        await self._held(
            "settling a job", lease, lambda: self._scripts.finish(_hold(lease), encode(result), message, keep)
        )

    async def retry(self, lease: Lease, failure: Failure, delay_seconds: float) -> None:
        """Have the job tried again after `delay_seconds`. Raises LeaseLost."""
        delay_ms, message = math.ceil(delay_seconds * 1000), f"Trying again in {delay_seconds:.0f} s: {failure.message}"
        await self._held(
            "settling a job", lease, lambda: self._scripts.retry(_hold(lease), delay_ms, encode(failure), message)
        )

    async def release(self, lease: Lease) -> None:
        """Hand the job back, next in line, without charging an attempt. Raises LeaseLost."""
        await self._settle(lease, lambda: self._scripts.release(_hold(lease)))

    async def bury(self, lease: Lease, failure: Failure) -> None:
        """Fail the job for good; it becomes a dead letter. Raises LeaseLost."""
        keep = int(self._config.retention.failed)
        await self._held(
            "settling a job", lease, lambda: self._scripts.bury(_hold(lease), encode(failure), failure.message, keep)
        )

    async def _settle(self, lease: Lease, call: Callable[[], Awaitable[Settled]]) -> None:
        await self._held("settling a job", lease, call)

    async def _held(self, doing: str, lease: Lease, call: Callable[[], Awaitable[Settled | bool]]) -> None:
        """Make a call that is refused, with 0, when the lease's token is old. Raises LeaseLost."""
        if not await self._repeat(doing, call):
            raise LeaseLost(f"job {lease.job.id} is no longer this worker's")


def _count_wait(job: Job, fields: Hash) -> None:
    """Only of the first claim since the job joined the line: later ones wait for other reasons."""
    # `place` is when that was, in microseconds, also for a job that a client had started over.
    place = fields.get("place", "")
    if job.started_at is not None and job.started_at == job.attempt_started_at and place.isdecimal():
        EXPORT_JOB_WAIT.observe(max(0.0, job.started_at - int(place) / 1_000_000))


def _hold(lease: Lease) -> Hold:
    return Hold(lease.job.id, lease.worker, lease.token)
