"""What every part of the queue shares: clients, keys, scripts, and how often a call is made again.

Every transition is one Lua script, atomic and safe to repeat, so a call whose
reply is lost is simply made again for as long as `redis.operation_timeout`
allows. After that it raises QueueUnavailable, and the caller knows that it
does not know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from delineate.config import Config
from delineate.errors import QueueUnavailable, StartupError
from delineate.job import Job
from delineate.queue.connection import unavailable
from delineate.queue.keys import Keys
from delineate.queue.record import parse_job
from delineate.queue.scripts import Hash, Scripts

T = TypeVar("T")

_log = logging.getLogger(__name__)

# With these a reply to a write means that it is on disk.
_ALWAYS = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}


class Connected:
    """Base of the parts of `Queue`. `blocking` is a client of its own: a blocking command holds its connection."""

    def __init__(self, config: Config, commands: Redis, blocking: Redis) -> None:
        self._config = config
        self._commands = commands
        self._blocking = blocking
        self._keys = Keys(config.redis.prefix)
        self._scripts = Scripts(commands, self._keys)
        # On the client with hardly any traffic: a heartbeat must not stand in line for a connection.
        self._urgent = Scripts(blocking, self._keys)

    async def get(self, job_id: str) -> Job | None:
        """Raises CorruptRecord if its record is damaged."""
        key = self._keys.job(job_id)
        fields = await self._repeat("reading a job", lambda: cast(Awaitable[Hash], self._commands.hgetall(key)))
        return parse_job(fields, job_id)

    async def check_server(self) -> None:
        """See that Redis keeps what it is given. Raises StartupError if it may evict keys, or breaks the durability."""
        memory = await self._repeat(
            "looking at Redis", lambda: cast(Awaitable[dict[str, object]], self._commands.info("memory"))
        )
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StartupError(
                f"this Redis evicts keys when memory is short (maxmemory-policy {policy}), accepted jobs too; "
                "set maxmemory-policy to noeviction"
            )
        await self._check_durability()

    async def _check_durability(self) -> None:
        settings = await self._repeat("looking at Redis", self._append_settings)
        if self._config.queue.durability == "always":
            if settings is None:
                raise StartupError(
                    "queue.durability is always, which cannot be verified: this Redis does not allow CONFIG GET; "
                    "allow it, or set queue.durability to everysec"
                )
            wrong = [name for name, value in _ALWAYS.items() if settings.get(name) != value]
            if wrong:
                raise StartupError(
                    f"queue.durability is always, but this Redis has {_listed(wrong, settings)}; "
                    f"set {_listed(wrong, _ALWAYS)} there, or queue.durability to everysec"
                )
            return
        persistence = await self._repeat(
            "looking at Redis", lambda: cast(Awaitable[dict[str, object]], self._commands.info("persistence"))
        )
        if persistence.get("aof_enabled") != 1:
            _log.warning(
                "this Redis has appendonly no: a crash of it loses every accepted job since its last snapshot, "
                "or all of them if it makes none; set appendonly to yes"
            )
        elif settings is not None and settings.get("appendfsync") == "no":
            _log.warning(
                "this Redis has appendfsync no: a crash of its machine may lose the jobs accepted in the last "
                "30 seconds; set appendfsync to everysec"
            )

    async def _append_settings(self) -> dict[str, str] | None:
        """None if this server does not tell, as many managed ones do not."""
        try:
            return cast(dict[str, str], await self._commands.config_get("*append*"))
        except ResponseError:
            return None

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


def _listed(names: list[str], values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {values.get(name, '(unknown)')}" for name in names)
