"""The multipart upload of a job's archive: begun once, continued by whoever has the job next.

What the store has is written down in Redis: the upload before its first
part, each part when the store has it. After a crash, a hand-back or a failed
attempt the next worker plans again; if the plan is the same, so are the bytes of
every part, and only those that the store does not list are made again. Nobody
aborts an upload here while its job can still use it: cancel, bury and
begin_upload (lua/) give it up, and a janitor aborts it.
"""

from __future__ import annotations

import asyncio
import logging

from delineate.archive.build import PartReceipt
from delineate.archive.plan import ArchivePlan
from delineate.errors import JobError, QueueUnavailable
from delineate.job import ArchiveResult, Lease, SavedPart, Upload
from delineate.queue import Queue
from delineate.storage import Storage
from delineate.telemetry.metrics import PARTS_RESUMED, PARTS_UPLOADED
from delineate.worker.tasks import until_recorded

log = logging.getLogger(__name__)

ABORT_SECONDS = 10.0


class ArchiveUpload:
    """One attempt's part in its job's upload."""

    def __init__(self, lease: Lease, queue: Queue, storage: Storage) -> None:
        self._lease = lease
        self._queue = queue
        self._storage = storage
        self._known = lease.job.upload
        self._current: Upload | None = None

    async def open(self, plan: ArchivePlan, result: ArchiveResult) -> dict[int, PartReceipt] | None:
        """Continue the job's upload if it fits the plan, else begin one; the parts that need not be sent.

        None if an earlier attempt has put the whole archive together already. Raises JobError, LeaseLost.
        """
        known = self._known
        if known is not None and (known.digest, known.key) == (plan.digest, result.key):
            stored = await self._storage.list_parts(known.key, known.upload_id)
            if stored is not None:
                self._current = known
                # Only what the store and the record agree on: a part counts when both have it whole.
                sizes = {(part.number, _bare(part.etag)): part.size for part in stored}
                done = {
                    part.number: PartReceipt(part.number, part.etag, part.crcs)
                    for part in await self._saved_parts()
                    if 1 <= part.number <= plan.part_count
                    and sizes.get((part.number, _bare(part.etag))) == plan.part_size(part.number)
                }
                context = {"partsKept": len(done), "parts": plan.part_count}
                log.info("continuing an upload", extra={"context": context})
                PARTS_RESUMED.inc(len(done))
                return done
            found = await self._storage.stat_archive(result.key)
            if found is not None and found.size == plan.total_bytes:
                return None
        upload_id = await self._storage.start_upload(result.key, result.filename)
        self._current = Upload(key=result.key, upload_id=upload_id, digest=plan.digest)
        await self._record(self._current)
        self._known = self._current
        return {}

    async def put_part(self, number: int, body: memoryview) -> str:
        current = self._opened()
        etag = await self._storage.put_part(current.key, current.upload_id, number, body)
        PARTS_UPLOADED.inc()
        log.debug("part stored", extra={"context": {"uploadId": current.upload_id, "part": number}})
        return etag

    async def save(self, receipt: PartReceipt) -> None:
        """Remember a part. Without Redis it is merely sent again after a crash. Raises LeaseLost."""
        try:
            await self._queue.save_part(
                self._lease, SavedPart(number=receipt.number, etag=receipt.etag, crcs=receipt.crcs)
            )
        except QueueUnavailable as error:
            log.debug("a part is not recorded: %s", error)

    async def complete(self, receipts: list[PartReceipt], size: int) -> None:
        current = self._opened()
        parts = [(receipt.number, receipt.etag) for receipt in receipts]
        await self._storage.complete_upload(current.key, current.upload_id, parts, size)

    async def abort_if_unwanted(self) -> None:
        """After the lease was lost: abort, unless another worker continues this very upload.

        A janitor has done so already for a cancelled job, but a part that was on its way
        then may have arrived after that (AbortMultipartUpload says to abort again).
        Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_AbortMultipartUpload.html
        """
        current = self._current
        if current is None:
            return
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                job = await self._queue.get(self._lease.job.id)
                if job is None or job.status.is_final or job.upload != current:
                    await self._storage.abort_upload(current.key, current.upload_id)
        except (JobError, QueueUnavailable, TimeoutError) as error:
            log.warning("an upload may be left over: %s", error)

    def _opened(self) -> Upload:
        if self._current is None:
            raise RuntimeError("the upload was not opened")
        return self._current

    async def _saved_parts(self) -> list[SavedPart]:
        try:
            return await self._queue.saved_parts(self._lease.job.id)
        except QueueUnavailable as error:
            log.warning("every part is sent again: %s", error)
            return []

    async def _record(self, upload: Upload) -> None:
        """However long Redis is away: an upload that nobody remembers would never be aborted."""
        await until_recorded(
            lambda: self._queue.begin_upload(self._lease, upload),
            lambda error: log.warning("an upload is not recorded yet: %s", error),
        )


def _bare(etag: str) -> str:
    """Some stores quote ETags in one answer and not in another."""
    return etag.removeprefix("W/").strip('"')
