"""The CRC-32 of every file of an archive, put together from the segments that the parts bring in any order."""

from __future__ import annotations

import asyncio

from isal import isal_zlib

from delineate.archive.plan import ArchivePlan


class Checksums:
    """Takes segments, gives whole CRCs to those who wait for them; for one event loop.

    `files_known` counts the stored files whose CRC is known; empty ones are known at once.
    """

    def __init__(self, plan: ArchivePlan) -> None:
        self._plan = plan
        self._known = [entry.crc for entry in plan.entries]
        self._unknown = self._known.count(None)
        self.files_known = plan.file_count - self._unknown
        self._segments: dict[int, dict[int, tuple[int, int]]] = {}
        self._waiting: dict[int, asyncio.Event] = {}
        self._complete = asyncio.Event()
        if not self._unknown:
            self._complete.set()

    def add(self, index: int, number: int, length: int, crc: int) -> None:
        """Take the CRC of the `length` bytes of entry `index` that lie in part `number`; once for each part."""
        expected = self._plan.segment_count(index)
        if expected > 1:
            segments = self._segments.setdefault(index, {})
            segments[number] = length, crc
            if len(segments) < expected:
                return
            # Combined at the end, in order: one pass, where joining neighbours as they come would search for them.
            crc = 0
            for _, (segment_length, segment_crc) in sorted(self._segments.pop(index).items()):
                crc = isal_zlib.crc32_combine(crc, segment_crc, segment_length)
        self._known[index] = crc
        self._unknown -= 1
        self.files_known += 1
        if waiting := self._waiting.pop(index, None):
            waiting.set()
        if not self._unknown:
            self._complete.set()

    async def wait(self, index: int) -> int:
        """The CRC of entry `index`, once its last segment has come."""
        while (crc := self._known[index]) is None:
            await self._waiting.setdefault(index, asyncio.Event()).wait()
        return crc

    async def wait_for_all(self) -> list[int]:
        """The CRCs of all entries, in the plan's order, once every one is known."""
        await self._complete.wait()
        return [crc for crc in self._known if crc is not None]
