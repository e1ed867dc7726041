"""The janitor: due retries, dead workers, old dead letters, uploads that nobody will finish.

It runs in every worker; there is no leader, because every step can be done twice.

Uploads that are given up stand in a list in Redis and are aborted within seconds.
Those that no record names - a worker died between the store's answer and the
record, Redis was restored from yesterday - are known to the store alone, which
is asked for them now and then.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

from delineate.config import Config
from delineate.errors import JobError, QueueUnavailable
from delineate.job import JOB_ID, JobStatus
from delineate.queue import CorruptRecord, Queue
from delineate.storage import Storage, UnfinishedUpload
from delineate.telemetry import spans
from delineate.telemetry.metrics import CRASHES_RECOVERED, EXPORT_JOBS

log = logging.getLogger(__name__)

MAX_ABORTS = 50
LONGEST_PAUSE_SECONDS = 60.0


class Janitor:
    def __init__(self, queue: Queue, storage: Storage, config: Config) -> None:
        self._queue = queue
        self._storage = storage
        self._config = config.queue
        self._store = config.storage
        self._reachable_since: float | None = None
        self._said_that_it_cannot_list = False

    def pause_reaping(self) -> None:
        """No lease can be renewed now; for `queue.dead_after` seconds from here on nobody is taken for dead.

        Not this janitor's own commands show that: a full or demoted Redis
        answers those that only read, and a hanging one may answer late enough to
        let every lease run out, and early enough for no error.
        """
        self._reachable_since = None

    async def run(self) -> None:
        """Tidy up every `janitor_interval`, plus jitter so that many workers take turns; until cancelled."""
        while True:
            await asyncio.sleep(self._config.janitor_interval * random.uniform(0.5, 1.5))
            try:
                await self.tidy_up()
            except QueueUnavailable as error:
                self._reachable_since = None
                log.debug("%s", error)

    async def abort_uploads_forever(self) -> None:
        """Apart from `run`, so that a store that hangs keeps nobody from reaping."""
        pause = self._config.janitor_interval
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            try:
                failed = await self._abort_given_up()
            except QueueUnavailable as error:
                log.debug("%s", error)
                continue
            # Refused credentials or a store that is away: once a second, from every worker, would be a siege.
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS) if failed else self._config.janitor_interval

    async def _abort_given_up(self) -> bool:
        """Abort what is in the list; whether any could not be. Each on its own: one must not keep back the others."""
        failed = False
        for upload in await self._queue.abandoned_uploads(MAX_ABORTS):
            try:
                await self._storage.abort_upload(upload.key, upload.upload_id)
                await self._queue.forget_upload(upload)
            except JobError as error:
                failed = True
                log.info("an upload cannot be aborted yet", extra={"context": {"key": upload.key, "cause": str(error)}})
        return failed

    async def abort_orphans_forever(self) -> None:
        """Every `storage.orphan_interval`, abort the uploads that no record names."""
        while True:
            await asyncio.sleep(self._store.orphan_interval * random.uniform(0.5, 1.5))
            try:
                await self.abort_orphans()
            except (QueueUnavailable, JobError) as error:
                log.warning("orphaned uploads were not looked for: %s", error)

    async def abort_orphans(self) -> None:
        """Abort every unfinished upload older than `storage.orphan_age` that no live job names.

        An upload that is not named now will never be: a job's record names an upload within
        the attempt that began it, which ends long before that age. Raises JobError, QueueUnavailable.
        """
        uploads = await self._storage.list_uploads()
        if uploads is None:
            if not self._said_that_it_cannot_list:
                log.info("the S3 store cannot list unfinished uploads: orphans are left to its own rules")
            self._said_that_it_cannot_list = True
            return
        # By this clock, the start is by the store's: S3 refuses requests when they differ by more than 15 minutes.
        oldest = time.time() - self._store.orphan_age
        for upload in uploads:
            if upload.initiated < oldest and not await self._may_be_wanted(upload):
                await self._storage.abort_upload(upload.key, upload.upload_id)
                context = {"key": upload.key, "ageSeconds": round(time.time() - upload.initiated)}
                log.info("an orphaned upload was aborted", extra={"context": context})

    async def _may_be_wanted(self, upload: UnfinishedUpload) -> bool:
        job_id = upload.key.removeprefix(self._store.archive_prefix).partition("/")[0]
        if not JOB_ID.fullmatch(job_id):
            return True  # not one of ours
        try:
            job = await self._queue.get(job_id)
        except CorruptRecord:
            return True  # until the record has ended
        if job is None or job.status.is_final or job.upload is None:
            return False
        return (job.upload.key, job.upload.upload_id) == (upload.key, upload.upload_id)

    async def tidy_up(self) -> None:
        await self._queue.promote()
        await self._queue.sweep()
        now = time.monotonic()
        if self._reachable_since is None:
            self._reachable_since = now
        # When Redis comes back from an outage every lease has run out. Workers that
        # live get the time to say so before anybody takes their jobs away.
        if now - self._reachable_since < self._config.dead_after:
            return
        for reaped in await self._queue.reap():
            CRASHES_RECOVERED.labels("buried" if reaped.buried else "requeued").inc()
            if reaped.buried:
                EXPORT_JOBS.labels(JobStatus.FAILED).inc()
            spans.lost_attempt(reaped.job_id, reaped.worker, reaped.traceparent, reaped.span, reaped.started_at)
            outcome = "buried" if reaped.buried else "queued again"
            log.warning(
                "a worker was lost, its job is %s",
                outcome,
                extra={"context": {"jobId": reaped.job_id, "worker": reaped.worker}},
            )
