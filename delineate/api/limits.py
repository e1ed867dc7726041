"""The rate limit: each counted request costs one of the caller's, and every answer says how many are left."""

from __future__ import annotations

import math

from delineate.api.handler import Request
from delineate.config import RateLimitConfig
from delineate.errors import RateLimited
from delineate.queue import Queue, RateLimit
from delineate.telemetry.metrics import RATE_LIMITED


class Limiter:
    """Counts in Redis, so that a caller has one limit however many API processes there are."""

    def __init__(self, config: RateLimitConfig, queue: Queue) -> None:
        self._config = config
        self._queue = queue
        # For answers that were not counted: /health, /docs, unknown paths, or all of them when the limit is off.
        self.uncounted = _lines(config.requests, config.requests, config.window)

    async def count(self, request: Request) -> None:
        """Raises RateLimited, or QueueUnavailable: without Redis hardly a counted route could answer anyway."""
        if not self._config.enabled:
            return
        rate = request.rate = await self._queue.count_request(request.caller)
        if not rate.allowed:
            RATE_LIMITED.inc()
            raise RateLimited(
                f"more than {rate.limit} requests within {self._config.window:g} s; repeat later",
                retry_after=rate.retry_after,
            )

    def header_lines(self, rate: RateLimit | None) -> bytes:
        if rate is None:
            return self.uncounted
        return _lines(rate.limit, rate.remaining, rate.reset_seconds)


def _lines(limit: int, remaining: int, reset_seconds: float) -> bytes:
    return b"RateLimit-Limit: %d\r\nRateLimit-Remaining: %d\r\nRateLimit-Reset: %d\r\n" % (
        limit,
        remaining,
        math.ceil(reset_seconds),
    )
