"""What janitors ask of the queue: due retries, dead workers, old dead letters, uploads that nobody will finish."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import cast

import msgspec

from delineate.job import Upload
from delineate.queue.base import Connected
from delineate.queue.record import POISON, encode, parse_upload

log = logging.getLogger(__name__)

FORGET_DEAD_WORKERS_SECONDS = 600


class Reaped(msgspec.Struct, frozen=True):
    """A job taken from a dead worker; `buried` if it had lost too many.

    The rest is of the attempt that was lost: its trace, its span id (hex) and its start in Unix seconds,
    empty and None if it is not traced.
    """

    worker: str
    job_id: str
    buried: bool
    traceparent: str = ""
    span: str = ""
    started_at: float | None = None


class Upkeep(Connected):
    async def promote(self) -> int:
        """Move due retries to the front of the line; how many there were."""
        return await self._repeat("promoting retries", self._scripts.promote)

    async def reap(self) -> list[Reaped]:
        """Take the jobs of workers without heartbeat away from them."""
        moved = await self._repeat(
            "reaping dead workers",
            lambda: self._scripts.reap(
                max_crashes=self._config.queue.max_crashes,
                failed_seconds=int(self._config.retention.failed),
                forget_seconds=FORGET_DEAD_WORKERS_SECONDS,
                failure=encode(POISON),
                message=POISON.message,
            ),
        )
        return [
            Reaped(worker, job_id, outcome == "buried", traceparent, span, int(began) / 1000 if began else None)
            for worker, job_id, outcome, traceparent, span, began in moved
        ]

    async def abandoned_uploads(self, limit: int) -> list[Upload]:
        """Uploads that nobody will finish, the oldest first; each stays in the list until `forget_upload`."""
        members = await self._repeat(
            "reading abandoned uploads",
            lambda: cast(Awaitable[list[str]], self._commands.zrange(self._keys.abandoned, 0, limit - 1)),
        )
        uploads = []
        for member in members:
            upload = parse_upload(member)
            if upload is None:
                log.error("a damaged record of an abandoned upload is dropped: %.200s", member)
                await self._drop_abandoned(member)
            else:
                uploads.append(upload)
        return uploads

    async def forget_upload(self, upload: Upload) -> None:
        """The store does not have it any more."""
        await self._drop_abandoned(encode(upload))

    async def _drop_abandoned(self, member: str) -> None:
        await self._repeat("forgetting an upload", lambda: self._commands.zrem(self._keys.abandoned, member))

    async def sweep(self) -> int:
        """Drop dead letters whose record has ended; how many there were."""
        return await self._repeat("sweeping dead letters", self._scripts.sweep)
