"""The janitor: due retries, dead workers, old dead letters, uploads that nobody will finish.

It runs in every worker; there is no leader, because every step can be done twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

from delineate.config import QueueConfig
from delineate.errors import JobError, QueueUnavailable
from delineate.job import JobStatus
from delineate.queue import Queue
from delineate.storage import Storage
from delineate.telemetry.metrics import EXPORT_JOBS

log = logging.getLogger(__name__)

MAX_ABORTS = 50


class Janitor:
    def __init__(self, queue: Queue, storage: Storage, config: QueueConfig) -> None:
        self._queue = queue
        self._storage = storage
        self._config = config
        self._reachable_since: float | None = None

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
        while True:
            await asyncio.sleep(self._config.janitor_interval * random.uniform(0.5, 1.5))
            try:
                for upload in await self._queue.abandoned_uploads(MAX_ABORTS):
                    await self._storage.abort_upload(upload.key, upload.upload_id)
                    await self._queue.forget_upload(upload)
            except (QueueUnavailable, JobError) as error:
                log.debug("%s", error)  # it stays in the list; whoever uses Redis or the store says what is wrong

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
            if reaped.buried:
                EXPORT_JOBS.labels(JobStatus.FAILED).inc()
            outcome = "buried" if reaped.buried else "queued again"
            log.warning(
                "a worker was lost, its job is %s",
                outcome,
                extra={"context": {"jobId": reaped.job_id, "worker": reaped.worker}},
            )
