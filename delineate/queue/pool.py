"""Connections that notice what redis-py's own do not: that they lead to the wrong server, or nowhere.

They also time every command, here because everything passes here: scripts, pipelines, the commands of connecting.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, Connection
from redis.exceptions import ConnectionError, MasterDownError, ReadOnlyError, ResponseError

from delineate.telemetry.metrics import REDIS_TIMINGS, Timings

# NOREPLICAS: a master cut off from its replicas, which may have another one by now. Redis 6 wraps these in a script.
_NOT_A_MASTER = re.compile(r"(?:^|: -)(?:READONLY|MASTERDOWN|NOREPLICAS)\b")


# What is not here is a `command`; a subscription has no reply that belongs to it.
_KINDS: dict[bytes, str | None] = {
    b"EVALSHA": "script",
    b"EVAL": "script",
    b"BLMOVE": "wait",
    b"HELLO": "connect",
    b"AUTH": "connect",
    b"SELECT": "connect",
    b"CLIENT": "connect",
    b"ROLE": "connect",
    b"SUBSCRIBE": None,
    b"UNSUBSCRIBE": None,
}

MAX_STARTS = 500
_known_starts: dict[bytes, Timings | None] = {}


class Pool(BlockingConnectionPool):
    """Lets a burst wait for a connection; the default pool would answer it with an error.

    A connection that broke takes the idle ones along, which lead to the same
    server: after a failover, or a firewall that forgot them all, each of those
    would cost one request its time.
    """

    def __init__(self, *, connection_class: type[AbstractConnection] = Connection, **options: Any) -> None:
        mended = type(connection_class.__name__, (_Mended, connection_class), {})
        super().__init__(connection_class=mended, **options)

    async def release(self, connection: AbstractConnection) -> None:
        broken = not connection.is_connected
        await super().release(connection)
        if broken:
            # Not the pool's own disconnect(): it closes them a moment later, when one may be in use again.
            for idle in tuple(self._available_connections):
                await idle.disconnect(nowait=True)


class _Mended:
    """In front of every class of connections."""

    _timings: Timings | None = None
    _sent_at = 0.0

    async def send_packed_command(self, command: bytes | Iterable[bytes], *arguments: Any, **options: Any) -> None:
        self._timings = _timings_of(command)
        self._sent_at = time.perf_counter()
        try:
            await super().send_packed_command(command, *arguments, **options)  # type: ignore[misc]
        except RuntimeError as error:
            # What uvloop says of a connection that the other side closed right after it was opened.
            raise ConnectionError(str(error)) from error

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except ResponseError as error:
            # After a failover behind one name or address, connections to the old master stay open, and it
            # refuses writes for as long as they do. The next one leads to the new master.
            if isinstance(error, (ReadOnlyError, MasterDownError)) or _NOT_A_MASTER.search(str(error)):
                await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise
        finally:
            # Also what was given up, or a Redis that hangs would look fast. Of a pipeline, the first reply.
            if (timings := self._timings) is not None:
                self._timings = None
                timings.observe(self._sent_at)


def _timings_of(command: bytes | Iterable[bytes]) -> Timings | None:
    """By the name in `*3\\r\\n$7\\r\\nEVALSHA...`; a pipeline counts as its first command."""
    packed = command if isinstance(command, bytes) else next(iter(command), b"")
    # Enough for every name in _KINDS, and little of the arguments, so that few of these are met again and again.
    start = packed[:20]
    try:
        return _known_starts[start]
    except KeyError:
        name = (*start.split(b"\r\n", 3), b"", b"")[2]
        kind = _KINDS.get(name, "command")
        if len(_known_starts) < MAX_STARTS:
            _known_starts[start] = None if kind is None else REDIS_TIMINGS[kind]
        return None if kind is None else REDIS_TIMINGS[kind]
