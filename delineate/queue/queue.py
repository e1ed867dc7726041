"""The job queue: what clients, workers, janitors and operators ask of Redis, in the words of the job model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from delineate.config import Config
from delineate.queue.connection import connect
from delineate.queue.intake import Intake
from delineate.queue.leases import Leases
from delineate.queue.operations import Operations
from delineate.queue.upkeep import Upkeep


class Queue(Intake, Leases, Upkeep, Operations):
    """Made by `open_queue`. Methods raise QueueUnavailable when Redis cannot serve."""

    async def check_writes(self) -> None:
        """See that Redis takes writes: demoted, out of memory or out of disk it still answers all that only reads.

        LPUSHX on a list that never exists is refused like any other write, and writes nothing.
        """
        key = self._keys.none
        await self._repeat("writing to Redis", lambda: self._commands.lpushx(key, ""))


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
