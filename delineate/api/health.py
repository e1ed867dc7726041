"""Is the service able to work, is this process alive, and what has it counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from delineate.api.documents import HealthDocument
from delineate.api.handler import Answer, Request, Route, json_answer
from delineate.errors import DelineateError
from delineate.queue import Queue, QueueStats
from delineate.storage import Storage
from delineate.telemetry.exposition import Look, QueueLook, render_metrics

T = TypeVar("T")
_log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0
# However many ask, Redis and S3 are asked this often at most.
CACHE_SECONDS = 1.0


class Checks:
    """One look at everything the service needs, shared by all who ask within a second."""

    def __init__(self, queue: Queue, storage: Storage) -> None:
        self._queue = queue
        self._storage = storage
        self._looked_at = float("-inf")
        self._known: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._lock = asyncio.Lock()
        self.stats: QueueStats | None = None

    async def look(self) -> dict[str, str]:
        """`storage`, `redis` and `workers`, each `ok` or `error`."""
        async with self._lock:
            if time.monotonic() - self._looked_at > CACHE_SECONDS:
                storage, writes, self.stats = await asyncio.gather(
                    self._within("storage", self._check_storage()),
                    self._within("writes", self._check_writes()),
                    self._within("stats", self._queue.stats()),
                )
                workers = self.stats is not None and self.stats.workers > 0
                self._known = {
                    "storage": _word(storage is True),
                    "redis": _word(writes is True and self.stats is not None),
                    "workers": _word(workers),
                }
                self._looked_at = time.monotonic()
            return self._known

    async def _check_storage(self) -> bool:
        await self._storage.check()
        return True

    async def _check_writes(self) -> bool:
        await self._queue.check_writes()
        return True

    async def _within(self, name: str, check: Awaitable[T]) -> T | None:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                result = await check
        except (DelineateError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
            # Once, however long it lasts and however many ask.
            if problem != self._problems.get(name):
                _log.warning("a health check failed: %s", problem)
            self._problems[name] = problem
            return None
        self._problems.pop(name, None)
        return result


def _word(good: bool) -> str:
    return "ok" if good else "error"


async def show_health(request: Request) -> Answer:
    checks = await request.services.checks.look()
    healthy = all(state == "ok" for state in checks.values())
    document = HealthDocument("healthy" if healthy else "unhealthy", checks)
    return json_answer(document, status=200 if healthy else 503)


async def show_life(_: Request) -> Answer:
    return json_answer({"status": "alive"})


async def show_metrics(request: Request) -> Answer:
    states = await request.services.checks.look()
    stats = request.services.checks.stats
    look = Look({name: state == "ok" for name, state in states.items()}, _queue_look(stats) if stats else None)
    # In a thread: with many processes this reads and merges many files.
    text = await asyncio.to_thread(render_metrics, request.services.config.telemetry, look)
    return Answer(text, content_type="text/plain; version=0.0.4; charset=utf-8")


def _queue_look(stats: QueueStats) -> QueueLook:
    return QueueLook(
        sizes={name: getattr(stats, name) for name in ("waiting", "active", "delayed", "failed")},
        oldest_waiting_seconds=stats.oldest_waiting_seconds,
        workers=stats.workers,
        paused=stats.paused,
    )


ROUTES = [
    Route("GET", "/health", show_health, counted=False),
    Route("GET", "/health/live", show_life, counted=False),
    Route("GET", "/metrics", show_metrics, counted=False),
]
