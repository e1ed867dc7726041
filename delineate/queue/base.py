"""What every part of the queue shares: clients, keys, scripts, and how often a call is made again.

Every transition is one Lua script, atomic and safe to repeat, so a call whose
reply is lost is simply made again for as long as `redis.operation_timeout`
allows. After that it raises QueueUnavailable, and the caller knows that it
does not know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from redis.asyncio import Redis

from delineate.config import Config
from delineate.errors import QueueUnavailable, StartupError
from delineate.job import Job
from delineate.queue.connection import unavailable
from delineate.queue.keys import Keys
from delineate.queue.record import parse_job
from delineate.queue.scripts import Hash, Scripts

T = TypeVar("T")


class Connected:
    """Base of the parts of `Queue`. `blocking` is a client of its own: a blocking command holds its connection."""

    def __init__(self, config: Config, commands: Redis, blocking: Redis) -> None:
        self._config = config
        self._commands = commands
        self._blocking = blocking
        self._keys = Keys(config.redis.prefix)
        self._scripts = Scripts(commands, self._keys)

    async def get(self, job_id: str) -> Job | None:
        """Raises CorruptRecord if its record is damaged."""
        key = self._keys.job(job_id)
        fields = await self._repeat("reading a job", lambda: cast(Awaitable[Hash], self._commands.hgetall(key)))
        return parse_job(fields, job_id)

    async def check_server(self) -> None:
        """See that Redis keeps what it is given. Raises StartupError if it may evict keys."""
        memory = await self._repeat(
            "looking at Redis", lambda: cast(Awaitable[dict[str, object]], self._commands.info("memory"))
        )
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StartupError(
                f"this Redis evicts keys when memory is short (maxmemory-policy {policy}), accepted jobs too; "
                "set maxmemory-policy to noeviction"
            )

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
