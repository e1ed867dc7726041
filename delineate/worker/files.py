"""A job's source files: described in parallel, then read; small ones come along with their description."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from delineate.config import ArchiveConfig
from delineate.job import Job, SourceFile
from delineate.storage import Storage
from delineate.worker.report import Report, planning


class Files:
    """The job's files: described by `look_up`, then read; the small ones from memory, where the look-up put them."""

    def __init__(self, storage: Storage, config: ArchiveConfig) -> None:
        self._storage = storage
        self._config = config
        self._bodies: dict[int, bytes] = {}
        self.found: list[SourceFile] = []

    async def look_up(self, job: Job, report: Report) -> list[int]:
        """Fill `found`, in the order asked for; the ids that do not exist."""
        probes: dict[int, SourceFile | None] = {}
        wanted = iter(job.file_ids)

        async def look_up_some() -> None:
            for file_id in wanted:
                probe = await self._storage.probe(file_id, self._config.probe_bytes)
                probes[file_id] = probe.file if probe else None
                if probe and probe.body is not None:
                    self._bodies[file_id] = probe.body
                report(planning(len(probes), job.total_files))

        report(planning(0, job.total_files))
        lookers = [
            asyncio.create_task(look_up_some()) for _ in range(min(self._config.fetch_concurrency, job.total_files))
        ]
        try:
            await asyncio.gather(*lookers)
        finally:
            for looker in lookers:
                looker.cancel()
            await asyncio.gather(*lookers, return_exceptions=True)
        self.found = [file for file_id in job.file_ids if (file := probes[file_id])]
        return [file_id for file_id in job.file_ids if probes[file_id] is None]

    async def read(
        self, file: SourceFile, start: int, into: memoryview, on_chunk: Callable[[memoryview], None]
    ) -> None:
        body = self._bodies.get(file.file_id)
        if body is None:
            await self._storage.read(file, start, into, on_chunk)
            return
        into[:] = body[start : start + into.nbytes]
        on_chunk(into)
        if start + into.nbytes == file.size:
            # Read once and in order, so the memory can go back now.
            del self._bodies[file.file_id]
