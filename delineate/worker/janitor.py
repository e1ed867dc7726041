"""The janitor: due retries, dead workers, old dead letters. It runs in every worker; there is no leader."""

from __future__ import annotations

import asyncio
import logging
import random
import time

from delineate.config import QueueConfig
from delineate.errors import QueueUnavailable
from delineate.queue import Queue

log = logging.getLogger(__name__)


class Janitor:
    def __init__(self, queue: Queue, config: QueueConfig) -> None:
        self._queue = queue
        self._config = config
        self._reachable_since: float | None = None

    async def run(self) -> None:
        """Tidy up every `janitor_interval`, plus jitter so that many workers take turns; until cancelled."""
        while True:
            await asyncio.sleep(self._config.janitor_interval * random.uniform(0.5, 1.5))
            try:
                await self.tidy_up()
            except QueueUnavailable as error:
                self._reachable_since = None
                log.debug("%s", error)

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
            outcome = "buried" if reaped.buried else "queued again"
            log.warning(
                "a worker was lost, its job is %s",
                outcome,
                extra={"context": {"jobId": reaped.job_id, "worker": reaped.worker}},
            )
