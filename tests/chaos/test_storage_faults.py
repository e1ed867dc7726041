"""What a broken S3 store does to whole jobs: ridden out, waited for, or told in words; never half an archive.

Every fault is made for real, by a proxy before a real `rclone serve s3` or by what is done to that server.
At the end of each test the store has no unfinished upload of ours, and nothing but whole archives.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from delineate.config import Config, load_config
from delineate.embedded import drop_unfinished_uploads, s3_command, s3_environment
from delineate.job import Job, JobStatus, Upload, new_job_id
from delineate.storage import Storage, open_storage
from delineate.worker.janitor import Janitor
from tests.conftest import CONF
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port, store_of_its_own
from tests.storage.proxy import Exchange, Fault, FaultyProxy, answers, cuts, loses, passes, stalls
from tests.worker.test_worker import Bench, bench, worker_process, working

replace = msgspec.structs.replace
PART_BYTES = 5_242_880
FILE_BYTES = 6_000_000  # two of them make an archive of three parts


async def resets(exchange: Exchange) -> None:
    exchange.reset()


def forbids(code: str) -> Fault:
    return answers(403, code)


def is_read(exchange: Exchange) -> bool:
    """A GET of a file's bytes; those from byte 0 to probe_bytes only look it up."""
    return exchange.operation == "GetObject" and exchange.header("Range") != "bytes=0-16383"


