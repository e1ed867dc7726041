"""The worker on real servers: jobs in, correct archives out, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from delineate.config import Config
from delineate.embedded import redis_command
from delineate.job import Job, JobStatus, NewJob, new_job_id
from delineate.queue import Queue, open_queue
from delineate.queue.progress import open_job_events
from delineate.storage import Storage, open_storage
from delineate.worker.loop import Worker
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port

replace = msgspec.structs.replace


def content(file_id: int, size: int) -> bytes:
    """Bytes that differ for every file and do not repeat, so that a part in the wrong place shows."""
    return hashlib.shake_128(str(file_id).encode()).digest(size)


class Bench:
    def __init__(self, config: Config, queue: Queue, storage: Storage) -> None:
        self.config, self.queue, self.storage = config, queue, storage
        self.files: dict[int, bytes] = {}

    async def put(self, file_id: int, size: int, name: str | None = None) -> int:
        self.files[file_id] = content(file_id, size)
        await self.storage.put_source(file_id, self.files[file_id], name or f"{file_id}.bin")
        return file_id

    async def export(self, *file_ids: int, on_missing: str = "fail") -> str:
        new = NewJob(id=new_job_id(), user="ann", file_ids=file_ids, on_missing=on_missing)  # type: ignore[arg-type]
        return (await self.queue.enqueue(new)).job.id

    async def until(self, job_id: str, condition: Callable[[Job], bool], seconds: float = 30) -> Job:
        end = time.monotonic() + seconds
        while True:
            job = await self.queue.get(job_id)
            assert job is not None
            if condition(job):
                return job
            assert time.monotonic() < end, f"still {job}"
            await asyncio.sleep(0.02)

    async def ended(self, job_id: str, seconds: float = 30) -> Job:
        return await self.until(job_id, lambda job: job.status.is_final, seconds)

    async def download(self, job: Job) -> zipfile.ZipFile:
        assert job.result is not None
        url = await self.storage.presign(job.result.key, job.result.filename, 60)
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())  # noqa: S310
        assert len(body) == job.result.size
        archive = zipfile.ZipFile(io.BytesIO(body))
        assert archive.testzip() is None
        return archive

    async def check(self, job: Job, *file_ids: int) -> None:
        with await self.download(job) as archive:
            for file_id in file_ids:
                assert archive.read(f"{file_id}.bin") == self.files[file_id]


@asynccontextmanager
async def bench(config: Config) -> AsyncIterator[Bench]:
    async with open_queue(config) as queue, open_storage(config.storage) as storage:
        yield Bench(config, queue, storage)


@asynccontextmanager
async def working(b: Bench, config: Config | None = None) -> AsyncIterator[Worker]:
    """A worker in this process, drained at the end."""
    async with open_job_events(b.config) as events:
        worker = Worker(config or b.config, b.queue, b.storage, events)
        stop = asyncio.Event()
        task = asyncio.create_task(worker.run(stop))
        try:
            yield worker
        finally:
            stop.set()
            await task


def worker_process(config: Config, log: Path, command: str = "worker", **environ: str) -> subprocess.Popen[bytes]:
    """`delineate worker` (or another command) as an operator runs it, configured by the environment alone."""
    env = {
        **os.environ,
        "DELINEATE_ENV": "test",
        "DELINEATE__REDIS__URL": config.redis.url,
        "DELINEATE__REDIS__PREFIX": config.redis.prefix,
        "DELINEATE__STORAGE__ENDPOINT_URL": config.storage.endpoint_url,
        "DELINEATE__STORAGE__ACCESS_KEY_ID": config.storage.access_key_id,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": config.storage.secret_access_key,
        "DELINEATE__STORAGE__SOURCE_KEY": config.storage.source_key,
        "DELINEATE__STORAGE__ARCHIVE_PREFIX": config.storage.archive_prefix,
        "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": str(config.processing.simulated_delay.enabled).lower(),
        "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": str(config.processing.simulated_delay.min),
        "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": str(config.processing.simulated_delay.max),
        "DELINEATE__WORKER__DRAIN_TIMEOUT": str(config.worker.drain_timeout),
        **environ,
    }
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, "-m", "delineate", command], env=env, stdout=out, stderr=out)


def slow(config: Config, seconds: float) -> Config:
    """The same, with every job taking at least `seconds`."""
    delay = replace(config.processing.simulated_delay, enabled=True, min=seconds, max=seconds)
    return replace(config, processing=replace(config.processing, simulated_delay=delay))


async def test_files_in_archive_out(config: Config) -> None:
    async with bench(config) as b, working(b):
        ids = [await b.put(70000, 1_000_000), await b.put(70001, 0), await b.put(70002, 20_000_000)]
        job = await b.ended(await b.export(*ids))
        assert (job.status, job.failure) == (JobStatus.COMPLETED, None)
        assert (job.attempts, job.progress.percent, job.progress.current_file) == (1, 100, 3)
        await b.check(job, *ids)


async def test_a_thousand_small_files_arrive(config: Config) -> None:
    async with bench(config) as b, working(b):
        ids = list(await asyncio.gather(*(b.put(70000 + i, 100 + i) for i in range(1000))))
        job = await b.ended(await b.export(*ids))
        await b.check(job, *ids)


async def test_names_come_from_the_store_and_duplicates_are_told_apart(config: Config) -> None:
    async with bench(config) as b, working(b):
        for file_id, name in (
            (70000, "Bericht - März.pdf"),
            (70001, "../../etc/passwd"),
            (70002, "bericht - märz.pdf"),
        ):
            await b.put(file_id, 10, name)
        job = await b.ended(await b.export(70000, 70001, 70002))
        with await b.download(job) as archive:
            names = archive.namelist()
        assert names[0] == "Bericht - März.pdf"
        assert ".." not in names[1]
        assert "/" not in names[1]
        assert names[2] == "bericht - märz (2).pdf"


async def test_missing_files_fail_the_job_at_once_and_name_themselves(config: Config) -> None:
    async with bench(config) as b, working(b):
        job = await b.ended(await b.export(await b.put(70000, 10), 99999))
        assert (job.status, job.attempts) == (JobStatus.FAILED, 1)
        assert job.failure is not None
        assert (job.failure.code, job.failure.error_class) == ("files_missing", "not_found")
        assert "99999" in job.failure.message


async def test_missing_files_can_be_skipped_and_are_listed_in_the_archive(config: Config) -> None:
    async with bench(config) as b, working(b):
        job = await b.ended(await b.export(await b.put(70000, 10), 99998, 99999, on_missing="skip"))
        assert job.status == JobStatus.COMPLETED
        assert job.result is not None
        assert job.result.skipped_file_ids == (99998, 99999)
        assert job.progress.current_file == 3
        with await b.download(job) as archive:
            assert archive.namelist() == ["70000.bin", "delineate-skipped.txt"]
            assert b"99998\n99999\n" in archive.read("delineate-skipped.txt")
        nothing = await b.ended(await b.export(99998, 99999, on_missing="skip"))
        assert nothing.status == JobStatus.FAILED


async def test_an_archive_over_the_limit_is_refused_before_any_work(config: Config) -> None:
    small = replace(config, archive=replace(config.archive, max_bytes=5000))
    async with bench(small) as b, working(b):
        job = await b.ended(await b.export(await b.put(70000, 6000)))
        assert job.failure is not None
        assert (job.status, job.failure.code, job.attempts) == (JobStatus.FAILED, "archive_too_large", 1)


async def test_a_job_that_takes_too_long_is_retried_and_then_fails_with_the_reason(config: Config) -> None:
    config = slow(replace(config, worker=replace(config.worker, job_timeout=0.1)), 5)
    async with bench(config) as b, working(b):
        job = await b.ended(await b.export(await b.put(70000, 10)))
        assert job.failure is not None
        assert (job.status, job.failure.code, job.attempts) == (JobStatus.FAILED, "job_timeout", 3)


async def test_progress_is_published_often_enough_not_too_often_and_never_falls(config: Config) -> None:
    async with bench(config) as b:
        ids = [await b.put(70000 + i, 15_000_000) for i in range(4)]
        job_id = await b.export(*ids)
        async with b.queue._commands.pubsub() as pubsub:
            await pubsub.subscribe(b.queue._keys.channel(job_id))
            events: list[dict[str, object]] = []
            async with working(b):
                while not events or events[-1]["status"] != "completed":
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=5)
                    if message:
                        events.append({**msgspec.json.decode(message["data"]), "at": time.monotonic()})
        percents = [int(str(event["progress"])) for event in events]
        assert percents == sorted(percents)
        assert percents[-1] == 100
        assert 100 not in percents[:-1]
        # A late report may be squeezed in beside claim and finish, hence the two more.
        seconds = float(str(events[-1]["at"])) - float(str(events[0]["at"]))
        assert 3 <= len(events) <= seconds * 10 + 4


async def test_cancelling_a_running_job_frees_its_slot_and_leaves_no_archive(config: Config) -> None:
    config = slow(replace(config, worker=replace(config.worker, concurrency=1)), 20)
    async with bench(config) as b, working(b) as worker:
        job_id = await b.export(await b.put(70000, 10))
        await b.until(job_id, lambda job: job.status == JobStatus.PROCESSING)
        await b.queue.cancel(job_id)
        start = time.monotonic()
        while worker._running:
            await asyncio.sleep(0.01)
        assert time.monotonic() - start < 1
        job = await b.ended(job_id)
        assert job.status == JobStatus.CANCELLED


async def test_a_drain_hands_unfinished_jobs_back_uncharged_and_finishes_short_ones(config: Config) -> None:
    config = replace(config, worker=replace(config.worker, drain_timeout=1))
    async with bench(config) as b:
        await b.put(70000, 10)
        async with working(b, slow(config, 30)):
            long = await b.export(70000)
            await b.until(long, lambda job: job.status == JobStatus.PROCESSING)
        job = await b.queue.get(long)
        assert job is not None
        assert (job.status, job.attempts, job.crashes) == (JobStatus.QUEUED, 0, 0)
        async with working(b, slow(config, 0.5)):
            short = await b.export(70000)
            await b.until(short, lambda job: job.status == JobStatus.PROCESSING)
        job = await b.queue.get(short)
        assert job is not None
        assert (job.status, job.attempts) == (JobStatus.COMPLETED, 1)


async def test_three_jobs_run_at_once_and_the_fourth_waits(config: Config) -> None:
    async with bench(config) as b, working(b, slow(config, 0.8)) as worker:
        await b.put(70000, 10)
        ids = [await b.export(70000) for _ in range(4)]
        await b.until(ids[2], lambda job: job.status == JobStatus.PROCESSING)
        fourth = await b.queue.get(ids[3])
        assert fourth is not None
        assert (fourth.status, len(worker._running)) == (JobStatus.QUEUED, 3)
        for job_id in ids:
            assert (await b.ended(job_id)).status == JobStatus.COMPLETED


async def test_a_cancel_that_nobody_asked_for_is_a_bug_and_no_reason_to_start_over_for_ever(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(config) as b:

        async def probe(file_id: int, probe_bytes: int) -> None:
            raise asyncio.CancelledError

        monkeypatch.setattr(b.storage, "probe", probe)
        async with working(b):
            job = await b.ended(await b.export(70000))
        assert job.failure is not None
        assert (job.status, job.failure.code, job.attempts) == (JobStatus.FAILED, "internal_error", 2)


async def test_a_restart_of_redis_does_not_disturb_a_running_job(config: Config, tmp_path: Path) -> None:
    port = free_port()
    redis = ServerProcess(redis_command(tmp_path, port, "--appendfsync", "always"), port, tmp_path / "log")
    redis.start()
    try:
        config = replace(config, redis=replace(config.redis, url=f"redis://127.0.0.1:{port}/0"))
        async with bench(config) as b, working(b, slow(config, 2)):
            job_id = await b.export(await b.put(70000, 10))
            await b.until(job_id, lambda job: job.status == JobStatus.PROCESSING)
            await asyncio.to_thread(redis.kill)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(redis.start)
            job = await b.ended(job_id)
            assert (job.status, job.attempts, job.crashes) == (JobStatus.COMPLETED, 1, 0)
            again = await b.ended(await b.export(70000))
            assert again.status == JobStatus.COMPLETED
    finally:
        redis.stop()


async def test_a_failover_of_redis_does_not_end_idle_workers(config: Config, tmp_path: Path) -> None:
    """A demoted master answers blocked clients with an error of its own."""
    port = free_port()
    redis = ServerProcess(redis_command(tmp_path, port), port, tmp_path / "log")
    redis.start()
    try:
        config = replace(config, redis=replace(config.redis, url=f"redis://127.0.0.1:{port}/0"))
        config = replace(config, queue=replace(config.queue, claim_wait=5))
        async with bench(config) as b, working(b):
            await asyncio.sleep(0.5)
            await b.queue._commands.replicaof("127.0.0.1", str(free_port()))
            await asyncio.sleep(0.3)
            await b.queue._commands.replicaof("NO", "ONE")
            assert (await b.ended(await b.export(await b.put(70000, 10)))).status == JobStatus.COMPLETED
    finally:
        redis.stop()


async def test_a_killed_workers_job_is_done_by_another(config: Config, tmp_path: Path) -> None:
    async with bench(config) as b:
        await b.put(70000, 10)
        process = worker_process(slow(config, 30), tmp_path / "log")
        try:
            job_id = await b.export(70000)
            await b.until(job_id, lambda job: job.status == JobStatus.PROCESSING)
        finally:
            process.kill()
            process.wait()
        killed = time.monotonic()
        async with working(b):
            job = await b.ended(job_id)
        assert (job.status, job.attempts, job.crashes) == (JobStatus.COMPLETED, 1, 1)
        assert time.monotonic() - killed < 10
        await b.check(job, 70000)


async def test_a_worker_that_slept_through_its_lease_changes_nothing(config: Config, tmp_path: Path) -> None:
    async with bench(config) as b:
        await b.put(70000, 10)
        log = tmp_path / "log"
        process = worker_process(slow(config, 4), log)
        try:
            job_id = await b.export(70000)
            await b.until(job_id, lambda job: job.status == JobStatus.PROCESSING)
            process.send_signal(signal.SIGSTOP)
            async with working(b):
                job = await b.ended(job_id)
            process.send_signal(signal.SIGCONT)
            end = time.monotonic() + 10
            while b"declared dead" not in log.read_bytes():
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            assert await b.queue.get(job_id) == job
            # It goes on under another id.
            assert (await b.ended(await b.export(70000))).status == JobStatus.COMPLETED
        finally:
            process.kill()
            process.wait()


async def test_sigterm_ends_a_worker_process_with_code_0_and_its_job_goes_back(config: Config, tmp_path: Path) -> None:
    config = replace(config, worker=replace(config.worker, drain_timeout=0.5))
    async with bench(config) as b:
        await b.put(70000, 10)
        process = worker_process(slow(config, 30), tmp_path / "log")
        try:
            job_id = await b.export(70000)
            await b.until(job_id, lambda job: job.status == JobStatus.PROCESSING)
            process.terminate()
            assert await asyncio.to_thread(process.wait, 10) == 0
        finally:
            process.kill()
            process.wait()
        job = await b.queue.get(job_id)
        assert job is not None
        assert (job.status, job.attempts) == (JobStatus.QUEUED, 0)
        assert (await b.queue.stats()).workers == 0


@pytest.mark.parametrize("command", ["worker", "api"])
def test_a_redis_that_evicts_is_refused_in_one_line(config: Config, tmp_path: Path, command: str) -> None:
    port = free_port()
    redis = ServerProcess(
        redis_command(tmp_path, port, "--maxmemory-policy", "allkeys-lru"), port, tmp_path / "redis.log"
    )
    redis.start()
    try:
        evicting = replace(config, redis=replace(config.redis, url=f"redis://127.0.0.1:{port}/0"))
        log = tmp_path / "log"
        process = worker_process(
            evicting, log, command=command, DELINEATE__LOG__LEVEL="error", DELINEATE__API__PORT=str(free_port())
        )
        assert process.wait(20) == 2
        (line,) = log.read_text().splitlines()
        assert "allkeys-lru" in line
        assert "noeviction" in line
    finally:
        redis.stop()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DELINEATE__STORAGE__SECRET_ACCESS_KEY", "wrong", "key pair"),
        ("DELINEATE__QUEUE__HEARTBEAT", "soon", "queue.heartbeat"),
    ],
)
def test_a_worker_that_cannot_work_says_why_in_one_line(config: Config, variable: str, value: str, says: str) -> None:
    env = {
        **os.environ,
        "DELINEATE_ENV": "test",
        "DELINEATE__LOG__LEVEL": "error",
        "DELINEATE__REDIS__URL": config.redis.url,
        "DELINEATE__STORAGE__ENDPOINT_URL": config.storage.endpoint_url,
        "DELINEATE__STORAGE__ACCESS_KEY_ID": ACCESS_KEY,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": SECRET_KEY,
        variable: value,
    }
    done = subprocess.run(
        [sys.executable, "-m", "delineate", "worker"], env=env, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert says in said
    assert said.count("\n") == 1
    assert "Traceback" not in said
