"""What operators ask of the queue: pause it, look through all jobs, forget some."""

from __future__ import annotations

import logging
from typing import cast

from delineate.errors import JobNotFound, JobUnfinished
from delineate.job import JOB_ID, Job, JobStatus
from delineate.queue.base import Connected
from delineate.queue.connection import unavailable
from delineate.queue.record import CorruptRecord, parse_job

log = logging.getLogger(__name__)

# Records read in one round trip.
BATCH = 200


class Operations(Connected):
    async def pause(self) -> None:
        """Have no waiting job claimed, by any worker, until `resume`; running jobs go on, new ones are accepted."""
        await self._repeat("pausing the queue", lambda: self._commands.set(self._keys.paused, "1"))

    async def resume(self) -> None:
        await self._repeat("resuming the queue", lambda: self._commands.delete(self._keys.paused))

    async def jobs_by_status(self, status: JobStatus) -> list[Job]:
        """Every job of that status: queued ones as they stand in line, others with the latest change first.

        Not one moment's picture: a job may change while others are read. Completed
        and cancelled jobs are in no list, so all keys are looked through for them.
        Damaged records are logged and left out.
        """
        with unavailable("listing jobs"):
            jobs = await self._read(await self._ids(status))
        jobs = [job for job in jobs if job.status is status]
        if status is not JobStatus.QUEUED:
            jobs.sort(key=lambda job: job.updated_at, reverse=True)
        return jobs

    async def _ids(self, status: JobStatus) -> list[str]:
        keys, redis = self._keys, self._commands
        if status is JobStatus.FAILED:
            return cast(list[str], await redis.lrange(keys.failed, 0, -1))
        if status.is_final:
            start = keys.job("")
            found = [key.removeprefix(start) async for key in redis.scan_iter(f"{start}*", 1000)]
            return [job_id for job_id in found if JOB_ID.fullmatch(job_id)]  # not `{id}:parts`
        async with redis.pipeline(transaction=True) as pipe:
            pipe.zrange(keys.workers, 0, -1)
            pipe.lrange(keys.wait, 0, -1)
            pipe.zrange(keys.backlog, 0, -1)
            pipe.zrange(keys.delayed, 0, -1)
            workers, wait, backlog, delayed = await pipe.execute()
        async with redis.pipeline(transaction=True) as pipe:
            for worker in workers:
                pipe.lrange(keys.active(worker), 0, -1)
            active = [job_id for held in await pipe.execute() for job_id in held]
        # What was moved but not claimed yet is queued still, and first in line.
        return active if status is JobStatus.PROCESSING else [*active, *reversed(wait), *backlog, *delayed]

    async def _read(self, job_ids: list[str]) -> list[Job]:
        jobs = []
        for start in range(0, len(job_ids), BATCH):
            some = job_ids[start : start + BATCH]
            async with self._commands.pipeline(transaction=False) as pipe:
                for job_id in some:
                    pipe.hgetall(self._keys.job(job_id))
                records = await pipe.execute()
            for job_id, fields in zip(some, records, strict=True):
                try:
                    job = parse_job(fields, job_id)
                except CorruptRecord as error:
                    log.error("%s", error, extra={"context": {"jobId": job_id}})
                    continue
                if job is not None:
                    jobs.append(job)
        return jobs

    async def purge(self, job_id: str) -> None:
        """Forget a job that has ended. Raises JobNotFound, JobUnfinished."""
        outcome = await self._repeat("purging a job", lambda: self._scripts.purge(job_id))
        if outcome == "missing":
            raise JobNotFound(f"there is no job {job_id}")
        if outcome != "purged":
            raise JobUnfinished(f"job {job_id} is {outcome}; only ended jobs can be purged, cancel it first")
