"""Connections to whichever Redis is the master now, found through Redis Sentinel.

What Redis asks of a client is done whenever a connection is opened: ask the
sentinels, connect, see by ROLE that it is a master. A connection is dropped (pool.py)
when its server turns out to be none any more, so that the next call asks again.
Source: https://redis.io/docs/latest/develop/reference/sentinel-clients/

Not redis-py's own SentinelConnectionPool: it answers a burst with an error,
takes a sentinel's word for the role, and closes connections of the old master
that another task may have taken a moment before.
"""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import Connection, SSLConnection, parse_url
from redis.exceptions import ConnectionError, RedisError

from delineate.config import RedisConfig, split_address
from delineate.queue.pool import Pool

# Connections of one client to one sentinel: a burst of new connections waits for its turn.
_CONNECTIONS = 4


class Masters:
    """The sentinels of one client, and the address of the master that it found last."""

    def __init__(self, config: RedisConfig, options: dict[str, Any]) -> None:
        self.address: tuple[str, int] | None = None
        self._group = config.sentinel_master
        # All of them together may take as long as opening a connection: the first ones may be down with the master.
        seconds = config.connect_timeout / len(config.sentinels)
        options = {
            **options,
            "db": 0,
            "username": None,
            "password": config.sentinel_password or None,
            "timeout": seconds,
            "socket_timeout": seconds,
            "socket_connect_timeout": seconds,
            "max_connections": _CONNECTIONS,
        }
        self._sentinels = {
            address: Redis.from_pool(BlockingConnectionPool(host=host, port=port, **options))
            for address in config.sentinels
            for host, port in [split_address(address)]
        }

    async def find(self) -> tuple[str, int]:
        """Raises redis' ConnectionError if no sentinel knows a master that is up."""
        problems = []
        for address, sentinel in tuple(self._sentinels.items()):
            try:
                # Not GET-MASTER-ADDR-BY-NAME, which also names a master that is known to be down.
                masters = cast(dict[str, dict[str, Any]], await sentinel.sentinel_masters())
            except (RedisError, OSError) as error:
                problems.append(f"{address}: {str(error) or type(error).__name__}")
                continue
            state = masters.get(self._group)
            if state is not None and not state["is_sdown"] and not state["is_odown"]:
                # Whoever answered is asked first the next time.
                self._sentinels = {address: sentinel, **self._sentinels}
                return state["ip"], state["port"]
            problems.append(f"{address}: {'does not know it' if state is None else 'it is down'}")
        raise ConnectionError(f"no sentinel names a master for {self._group!r} ({'; '.join(problems)})")

    async def aclose(self) -> None:
        for sentinel in self._sentinels.values():
            await sentinel.aclose()


class _Connection(Connection):
    def __init__(self, *, masters: Masters, **options: Any) -> None:
        super().__init__(**options)
        self._masters = masters

    async def connect(self) -> None:
        """Called by the pool before each use."""
        if self.is_connected:
            if (self.host, self.port) == self._masters.address:
                return
            # Another connection has met a newer master; this one's may not know yet that it is none any more.
            await self.disconnect()
        await super().connect()  # type: ignore[no-untyped-call]
        await self.send_command("ROLE")
        role = await self.read_response()
        if role[0] != "master":
            await self.disconnect(nowait=True)
            raise ConnectionError(f"{self.host}:{self.port} is not a master")
        self._masters.address = (self.host, self.port)

    async def _connect(self) -> None:
        self.host, self.port = await self._masters.find()
        await super()._connect()  # type: ignore[no-untyped-call]


class _TlsConnection(_Connection, SSLConnection):
    pass


class _MasterPool(Pool):
    def __init__(self, masters: Masters, **options: Any) -> None:
        super().__init__(masters=masters, **options)
        self._masters = masters

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        await self._masters.aclose()


def master_pool(config: RedisConfig, options: dict[str, Any]) -> BlockingConnectionPool:
    """The pool that BlockingConnectionPool.from_url(config.url, **options) would be, but of the current master."""
    from_url: dict[str, Any] = dict(parse_url(config.url))
    tls = issubclass(from_url.pop("connection_class", Connection), SSLConnection)
    for name in ("host", "port"):
        from_url.pop(name, None)
    options = {**options, **from_url}
    masters = Masters(config, {**options, "connection_class": SSLConnection if tls else Connection})
    return _MasterPool(masters, **options, connection_class=_TlsConnection if tls else _Connection)
