"""A job that lost its worker goes on where it stopped, and no upload outlives the job that it was for."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY

from delineate.config import Config
from delineate.job import Job, JobStatus, Upload
from tests.worker.test_worker import Bench, bench, worker_process, working

replace = msgspec.structs.replace
FILES = 12
FILE_BYTES = 10_000_000


@pytest.fixture
def small_parts(config: Config) -> Config:
    return replace(config, archive=replace(config.archive, part_bytes=5_242_880, slots=2))


def process(config: Config, log: Path) -> subprocess.Popen[bytes]:
    return worker_process(config, log, DELINEATE__ARCHIVE__PART_BYTES="5242880", DELINEATE__ARCHIVE__SLOTS="2")


async def put_files(b: Bench) -> list[int]:
    return [await b.put(70000 + i, FILE_BYTES) for i in range(FILES)]


async def parts_saved(b: Bench, job_id: str, least: int) -> Upload:
    """Wait until `least` parts of the running job are in the store and recorded; its upload."""
    end = time.monotonic() + 30
    while len(await b.queue.saved_parts(job_id)) < least:
        assert time.monotonic() < end
        await asyncio.sleep(0.002)
    job = await b.queue.get(job_id)
    assert job is not None
    assert job.upload is not None
    assert job.status == JobStatus.PROCESSING
    return job.upload


async def gone(b: Bench, upload: Upload, seconds: float = 5) -> None:
    """Wait until the store has forgotten the upload and nobody means to abort it any more."""
    end = time.monotonic() + seconds
    while await b.storage.list_parts(upload.key, upload.upload_id) is not None or await b.queue.abandoned_uploads(9):
        assert time.monotonic() < end, "the upload is still there"
        await asyncio.sleep(0.05)


def parts_sent() -> float:
    return REGISTRY.get_sample_value("s3_operations_total", {"operation": "UploadPart", "status": "ok"}) or 0.0


def parts_counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("archive_parts_total", {"outcome": outcome}) or 0.0


async def completed(b: Bench, job_id: str) -> Job:
    job = await b.ended(job_id)
    assert (job.status, job.failure) == (JobStatus.COMPLETED, None)
    return job


async def test_a_killed_workers_upload_is_continued_and_no_finished_part_is_sent_again(
    small_parts: Config, tmp_path: Path
) -> None:
    async with bench(small_parts) as b:
        ids = await put_files(b)
        worker = process(small_parts, tmp_path / "log")
        try:
            job_id = await b.export(*ids)
            upload = await parts_saved(b, job_id, 6)
        finally:
            worker.kill()
            worker.wait()
        saved = len(await b.queue.saved_parts(job_id))
        total = -(-(FILES * FILE_BYTES) // 5_242_880)
        assert 6 <= saved < total, "killed too late for this test to mean anything"
        before = parts_sent()
        uploaded, resumed = parts_counted("uploaded"), parts_counted("resumed")
        async with working(b):
            job = await completed(b, job_id)
        assert (job.attempts, job.crashes) == (1, 1)
        assert parts_counted("resumed") - resumed == saved
        assert parts_counted("uploaded") - uploaded == parts_sent() - before
        # The archive is a little longer than its files, so it may have one part more than they fill.
        assert total - saved <= parts_sent() - before <= total + 1 - saved
        await b.check(job, *ids)
        assert job.upload is None
        assert await b.queue.saved_parts(job_id) == []
        await gone(b, upload)


async def test_a_job_handed_back_by_a_drain_goes_on_with_the_same_upload(small_parts: Config) -> None:
    config = replace(small_parts, worker=replace(small_parts.worker, drain_timeout=0.05))
    async with bench(config) as b:
        ids = await put_files(b)
        job_id = await b.export(*ids)
        async with working(b):
            upload = await parts_saved(b, job_id, 4)
        handed_back = await b.queue.get(job_id)
        assert handed_back is not None
        assert (handed_back.status, handed_back.attempts, handed_back.upload) == (JobStatus.QUEUED, 0, upload)
        async with working(b, small_parts):
            job = await completed(b, job_id)
        await b.check(job, *ids)


async def test_cancelling_aborts_the_upload(small_parts: Config) -> None:
    async with bench(small_parts) as b:
        ids = await put_files(b)
        async with working(b):
            job_id = await b.export(*ids)
            upload = await parts_saved(b, job_id, 2)
            await b.queue.cancel(job_id)
            await gone(b, upload)
        assert await b.queue.saved_parts(job_id) == []


async def test_a_worker_that_was_taken_for_dead_does_not_disturb_the_upload_of_its_successor(
    small_parts: Config, tmp_path: Path
) -> None:
    async with bench(small_parts) as b:
        ids = await put_files(b)
        log = tmp_path / "log"
        sleeper = process(small_parts, log)
        try:
            job_id = await b.export(*ids)
            await parts_saved(b, job_id, 4)
            sleeper.send_signal(signal.SIGSTOP)
            slow = replace(small_parts, archive=replace(small_parts.archive, fetch_concurrency=1))
            async with working(b, slow):
                await b.until(job_id, lambda job: job.crashes == 1 and job.status == JobStatus.PROCESSING)
                sleeper.send_signal(signal.SIGCONT)
                job = await completed(b, job_id)
            await b.check(job, *ids)
            end = time.monotonic() + 10
            while b"declared dead" not in log.read_bytes():
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            assert await b.queue.get(job_id) == job
        finally:
            sleeper.kill()
            sleeper.wait()


async def test_files_that_changed_meanwhile_are_not_mixed_with_old_parts(small_parts: Config, tmp_path: Path) -> None:
    async with bench(small_parts) as b:
        ids = await put_files(b)
        worker = process(small_parts, tmp_path / "log")
        try:
            job_id = await b.export(*ids)
            old = await parts_saved(b, job_id, 4)
        finally:
            worker.kill()
            worker.wait()
        b.files[70000] = b"other" + b.files[70000][5:]
        await b.storage.put_source(70000, b.files[70000], "70000.bin")
        async with working(b):
            job = await completed(b, job_id)
            await gone(b, old)
        await b.check(job, *ids)
        assert job.result is not None
        assert job.result.key != old.key


async def test_an_archive_that_was_put_together_before_the_crash_is_not_built_again(small_parts: Config) -> None:
    async with bench(small_parts) as b:
        ids = await put_files(b)
        async with working(b):
            first = await completed(b, await b.export(*ids))
        assert first.result is not None
        # The crash came between complete and finish: the upload is gone, the archive is there.
        job_id = await b.export(*ids)
        await b.queue.register("w1")
        (lease,) = await b.queue.claim("w1", 1)
        key = first.result.key.replace(first.id, job_id)
        digest_start = key.rpartition("/")[2].removesuffix(".zip")
        upload_id = await b.storage.start_upload(key, "x.zip")
        receipts = []
        archive = (await b.download(first)).fp
        assert archive is not None
        archive.seek(0)
        number = 0
        while part := archive.read(5_242_880):
            number += 1
            receipts.append((number, await b.storage.put_part(key, upload_id, number, memoryview(part))))
        await b.storage.complete_upload(key, upload_id, receipts, first.result.size)
        digest = await _digest_of(b, first, digest_start)
        await b.queue.begin_upload(lease, Upload(key=key, upload_id=upload_id, digest=digest))
        await b.queue.release(lease)
        before = parts_sent()
        async with working(b):
            job = await completed(b, job_id)
        assert parts_sent() == before
        await b.check(job, *ids)


async def _digest_of(b: Bench, job: Job, start: str) -> str:
    """The plan's whole digest, of which the key shows the start."""
    from delineate.archive.plan import plan_archive

    probes = [await b.storage.probe(file_id, 1) for file_id in job.file_ids]
    settings = b.config.archive
    plan = plan_archive(
        [probe.file for probe in probes if probe],
        part_bytes=settings.part_bytes,
        max_bytes=settings.max_bytes,
        max_name_bytes=settings.max_name_bytes,
        slots=settings.slots,
    )
    assert plan.digest.startswith(start)
    return plan.digest
