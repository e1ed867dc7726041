"""Cancelling, wherever the job is: it takes effect within a second, frees the slot, aborts the upload, and is final."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from delineate.config import Config
from delineate.errors import JobFinished
from delineate.job import Job, JobStatus
from delineate.queue.progress import JobEvent, open_job_events
from delineate.worker.loop import Worker
from tests.storage.proxy import Fault, FaultyProxy, answers, passes, stalls
from tests.worker.test_worker import Bench, bench, slow, working

replace = msgspec.structs.replace
LARGE = 12_000_000


@asynccontextmanager
async def behind_proxy(config: Config, **worker: object) -> AsyncIterator[tuple[FaultyProxy, Bench, Worker]]:
    """A worker whose heartbeat is far too slow to be what tells it of a cancel."""
    port = int(config.storage.endpoint_url.rpartition(":")[2])
    async with FaultyProxy(port) as proxy:
        config = replace(
            config,
            storage=replace(config.storage, endpoint_url=f"http://127.0.0.1:{proxy.port}"),
            archive=replace(config.archive, part_bytes=5_242_880),
            worker=replace(config.worker, concurrency=1, **worker),
            queue=replace(config.queue, heartbeat=30, dead_after=90),
        )
        async with bench(config) as b, working(b) as made:
            yield proxy, b, made


async def cancelled_within_a_second(b: Bench, worker: Worker, job_id: str) -> None:
    start = time.monotonic()
    job = await b.queue.cancel(job_id)
    assert job.status is JobStatus.CANCELLED
    while worker._running:
        await asyncio.sleep(0.01)
        assert time.monotonic() - start < 1, "the slot is not free yet"


async def nothing_is_left(b: Bench, job: Job) -> None:
    end = time.monotonic() + 10
    while await b.queue.abandoned_uploads(9):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    if job.upload is not None:
        assert await b.storage.list_parts(job.upload.key, job.upload.upload_id) is None
        assert await b.storage.stat_archive(job.upload.key) is None
    stats = await b.queue.stats()
    assert (stats.waiting, stats.active, stats.delayed, stats.failed) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("method", "faults", "reached"),
    [
        pytest.param("GET", [stalls] * 20, "GET", id="looking up the files"),
        pytest.param("POST", [stalls], "POST", id="beginning the upload"),
        pytest.param("GET", [passes, stalls], "GET", id="reading a file"),
        pytest.param("PUT", [stalls] * 3, "PUT", id="sending a part"),
        pytest.param("POST", [passes, stalls], "POST", id="putting the archive together"),
    ],
)
async def test_cancel_in_every_phase_of_an_attempt(
    config: Config, method: str, faults: list[Fault], reached: str
) -> None:
    async with behind_proxy(config) as (proxy, b, worker):
        file_id = await b.put(70000, LARGE)
        before = len(proxy.seen(reached))
        proxy.fail(method, *faults)
        job_id = await b.export(file_id)
        needed = before + faults.index(stalls) + 1
        end = time.monotonic() + 20
        while len(proxy.seen(reached)) < needed:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        running = await b.until(job_id, lambda job: job.status is JobStatus.PROCESSING)
        await cancelled_within_a_second(b, worker, job_id)
        await nothing_is_left(b, running)
        # The slot serves the next one.
        proxy._faults.clear()
        await b.check(await b.ended(await b.export(file_id)), file_id)


async def test_cancel_before_packing_and_between_attempts(config: Config) -> None:
    async with behind_proxy(slow(config, 20)) as (_, b, worker):
        first, second = await b.export(70000), await b.export(70000)
        running = await b.until(first, lambda job: job.status is JobStatus.PROCESSING)
        await b.queue.cancel(second)
        await cancelled_within_a_second(b, worker, first)
        await nothing_is_left(b, running)
        assert (await b.ended(second)).attempts == 0


async def test_a_delayed_job_that_is_cancelled_never_runs_again(config: Config) -> None:
    config = replace(config, queue=replace(config.queue, backoff=0.5), storage=replace(config.storage, retries=0))
    async with behind_proxy(config) as (proxy, b, _):
        file_id = await b.put(70000, LARGE)
        proxy.fail("PUT", *[answers(503, "SlowDown")] * 20)
        job_id = await b.export(file_id)
        delayed = await b.until(job_id, lambda job: job.due_at is not None)
        assert (await b.queue.cancel(job_id)).status is JobStatus.CANCELLED
        await asyncio.sleep(1)
        job = await b.ended(job_id)
        assert (job.status, job.attempts) == (JobStatus.CANCELLED, 1)
        await nothing_is_left(b, delayed)


@pytest.mark.timeout(seconds=180)
async def test_cancel_against_finish_has_one_winner_that_everyone_sees(config: Config) -> None:
    dice = random.Random(3)
    wins = {JobStatus.COMPLETED: 0, JobStatus.CANCELLED: 0}
    async with bench(config) as b, working(b), open_job_events(config) as events:
        file_id = await b.put(70000, 20_000)
        for turn in range(80):
            heard: list[JobEvent | None] = []
            job_id = await b.export(file_id)
            hear = heard.append  # one object: a bound method is made anew each time
            await events.subscribe(job_id, hear)
            await asyncio.sleep(dice.uniform(0, 0.02) if turn % 2 else 0)
            if turn % 2 == 0:
                # As near to the end as can be: when it is putting the last bytes away.
                await b.until(job_id, lambda job: job.progress.percent > 0 or job.status.is_final)
            try:
                told = (await b.queue.cancel(job_id)).status
            except JobFinished:
                told = JobStatus.COMPLETED
            await asyncio.sleep(0.05)  # a finish that was on its way
            job = await b.ended(job_id)
            assert job.status is told
            finals = [event.status for event in heard if event is not None and event.status.is_final]
            assert finals == [told]
            assert (job.result is not None) == (told is JobStatus.COMPLETED)
            wins[told] += 1
            events.unsubscribe(job_id, hear)
        assert (await b.queue.stats()).active == 0
    assert all(wins.values()), wins
