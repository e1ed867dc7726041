"""More work than the service takes: it says so, its memory stays, and nobody pays for another user's queue."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec
import pytest

from delineate.config import Config
from delineate.job import Job, JobStatus, NewJob, new_job_id
from delineate.queue.connection import connect
from tests.api.test_serve import api_process, environment
from tests.servers import free_port
from tests.worker.test_worker import Bench, bench, slow, working

replace = msgspec.structs.replace
JOB_SECONDS = 1.0


async def enqueued(b: Bench, user: str, count: int) -> list[str]:
    made = [NewJob(id=new_job_id(), user=user, file_ids=(70000,)) for _ in range(count)]
    for new in made:
        await b.queue.enqueue(new)
    return [new.id for new in made]


@pytest.mark.parametrize("slots", [2, 6])
async def test_500_queued_jobs_delay_nobody_elses_first_job_by_more_than_a_running_job(
    config: Config, slots: int
) -> None:
    config = slow(replace(config, worker=replace(config.worker, concurrency=slots)), JOB_SECONDS)
    async with bench(config) as b:
        await b.put(70000, 100)
        crowd = await enqueued(b, "crowd", 500)
        async with working(b):
            await b.until(crowd[slots - 1], lambda job: job.attempt_started_at is not None)
            singles = []
            for number in range(4):
                (job_id,) = await enqueued(b, f"single{number}", 1)
                singles.append(await b.until(job_id, lambda job: job.status is JobStatus.COMPLETED))
        jobs = [await b.queue.get(job_id) for job_id in crowd]
        started = [job for job in jobs if job is not None and job.started_at]
        order = [job.id for job in sorted(started, key=_started)]
        assert order == crowd[: len(order)], "first in, first out within a user"
        for single in singles:
            ran = [job.completed_at or 0 for job in (*started, *singles) if (job.started_at or 0) <= single.created_at]
            assert (single.started_at or 0) < max(ran) + 0.3, "it waited for more than the jobs that ran already"


def _started(job: Job) -> float:
    # Jobs claimed by one call share their millisecond; their tokens are in order.
    return job.token


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


@pytest.mark.timeout(seconds=180)
async def test_a_flood_is_refused_with_a_time_to_come_back_and_no_memory_grows(config: Config) -> None:
    port = free_port()
    env = environment(
        config,
        port,
        DELINEATE__LOG__LEVEL="info",
        DELINEATE__QUEUE__MAX_WAITING="100",
        DELINEATE__QUEUE__MAX_WAITING_OF_USER="40",
    )
    answers: Counter[tuple[int, str]] = Counter()
    async with (
        api_process(env, port) as process,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", cookie_jar=aiohttp.DummyCookieJar()) as http,
        connect(config.redis) as redis,
        bench(config) as b,
    ):

        async def post(cookie: str) -> str:
            body = {"file_ids": [70000]}
            async with http.post("/v1/export", json=body, headers={"Cookie": cookie}) as answer:
                document = await answer.json()
                answers[answer.status, document.get("code", "")] += 1
                if answer.status != 200:
                    assert int(answer.headers["Retry-After"]) > 0
                return answer.headers.get("Set-Cookie", cookie).split(";")[0]

        mine = await post("")
        for _ in range(44):
            await post(mine)
        assert answers == {(200, ""): 40, (429, "too_many_jobs"): 5}

        async def flood(requests: int) -> None:
            async def some() -> None:
                for turn in range(requests // 20):
                    await post(mine if turn % 2 else "")

            await asyncio.gather(*(some() for _ in range(20)))

        await flood(2000)
        memory, stored = resident_bytes(process.pid), (await redis.info("memory"))["used_memory"]
        start = time.monotonic()
        await flood(6000)
        print(f"{6000 / (time.monotonic() - start):.0f} refusals/s", dict(answers))
        assert resident_bytes(process.pid) - memory < 4_000_000
        assert (await redis.info("memory"))["used_memory"] - stored < 500_000
        assert answers[200, ""] == (await b.queue.stats()).waiting == 100
        assert answers[503, "queue_full"] > 1000
        assert {status for status, _ in answers} == {200, 429, 503}
        assert sum(answers.values()) == 8045
