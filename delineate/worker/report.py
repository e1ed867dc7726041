"""Progress on its way from the packing loop to Redis: the newest value, at most so often.

The packer reports after every chunk, thousands of times a second; what is in
between two updates is never sent.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from delineate.errors import LeaseLost, QueueUnavailable
from delineate.job import Lease, Progress, Stage
from delineate.queue import Queue

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 2.0

Report = Callable[[Progress], None]


class Reporter:
    """Sends a lease's progress until `run` is cancelled; `on_lost` is called once if the lease is gone."""

    def __init__(self, queue: Queue, lease: Lease, interval_seconds: float, on_lost: Callable[[], None]) -> None:
        self._queue = queue
        self._lease = lease
        self._interval = interval_seconds
        self._on_lost = on_lost
        self._latest: Progress | None = None
        self._news = asyncio.Event()

    def report(self, progress: Progress) -> None:
        """Have `progress` sent soon, in place of what was not sent yet; cheap."""
        if progress != self._latest:
            self._latest = progress
            self._news.set()

    async def run(self) -> None:
        wait = self._interval
        while True:
            await self._news.wait()
            self._news.clear()
            progress = self._latest
            assert progress is not None  # noqa: S101 - the event is set by report alone
            try:
                await self._queue.progress(self._lease, progress)
            except LeaseLost:
                self._on_lost()
                return
            except QueueUnavailable as error:
                # The newest value is sent when Redis is back, and Redis is not asked ten times a second meanwhile.
                log.debug("%s", error)
                self._news.set()
                wait = min(wait * 2, LONGEST_WAIT_SECONDS)
                await asyncio.sleep(wait * random.uniform(0.5, 1))
            else:
                wait = self._interval
                await asyncio.sleep(wait)


def planning(done: int, total: int) -> Progress:
    """What a job shows while `done` of its `total` files are looked up."""
    return Progress(percent=0, current_file=0, stage=Stage.PLANNING, message=f"Looked up {done} of {total} files")


def waiting_for_store() -> Progress:
    """What a job shows while the store is away; the numbers stay where they were, since they never go back."""
    return Progress(percent=0, current_file=0, stage=Stage.PLANNING, message="Waiting for the file store to come back")


class PackingProgress:
    """Turns the builder's counts into progress; skipped files count as done, since nothing is left to do for them."""

    def __init__(self, total_bytes: int, total_files: int, skipped: int, report: Report) -> None:
        self._total_bytes = total_bytes
        self._total_files = total_files
        self._skipped = skipped
        self._report = report
        self._last = (-1, -1, 0)

    def packing(self, bytes_done: int, files_done: int) -> None:
        files = min(files_done + self._skipped, self._total_files)
        percent = min(99, bytes_done * 100 // max(1, self._total_bytes))
        # Called for every chunk: only what a client could see is worth an object.
        if (percent, files) == self._last[:2] and bytes_done - self._last[2] < 1_000_000:
            return
        self._last = (percent, files, bytes_done)
        self._send(percent, files, bytes_done, Stage.PACKING, f"Packed {files} of {self._total_files} files")

    def finishing(self) -> None:
        self._send(99, self._total_files, self._total_bytes, Stage.FINISHING, "Putting the archive together")

    def _send(self, percent: int, files: int, bytes_done: int, stage: Stage, message: str) -> None:
        self._report(
            Progress(
                percent=percent,
                current_file=files,
                stage=stage,
                message=message,
                bytes_done=bytes_done,
                bytes_total=self._total_bytes,
            )
        )