class Rig(NamedTuple):
    """A bench whose worker reaches the store through `proxy`; `direct` goes around it."""

    b: Bench
    proxy: FaultyProxy
    direct: Storage

    async def files(self, count: int = 2, size: int = FILE_BYTES) -> list[int]:
        ids = [await self.b.put(file_id, size) for file_id in range(70000, 70000 + count)]
        self.proxy.requests.clear()
        return ids

    async def completed(self, job_id: str, *file_ids: int, attempts: int = 1) -> Job:
        """The job, which has to complete in so many attempts with the right bytes and leave nothing behind."""
        job = await self.b.ended(job_id)
        assert (job.status, job.failure, job.attempts) == (JobStatus.COMPLETED, None, attempts)
        self.proxy.heal()
        await self.b.check(job, *file_ids)
        await self.nothing_unfinished()
        assert await self.sizes(job_id) == [job.result and job.result.size]
        return job

    async def failed(self, job_id: str, code: str, attempts: int) -> Job:
        """The job, which has to fail; its upload is given up, and aborted once the store lets us."""
        job = await self.b.ended(job_id)
        assert (job.status, job.attempts, job.upload) == (JobStatus.FAILED, attempts, None)
        assert job.failure is not None
        assert job.failure.code == code, job.failure
        self.proxy.heal()
        await self.nothing_unfinished()
        assert await self.sizes(job_id) == []
        return job

    async def nothing_unfinished(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while await self.direct.list_uploads() or await self.b.queue.abandoned_uploads(9):
            assert time.monotonic() < end, await self.direct.list_uploads()
            await asyncio.sleep(0.05)

    async def sizes(self, job_id: str) -> list[int]:
        """Bytes of every object that a client could see for the job."""
        storage = self.b.config.storage
        found = await self.direct._store.client.list_objects_v2(
            Bucket=storage.archive_bucket, Prefix=f"{storage.archive_prefix}{job_id}/"
        )
        # By key: rclone lists an object twice while an equal one takes its place.
        return list({content["Key"]: content["Size"] for content in found.get("Contents", [])}.values())

    async def until_seen(self, kind: str, count: int = 1) -> list[Exchange]:
        end = time.monotonic() + 20
        while len(self.proxy.seen(kind)) < count:
            assert time.monotonic() < end, f"{kind} was not asked for"
            await asyncio.sleep(0.01)
        return self.proxy.seen(kind)


@asynccontextmanager
async def rig(config: Config, port: int | None = None, **storage: object) -> AsyncIterator[Rig]:
    """Parts of 5 MiB, so that 12 MB are three of them; `storage` changes single keys of that section."""
    port = port or int(config.storage.endpoint_url.rpartition(":")[2])
    plain = replace(config.storage, endpoint_url=f"http://127.0.0.1:{port}", **storage)
    async with FaultyProxy(port) as proxy, open_storage(plain) as direct:
        config = replace(
            config,
            storage=replace(plain, endpoint_url=f"http://127.0.0.1:{proxy.port}"),
            archive=replace(config.archive, part_bytes=PART_BYTES, slots=2),
        )
        async with bench(config) as b:
            yield Rig(b, proxy, direct)


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[ServerProcess]:
    """A store that a test may kill."""
    server = store_of_its_own(tmp_path, ACCESS_KEY, SECRET_KEY)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(tmp_path / "s3")


@pytest.mark.parametrize(
    "operation", ["GetObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "ListParts"]
)
async def test_a_few_faults_in_a_row_are_ridden_out_inside_the_attempt(config: Config, operation: str) -> None:
    faults = [answers(500), answers(503, "SlowDown"), resets, stalls]
    if operation == "ListParts":
        del faults[2:]
    async with rig(config, retries=len(faults), operation_timeout=1) as r:
        ids = await r.files()
        if operation == "ListParts":  # asked for by an attempt that goes on with what another one began
            r.proxy.fail("CompleteMultipartUpload", *[answers(500)] * 3)
        r.proxy.fail(operation, *faults)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            await r.completed(job_id, *ids, attempts=2 if operation == "ListParts" else 1)
        assert len(r.proxy.seen(operation)) > len(faults)
        assert len(r.proxy.seen("CreateMultipartUpload")) == (5 if operation == "CreateMultipartUpload" else 1)


async def test_a_few_faults_are_ridden_out_by_an_archive_of_one_part_too(config: Config) -> None:
    async with rig(config, retries=4, operation_timeout=1) as r:
        (file_id,) = await r.files(1, 1_000_000)
        r.proxy.fail("PutObject", answers(500), answers(503, "SlowDown"), resets, stalls)
        async with working(r.b):
            await r.completed(await r.b.export(file_id), file_id)
        assert len(r.proxy.seen("PutObject")) == 5


@pytest.mark.parametrize(
    ("operation", "fault", "code", "says"),
    [
        ("GetObject", answers(503, "SlowDown"), "storage_unavailable", "503 SlowDown"),
        ("CreateMultipartUpload", answers(500), "storage_unavailable", "HTTP 500"),
        ("UploadPart", resets, "storage_unavailable", "while the archive was stored"),
        ("UploadPart", stalls, "storage_timeout", "did not answer in time"),
        ("CompleteMultipartUpload", answers(500, "InternalError"), "storage_unavailable", "500 InternalError"),
    ],
)
async def test_a_lasting_fault_costs_every_attempt_and_ends_in_words(
    config: Config, operation: str, fault: Fault, code: str, says: str
) -> None:
    tries = 1 if fault is stalls else 2
    async with rig(config, retries=tries - 1, operation_timeout=0.8 if fault is stalls else 60) as r:
        ids = await r.files()
        r.proxy.fail_while(lambda exchange: exchange.operation == operation, fault)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            waiting = await r.b.until(job_id, lambda job: job.due_at is not None or job.status.is_final)
            assert waiting.due_at is not None
            first_pause = config.queue.backoff
            assert 0.8 * first_pause <= waiting.due_at - waiting.updated_at <= 1.2 * first_pause + 0.01
            assert "Trying again" in waiting.progress.message
            assert "Retry the export" not in waiting.progress.message
            job = await r.failed(job_id, code, attempts=3)
        assert job.failure is not None
        assert job.failure.error_class == ("timeout" if code == "storage_timeout" else "network")
        assert says in job.failure.message
        assert job.failure.message.endswith("Retry the export in a few minutes.")
        creates = len(r.proxy.seen("CreateMultipartUpload"))
        assert creates == {"GetObject": 0, "CreateMultipartUpload": 3 * tries}.get(operation, 1)
        if operation == "CompleteMultipartUpload":
            assert len(r.proxy.seen(operation)) == 3 * tries
            assert len(r.proxy.seen("UploadPart")) == 3  # each part once, whatever came after


async def test_the_next_attempt_goes_on_with_the_same_upload(config: Config) -> None:
    async with rig(config, retries=1) as r:
        ids = await r.files()
        job_id = await r.b.export(*ids)

        async def fails_when_the_others_are_stored(exchange: Exchange) -> None:
            while len(await r.b.queue.saved_parts(job_id)) < 2:
                await asyncio.sleep(0.01)
            await answers(500)(exchange)

        r.proxy.fail_while(
            lambda put: put.operation == "UploadPart" and "partNumber=3&" in put.target,
            fails_when_the_others_are_stored,
        )
        async with working(r.b):
            await r.b.until(job_id, lambda job: job.failure is not None)
            r.proxy.heal()
            await r.completed(job_id, *ids, attempts=2)
        assert len(r.proxy.seen("CreateMultipartUpload")) == 1
        parts = [put.target.partition("?")[2].split("&")[0] for put in r.proxy.seen("UploadPart")]
        assert sorted(parts) == ["partNumber=1", "partNumber=2"] + ["partNumber=3"] * 3


async def test_truncated_bodies_are_continued_by_range(config: Config) -> None:
    async with rig(config, retries=1) as r:
        (file_id,) = await r.files(1, 5_000_000)
        r.proxy.fail("GetObject", passes, cuts(1_000_000), cuts(2_000_000, reset=True), cuts(500_000))
        async with working(r.b):
            await r.completed(await r.b.export(file_id), file_id)
        ranges = [str(get.header("Range")) for get in r.proxy.seen("GetObject") if is_read(get)]
        assert ranges[:4] == [f"bytes={start}-4999999" for start in (0, 1_000_000, 3_000_000, 3_500_000)]


@pytest.mark.parametrize("times", [1, 99])
async def test_a_file_that_changes_between_plan_and_read_is_planned_anew(config: Config, times: int) -> None:
    async with rig(config, retries=1) as r:
        ids = await r.files()
        changes = 0

        async def changes_first(exchange: Exchange) -> None:
            nonlocal changes
            if changes < times:
                changes += 1
                r.b.files[70000] = changes.to_bytes(4, "big") + r.b.files[70000][4:]
                await r.direct.put_source(70000, r.b.files[70000], "70000.bin")
            await passes(exchange)

        r.proxy.fail_while(lambda get: is_read(get) and "70000" in get.target, changes_first)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            if times == 1:
                await r.completed(job_id, *ids)
                return
            job = await r.failed(job_id, "source_changed", attempts=3)
        assert job.failure is not None
        assert job.failure.message == (
            "File 70000 changed while it was packed. Retry the export when the file is no longer written to."
        )


@pytest.mark.parametrize("on_missing", ["fail", "skip"])
async def test_a_file_deleted_between_plan_and_read_is_missing(config: Config, on_missing: str) -> None:
    async with rig(config, retries=1) as r:
        ids = await r.files()

        async def deletes_first(exchange: Exchange) -> None:
            storage = r.b.config.storage
            await r.direct._store.client.delete_object(
                Bucket=storage.source_bucket, Key=storage.source_key.format(file_id=70001)
            )
            await passes(exchange)

        r.proxy.fail_while(lambda get: is_read(get) and "70001" in get.target, deletes_first)
        async with working(r.b):
            job_id = await r.b.export(*ids, on_missing=on_missing)
            if on_missing == "skip":
                job = await r.completed(job_id, 70000)
                assert job.result is not None
                assert job.result.skipped_file_ids == (70001,)
            else:
                job = await r.failed(job_id, "files_missing", attempts=1)
                assert job.failure is not None
                assert "70001" in job.failure.message


@pytest.mark.parametrize("lost", [[loses()], [loses(answers(500)), answers(500), resets, answers(503, "SlowDown")]])
async def test_a_completion_whose_answer_is_lost_counts_once(config: Config, lost: list[Fault]) -> None:
    """The second row: the store did its work, and then there was no good word from it any more."""
    async with rig(config, retries=3) as r:
        ids = await r.files()
        r.proxy.fail("CompleteMultipartUpload", *lost)
        async with working(r.b):
            await r.completed(await r.b.export(*ids), *ids)
        assert len(r.proxy.seen("CreateMultipartUpload")) == 1
        assert len(r.proxy.seen("UploadPart")) == 3


@pytest.mark.parametrize(
    ("operation", "code", "advice"),
    [
        ("GetObject", "InvalidAccessKeyId", "storage.access_key_id"),
        ("UploadPart", "AccessDenied", "must be allowed to"),
        ("CompleteMultipartUpload", "InvalidAccessKeyId", "storage.access_key_id"),
    ],
)
async def test_credentials_that_are_refused_in_the_middle_end_the_job_at_once(
    config: Config, operation: str, code: str, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(config) as r:
        ids = await r.files()
        refused: list[str] = []

        async def refuses(exchange: Exchange) -> None:
            refused.append(exchange.operation)
            await forbids(code)(exchange)

        def from_then_on(exchange: Exchange) -> bool:
            middle = is_read(exchange) if operation == "GetObject" else exchange.operation == operation
            return bool(refused) or (middle and len(r.proxy.seen(operation)) > (1 if operation == "UploadPart" else 0))

        r.proxy.fail_while(from_then_on, refuses)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            job = await r.b.ended(job_id)
            await r.until_seen("AbortMultipartUpload")  # the janitor is refused as well
            assert len(r.proxy.seen("CreateMultipartUpload")) == 1
            job = await r.failed(job_id, "access_refused", attempts=1)
        assert job.failure is not None
        assert job.failure.error_class == "permission"
        assert job.failure.message.startswith("The file store refused access")
        assert "For its operator" in job.failure.message
        assert advice in job.failure.message
        assert code in job.failure.message
        assert any(record.message == "job failed" and record.levelname == "WARNING" for record in caplog.records)
        # Not one more look-up, part or completion than were on their way when the first one was refused.
        assert refused.count(operation) <= (3 if operation == "GetObject" else 2)
        assert set(refused) <= {operation, "GetObject", "UploadPart", "HEAD", "AbortMultipartUpload"}


async def test_refused_aborts_are_repeated_less_and_less_often(config: Config) -> None:
    async with rig(config) as r:
        upload_id = await r.direct.start_upload("x/y.zip", "y.zip")
        r.proxy.fail_while(lambda exchange: exchange.operation == "AbortMultipartUpload", forbids("AccessDenied"))
        other = await r.direct.start_upload("x/z.zip", "z.zip")
        for key, upload in (("x/y.zip", upload_id), ("x/z.zip", other)):
            member = msgspec.json.encode(Upload(key=key, upload_id=upload, digest="")).decode()
            await r.b.queue._commands.zadd(r.b.queue._keys.abandoned, {member: 1})
        async with working(r.b):
            await r.until_seen("AbortMultipartUpload", 6)
            times = len(r.proxy.seen("AbortMultipartUpload"))
            await asyncio.sleep(1)
            assert len(r.proxy.seen("AbortMultipartUpload")) - times <= 4  # 5 rounds of two without the pause
            r.proxy.heal()
            await r.nothing_unfinished()


async def test_a_job_waits_for_a_store_that_is_away_and_is_charged_nothing(
    config: Config, own_store: ServerProcess, tmp_path: Path
) -> None:
    """Killed, with all its uploads; three times as long as the attempts and their pauses would have lasted."""
    # This store also forgets names when it ends; the keys say the same.
    async with rig(config, own_store.port, source_key="{file_id}.bin") as r:
        ids = await r.files()
        gate = asyncio.Event()

        async def waits(exchange: Exchange) -> None:
            await gate.wait()
            await passes(exchange)

        r.proxy.fail_while(lambda put: put.operation == "UploadPart" and "partNumber=3&" in put.target, waits)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            await r.until_seen("UploadPart", 3)
            own_store.kill()
            r.proxy.heal()
            gate.set()
            away = await r.b.until(job_id, lambda job: "Waiting for the file store" in job.progress.message)
            assert away.status == JobStatus.PROCESSING
            await asyncio.sleep(3)
            await asyncio.to_thread(own_store.start)
            await r.completed(job_id, *ids)
        assert len(r.proxy.seen("CreateMultipartUpload")) == 2  # this store forgets uploads when it ends
    archives = tmp_path / "s3" / "archives"
    own_store.stop()
    assert [file.name[:8] for file in archives.rglob("*") if file.is_file() and file.suffix != ".zip"] == [".rclone_"]
    drop_unfinished_uploads(archives)
    assert [file.suffix for file in archives.rglob("*") if file.is_file()] == [".zip"]


async def test_a_store_that_kept_the_upload_gets_only_what_it_lacks_after_an_outage(config: Config) -> None:
    async with rig(config, retries=1) as r:
        ids = await r.files()

        async def outage(exchange: Exchange) -> None:
            r.proxy.fail_while(lambda _: True, resets)
            exchange.reset()

        r.proxy.fail("UploadPart", passes, passes, outage)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            await r.b.until(job_id, lambda job: "Waiting for the file store" in job.progress.message)
            r.proxy.heal()
            await r.completed(job_id, *ids)
        assert len(r.proxy.seen("CreateMultipartUpload")) == 1


async def test_a_store_that_stays_away_ends_the_job_in_words(config: Config) -> None:
    config = replace(config, worker=replace(config.worker, job_timeout=1), queue=replace(config.queue, attempts=2))
    async with rig(config, retries=1) as r:
        ids = await r.files(1)
        r.proxy.fail_while(lambda _: True, resets)
        async with working(r.b):
            job = await r.failed(await r.b.export(*ids), "storage_unavailable", attempts=2)
        assert job.failure is not None
        assert "away" in job.failure.message
        assert job.failure.message.endswith("Retry the export in a few minutes.")


async def test_a_cancel_ends_a_job_that_waits_for_the_store(config: Config) -> None:
    async with rig(config, retries=1) as r:
        ids = await r.files()
        r.proxy.fail("UploadPart", passes)
        r.proxy.fail_while(lambda exchange: len(r.proxy.seen("UploadPart")) > 1, resets)
        async with working(r.b) as worker:
            job_id = await r.b.export(*ids)
            await r.b.until(job_id, lambda job: "Waiting for the file store" in job.progress.message)
            await r.b.queue.cancel(job_id)
            while worker._running:
                await asyncio.sleep(0.02)
            r.proxy.heal()
            await r.nothing_unfinished()
        assert await r.sizes(job_id) == []


@asynccontextmanager
async def watching(r: Rig, job_id: str) -> AsyncIterator[set[tuple[int, ...]]]:
    """What clients see of the job's archive, asked for as often as the store answers while the block runs."""
    seen: set[tuple[int, ...]] = set()

    async def look() -> None:
        while True:
            seen.add(tuple(await r.sizes(job_id)))
            await asyncio.sleep(0.002)

    task = asyncio.create_task(look())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _sends_half(exchange: Exchange) -> None:
    """Half of the body reaches the store, then both connections end."""
    _, writer = await asyncio.open_connection("127.0.0.1", exchange._upstream)
    writer.write(exchange.head + exchange.body[: len(exchange.body) // 2])
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    exchange.reset()


@pytest.mark.parametrize("size", [FILE_BYTES, 1_500_000])
async def test_nothing_half_built_is_ever_visible(config: Config, size: int) -> None:
    """Three parts, and one PUT."""
    async with rig(config, retries=3) as r:
        ids = await r.files(2, size)
        r.proxy.fail("PUT", _sends_half, loses(), _sends_half)
        r.proxy.fail("POST", passes, answers(500), loses(answers(500)), answers(500), answers(500))
        r.proxy.fail("GetObject", *[passes] * 3, cuts(100_000), cuts(0))
        async with working(r.b):
            job_id = await r.b.export(*ids)
            async with watching(r, job_id) as seen:
                job = await r.completed(job_id, *ids)
        assert job.result is not None
        assert seen <= {(), (job.result.size,)}
        assert () in seen


async def test_a_cancelled_job_leaves_neither_archive_nor_upload(config: Config) -> None:
    async with rig(config) as r:
        ids = await r.files()
        r.proxy.fail("UploadPart", passes, passes, stalls)
        async with working(r.b):
            job_id = await r.b.export(*ids)
            async with watching(r, job_id) as seen:
                await r.until_seen("UploadPart", 3)
                await r.b.queue.cancel(job_id)
                await r.nothing_unfinished()
        assert seen == {()}


def aged(config: Config, seconds: float = 1) -> Config:
    """Uploads are old after so many seconds, which must be enough to record a new one."""
    return replace(config, storage=replace(config.storage, orphan_age=seconds, orphan_interval=0.2))


async def test_an_upload_that_a_killed_worker_never_recorded_is_aborted(config: Config, tmp_path: Path) -> None:
    async with rig(config) as r:
        ids = await r.files()
        arrived = asyncio.Event()

        async def holds_the_answer(exchange: Exchange) -> None:
            await exchange.forward()
            arrived.set()
            await stalls(exchange)

        r.proxy.fail("CreateMultipartUpload", holds_the_answer)
        process = worker_process(
            r.b.config, tmp_path / "log", DELINEATE__ARCHIVE__PART_BYTES=str(PART_BYTES), DELINEATE__ARCHIVE__SLOTS="2"
        )
        try:
            job_id = await r.b.export(*ids)
            await asyncio.wait_for(arrived.wait(), 20)
        finally:
            process.kill()
            process.wait()
        job = await r.b.queue.get(job_id)
        assert job is not None
        assert job.upload is None
        assert len(await r.direct.list_uploads() or []) == 1
        async with working(r.b, aged(r.b.config)):
            job = await r.completed(job_id, *ids)
        assert job.crashes == 1


async def test_an_upload_whose_answer_was_lost_is_aborted_and_the_live_one_is_not(config: Config) -> None:
    async with rig(config) as r:
        ids = await r.files()
        r.proxy.fail("CreateMultipartUpload", loses())
        hold = asyncio.Event()

        async def waits(exchange: Exchange) -> None:
            await hold.wait()
            await passes(exchange)

        r.proxy.fail("UploadPart", waits, waits)
        async with working(r.b, aged(r.b.config)):
            job_id = await r.b.export(*ids)
            await r.until_seen("UploadPart")
            assert len(await r.direct.list_uploads() or []) == 2
            end = time.monotonic() + 10
            while len(await r.direct.list_uploads() or []) > 1:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            hold.set()
            await r.completed(job_id, *ids)


async def test_only_old_uploads_that_no_live_job_names_are_orphans(config: Config) -> None:
    async with rig(config) as r:
        ids = await r.files()
        prefix = config.storage.archive_prefix
        hold = asyncio.Event()

        async def waits(exchange: Exchange) -> None:
            await hold.wait()
            await passes(exchange)

        r.proxy.fail("UploadPart", passes, waits, waits)
        ended = await r.b.export(99999)
        async with working(r.b):
            assert (await r.b.ended(ended)).status == JobStatus.FAILED
            job_id = await r.b.export(*ids)
            await r.until_seen("UploadPart", 2)
            live = await r.b.until(job_id, lambda job: job.upload is not None)
            assert live.upload is not None
            orphans = [f"{prefix}{owner}/a.zip" for owner in (new_job_id(), ended, job_id)] + [live.upload.key]
            for key in [*orphans, f"{prefix}somebody/elses.zip"]:
                await r.direct.start_upload(key, "a.zip")
            # Day-old ones are aborted, these are not.
            janitor = Janitor(r.b.queue, r.b.storage, r.b.config)
            await janitor.abort_orphans()
            assert len(await r.direct.list_uploads() or []) == 6
            await asyncio.sleep(0.05)
            # Two workers at once: every step may be done twice.
            old = Janitor(r.b.queue, r.b.storage, aged(r.b.config, 0.01))
            await asyncio.gather(old.abort_orphans(), old.abort_orphans())
            left = await r.direct.list_uploads()
            assert left is not None
            assert {(upload.key, upload.upload_id) for upload in left if job_id in upload.key} == {
                (live.upload.key, live.upload.upload_id)
            }
            (foreign,) = [upload for upload in left if job_id not in upload.key]
            assert foreign.key == f"{prefix}somebody/elses.zip"
            await r.direct.abort_upload(foreign.key, foreign.upload_id)
            hold.set()
            await r.completed(job_id, *ids)


async def test_uploads_of_a_redis_that_forgot_everything_are_aborted(config: Config) -> None:
    async with rig(config) as r:
        ids = await r.files()
        r.proxy.fail("UploadPart", passes, stalls, stalls)
        async with working(r.b, replace(r.b.config, worker=replace(config.worker, drain_timeout=0.05))):
            job_id = await r.b.export(*ids)
            await r.until_seen("UploadPart", 2)
        job = await r.b.queue.get(job_id)
        assert job is not None
        assert job.upload is not None
        empty = replace(r.b.config, redis=replace(config.redis, prefix=f"{config.redis.prefix}-new"))
        async with bench(empty) as after, working(after, aged(empty)):
            end = time.monotonic() + 10
            while await r.direct.list_uploads():
                assert time.monotonic() < end
                await asyncio.sleep(0.05)


async def test_a_store_that_cannot_list_uploads_is_left_alone_with_one_word(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "delineate.worker.janitor")
    async with rig(config) as r:
        for refusal in (answers(501, "NotImplemented"), answers(405, "MethodNotAllowed")):
            caplog.clear()
            r.proxy.heal()
            r.proxy.fail_while(lambda exchange: exchange.operation == "ListMultipartUploads", refusal)
            janitor = Janitor(r.b.queue, r.b.storage, aged(r.b.config))
            for _ in range(3):
                await janitor.abort_orphans()
            (record,) = [record for record in caplog.records if "cannot list" in record.message]
            assert record.levelname == "INFO"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full disk needs root, to mount a small tmpfs")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a full disk needs a small tmpfs, and it cannot be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("count", [2, 1])
async def test_a_full_disk_fails_the_job_and_a_retry_completes_it_once_there_is_room(
    config: Config, small_disk: Path, tmp_path: Path, count: int
) -> None:
    for bucket in ("files", "archives"):
        (small_disk / bucket).mkdir()
    port = free_port()
    store = ServerProcess(s3_command(small_disk, port), port, tmp_path / "log", s3_environment(ACCESS_KEY, SECRET_KEY))
    store.start()
    try:
        async with rig(config, port, source_key="{file_id}", retries=1) as r:
            ids = await r.files(count, 5_000_000)
            ballast = small_disk / "ballast"
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 3_000_000))
            async with working(r.b):
                job_id = await r.b.export(*ids)
                job = await r.failed(job_id, "storage_unavailable", attempts=3)
                assert job.failure is not None
                assert job.failure.message.startswith("The file store ")
                ballast.unlink()
                await r.b.queue.requeue(job_id)
                await r.completed(job_id, *ids)
    finally:
        store.stop()


def test_the_defaults_wait_for_an_outage_of_a_minute() -> None:
    defaults = load_config({}, CONF)
    assert defaults.worker.job_timeout >= 2 * 60
    assert defaults.storage.orphan_age > 10 * defaults.worker.job_timeout
