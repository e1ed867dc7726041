"""One attempt at a job, start to end: look up the files, plan the archive, build it in S3, check it.

    look up   every file's size and ETag, in parallel; small files come along whole
    plan      names, offsets and the digest that goes into the archive's key
    build     parts are fetched, checksummed and uploaded side by side
    check     the archive in the store must have the planned size

A store that is away is waited for here: every job needs it, so the slot is no
loss, and an outage of a minute costs neither attempts nor anybody's patience
(the attempts' own pauses, 5 s and 10 s, would be over in a quarter of that).

Nothing under the archive's key is visible before the build is complete.
Whether the result counts is decided afterwards by the finish transition.
"""

from __future__ import annotations

import asyncio
import logging
import random

from delineate.archive.build import build_archive
from delineate.archive.plan import ArchivePlan, plan_archive
from delineate.config import ArchiveConfig, Config
from delineate.errors import (
    BucketMissing,
    FilesMissing,
    JobTimeout,
    SourceChanged,
    StorageTimeout,
    StorageUnavailable,
)
from delineate.job import ArchiveResult, Job
from delineate.storage import Storage
from delineate.telemetry import spans
from delineate.worker.files import Files
from delineate.worker.report import PackingProgress, Report, waiting_for_store
from delineate.worker.upload import ArchiveUpload

log = logging.getLogger(__name__)

MANIFEST_NAME = "delineate-skipped.txt"
MAX_PLANS = 3


async def run_job(job: Job, storage: Storage, config: Config, upload: ArchiveUpload, report: Report) -> ArchiveResult:
    """Pack the job's files into one archive in S3; the archive is there, whole, when this returns.

    `upload` is this attempt's part in the job's multipart upload, which outlives the attempt.
    Raises JobError; its `error_class` says whether another attempt makes sense. Raises LeaseLost.
    """
    away = False
    try:
        async with asyncio.timeout(config.worker.job_timeout) as limit:
            await _simulated_delay(config)
            plans_left = MAX_PLANS
            while True:
                try:
                    return await _run(job, storage, config, upload, report)
                except SourceChanged as error:
                    plans_left -= 1
                    if not plans_left:
                        raise
                    log.info("planning anew: %s", error)
                except (StorageUnavailable, StorageTimeout):
                    away = True
                    if not await _outlasted(storage, report):
                        raise
                    away = False
    except TimeoutError as error:
        if not limit.expired():
            raise
        seconds = f"{config.worker.job_timeout:.0f} s"
        if away:
            raise StorageUnavailable(f"The file store was away, and did not come back within {seconds}.") from error
        raise JobTimeout(
            f"The archive was not ready within {seconds}. Ask for fewer or smaller files, "
            "or retry later if the file store was slow."
        ) from error


async def _outlasted(storage: Storage, report: Report) -> bool:
    """Wait until the store answers again; False if it answers at once, so that the fault was not an outage.

    Raises AccessRefused if that is its answer.
    """
    pauses = 0
    while True:
        try:
            await storage.check()
        except (StorageUnavailable, StorageTimeout) as error:
            if not pauses:
                log.warning("the job waits for the S3 store: %s", error)
            report(waiting_for_store())
            await asyncio.sleep(min(5.0, 0.5 * 2**pauses) * random.uniform(0.5, 1))
            pauses += 1
        except BucketMissing:
            return False  # only an operator can help; the failure at hand says so
        else:
            return pauses > 0


async def _run(job: Job, storage: Storage, config: Config, upload: ArchiveUpload, report: Report) -> ArchiveResult:
    files = Files(storage, config.archive)
    with spans.step("look up files", files=job.total_files):
        missing = await files.look_up(job, report)
    if missing and (job.on_missing == "fail" or len(missing) == job.total_files):
        raise FilesMissing(missing)
    plan = plan_archive(
        files.found,
        part_bytes=config.archive.part_bytes,
        max_bytes=config.archive.max_bytes,
        max_name_bytes=config.archive.max_name_bytes,
        slots=config.archive.slots,
        extra=_manifest(job, missing),
    )
    result = ArchiveResult(
        key=f"{config.storage.archive_prefix}{job.id}/{plan.digest[:16]}.zip",
        size=plan.total_bytes,
        filename=f"export-{job.id[:8]}.zip",
        skipped_file_ids=tuple(missing),
    )
    packing = PackingProgress(plan.total_bytes, job.total_files, len(missing), report)
    with spans.step("build archive", bytes=plan.total_bytes, parts=plan.part_count):
        await _build(plan, files, storage, config.archive, result, upload, packing)
    return result


async def _build(
    plan: ArchivePlan,
    files: Files,
    storage: Storage,
    settings: ArchiveConfig,
    result: ArchiveResult,
    upload: ArchiveUpload,
    report: PackingProgress,
) -> None:
    if plan.part_count == 1:
        # One request in place of three, and just as atomic.
        async def put_whole(number: int, body: memoryview) -> str:
            await storage.put_archive(result.key, body, result.filename)
            return ""

        await build_archive(
            plan,
            files.read,
            put_whole,
            slots=settings.slots,
            fetch_concurrency=settings.fetch_concurrency,
            on_progress=report.packing,
        )
        stored = await storage.stat_archive(result.key)
        if stored is None or stored.size != result.size:
            raise StorageUnavailable("The file store reported success but does not hold the archive.")
        return

    done = await upload.open(plan, result)
    if done is None:
        return
    receipts = await build_archive(
        plan,
        files.read,
        upload.put_part,
        slots=settings.slots,
        fetch_concurrency=settings.fetch_concurrency,
        on_progress=report.packing,
        done=done,
        on_part=upload.save,
    )
    report.finishing()
    await upload.complete(receipts, plan.total_bytes)


def _manifest(job: Job, missing: list[int]) -> list[tuple[str, bytes, float]]:
    if not missing:
        return []
    lines = ["These files were asked for and do not exist:", *(str(file_id) for file_id in missing), ""]
    # The job's own time, so that another attempt makes the same archive.
    return [(MANIFEST_NAME, "\n".join(lines).encode(), job.created_at)]


async def _simulated_delay(config: Config) -> None:
    delay = config.processing.simulated_delay
    if delay.enabled:
        await asyncio.sleep(random.uniform(delay.min, delay.max))
