"""Presigned links of finished archives, signed once and shown to everyone who asks within half their life."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

from delineate.errors import ArchiveExpired, InternalError
from delineate.job import ArchiveResult, Job
from delineate.storage import Storage

# Bounds the memory: a link is about 600 bytes.
MAX_LINKS = 10_000


class Link(NamedTuple):
    """`expires_at` is Unix seconds."""

    url: str
    expires_at: float


class Links:
    """Signs through `storage`; links live `lifetime` seconds."""

    def __init__(self, storage: Storage, lifetime: int) -> None:
        self._storage = storage
        self._lifetime = lifetime
        self._known: OrderedDict[tuple[str, int, int], Link] = OrderedDict()

    def epoch(self) -> int:
        """Changes twice in a link's life. Part of a status' ETag, so that a client never keeps a dead link with 304."""
        return int(time.time() * 2 // self._lifetime)

    async def link(self, job: Job) -> Link:
        """A link to a completed job's archive, good for at least half of its lifetime."""
        key = (job.id, job.token, self.epoch())
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = await self._sign(job)
            if len(self._known) > MAX_LINKS:
                self._known.popitem(last=False)
        return known

    async def fresh(self, job: Job) -> Link:
        """A link signed now, to an archive that is there now. Raises ArchiveExpired when it is gone."""
        if await self._storage.stat_archive(_result(job).key) is None:
            raise ArchiveExpired("the archive has been deleted; start the export again")
        return await self._sign(job)

    async def _sign(self, job: Job) -> Link:
        result = _result(job)
        # Taken before signing, so that what is promised is never later than what was signed.
        now = time.time()
        url = await self._storage.presign(result.key, result.filename, self._lifetime)
        return Link(url, now + self._lifetime)


def _result(job: Job) -> ArchiveResult:
    if job.result is None:
        raise InternalError(f"job {job.id} is {job.status} but has no archive")
    return job.result
