"""Connections to Redis, and the translation of everything that can go wrong with them.

redis-py's own retries are off: it would silently repeat a BLMOVE whose reply
was lost and so orphan a job. Who may repeat what is decided in queue.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from delineate.config import RedisConfig
from delineate.errors import QueueUnavailable
from delineate.queue.pool import Pool
from delineate.queue.sentinels import master_pool

_CANNOT_SERVE = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    # Flushed, or Redis restarted, between loading a script and calling it; the next try loads it again.
    redis.exceptions.NoScriptError,
)
# redis-py has no class of its own for these (UNBLOCKED: a failover ended a blocking command); https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
# Redis 6 wraps what a script meets: "ERR Error running script (...): -OOM command not allowed ...".
_CANNOT_SERVE_CODES = re.compile(r"(?:^|: -)(?:MISCONF|MASTERDOWN|BUSY|LOADING|NOREPLICAS|READONLY|OOM|UNBLOCKED)\b")


def connect(config: RedisConfig, *, reply_timeout: float | None = None) -> Redis:
    """A client that opens connections when they are needed; close it with `aclose()`.

    `reply_timeout` seconds to wait for one reply instead of `operation_timeout`:
    a blocking command needs its own waiting time and some more.
    """
    options: dict[str, Any] = {
        "timeout": config.operation_timeout,
        # None leaves a password that stands in the URL alone.
        "password": config.password or None,
        # RESP2: the scripts' replies are plain arrays, and every proxy and older server speaks it.
        "protocol": 2,
        "socket_timeout": reply_timeout or config.operation_timeout,
        "socket_connect_timeout": config.connect_timeout,
        "socket_keepalive": True,
        "health_check_interval": 0,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": config.max_connections,
        "decode_responses": True,
    }
    if config.sentinels:
        return Redis.from_pool(master_pool(config, options))
    return Redis.from_pool(Pool.from_url(config.url, **options))


@contextmanager
def unavailable(doing: str) -> Iterator[None]:
    """Turn whatever keeps Redis from serving into QueueUnavailable; `doing` starts its message.

    A cancel that comes while a command is sent is never lost: redis-py sends
    through asyncio.wait_for, which on Python 3.11 forgets a cancel when what it waits
    for is done already (https://github.com/python/cpython/issues/86296, mended in 3.12).
    """
    task = asyncio.current_task()
    # Compared, because a cancelled task may use Redis too, to hand its job back.
    cancels = task.cancelling() if task else 0
    try:
        yield
        if task is not None and task.cancelling() > cancels:
            raise asyncio.CancelledError
    except redis.exceptions.ResponseError as error:
        # Anything else the server answers is a mistake of ours and must be seen as one.
        if not isinstance(error, _CANNOT_SERVE) and not _CANNOT_SERVE_CODES.search(str(error)):
            raise
        raise QueueUnavailable(f"{doing}: Redis cannot serve now: {error}") from error
    except (redis.exceptions.RedisError, OSError) as error:
        raise QueueUnavailable(f"{doing}: Redis is not available: {str(error) or type(error).__name__}") from error
