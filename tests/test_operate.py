"""`delineate jobs` and `delineate queue`, as an operator types them, on the queue and the store of the tests."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from delineate.config import Config
from delineate.job import ArchiveResult, ErrorClass, Failure, Job, JobStatus, Lease, NewJob, new_job_id
from tests.servers import free_port
from tests.worker.test_worker import Bench, bench, working

FAILURE = Failure(code="files_missing", error_class=ErrorClass.NOT_FOUND, message="One file does not exist: 70000.")


def environment(config: Config, **more: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("DELINEATE")},
        "DELINEATE_ENV": "test",
        "DELINEATE__REDIS__URL": config.redis.url,
        "DELINEATE__REDIS__PREFIX": config.redis.prefix,
        "DELINEATE__STORAGE__ENDPOINT_URL": config.storage.endpoint_url,
        "DELINEATE__STORAGE__ACCESS_KEY_ID": config.storage.access_key_id,
        "DELINEATE__STORAGE__SECRET_ACCESS_KEY": config.storage.secret_access_key,
        **more,
    }


async def delineate(config: Config, *words: str, code: int = 0, **more: str) -> tuple[str, str]:
    """stdout and stderr of a command that ends with `code`."""
    command = [sys.executable, "-m", "delineate", *words]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, env=environment(config, **more), capture_output=True, text=True, timeout=60)
    )
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


async def answer(config: Config, *words: str, code: int = 0) -> Any:
    return json.loads((await delineate(config, *words, "--json", code=code))[0])


async def accepted(b: Bench, user: str = "ann", file_ids: tuple[int, ...] = (70000, 70001)) -> str:
    return (await b.queue.enqueue(NewJob(id=new_job_id(), user=user, file_ids=file_ids))).job.id


async def claimed(b: Bench, user: str = "ann") -> Lease:
    await b.queue.register("w")
    await accepted(b, user)
    (lease,) = await b.queue.claim("w", 1)
    return lease


async def failed(b: Bench, user: str = "ann") -> str:
    lease = await claimed(b, user)
    await b.queue.bury(lease, FAILURE)
    return lease.job.id


async def job(b: Bench, job_id: str) -> Job:
    found = await b.queue.get(job_id)
    assert found is not None
    return found


async def test_list_shows_what_is_in_the_queue(config: Config) -> None:
    async with bench(config) as b:
        assert (await delineate(config, "jobs", "list"))[0].split() == [
            *("JOB", "STATUS", "DONE", "FILES", "TRIES", "AGE", "USER", "MESSAGE")
        ]
        bad, running, waiting = await failed(b), (await claimed(b, "bob")).job.id, await accepted(b)
        text, _ = await delineate(config, "jobs", "list")
        rows = text.splitlines()[1:]
        assert [row.split()[0:2] for row in rows] == [
            [running, "processing"],
            [waiting, "queued"],
            [bad, "failed"],
        ]
        assert rows[2].endswith(FAILURE.message)
        text, rest = await delineate(config, "jobs", "list", "--limit", "1")
        assert len(text.splitlines()) == 2
        assert "2 more" in rest
        found = await answer(config, "jobs", "list", "--status", "failed", "--status", "queued", "--user", "ann")
        assert [entry["jobId"] for entry in found["jobs"]] == [bad, waiting]
        assert found["total"] == 2
        assert found["jobs"][0]["error"] == {
            "code": "files_missing",
            "class": "not_found",
            "message": FAILURE.message,
        }


async def test_show_tells_all_of_one_job(config: Config) -> None:
    async with bench(config) as b:
        lease = await claimed(b)
        await b.queue.finish(lease, ArchiveResult(key="exports/a.zip", size=12, filename="a.zip"))
        shown = await answer(config, "jobs", "show", lease.job.id)
        assert shown["status"] == "completed"
        assert shown["fileIds"] == [70000, 70001]
        assert shown["archive"] == {"key": "exports/a.zip", "size": 12, "skippedFiles": []}
        assert shown["worker"] == "w"
        text, _ = await delineate(config, "jobs", "show", lease.job.id)
        assert "status       completed" in text
        for unknown in (new_job_id(), "nonsense"):
            _, error = await delineate(config, "jobs", "show", unknown, code=1)
            assert unknown in error
            assert error.count("\n") == 1


async def test_dead_letters_are_retried_one_or_all(config: Config) -> None:
    async with bench(config) as b:
        first, second, third = [await failed(b) for _ in range(3)]
        text, _ = await delineate(config, "jobs", "retry", first)
        assert text == f"{first}: queued again\n"
        assert (await job(b, first)).status is JobStatus.QUEUED
        _, error = await delineate(config, "jobs", "retry", first, new_job_id(), second, code=1)
        assert "only failed and cancelled jobs" in error
        assert "there is no job" in error
        assert (await job(b, second)).status is JobStatus.QUEUED
        done = await answer(config, "jobs", "retry", "--all")
        assert done == {"jobs": [third], "refused": []}
        assert (await b.queue.stats()).failed == 0
        assert (await delineate(config, "jobs", "retry", "--all"))[0] == "no such jobs\n"


async def test_jobs_are_cancelled_one_or_all_of_a_caller(config: Config) -> None:
    async with bench(config) as b:
        one, two, others = await accepted(b), await accepted(b), await accepted(b, "bob")
        await delineate(config, "jobs", "cancel", one)
        assert await answer(config, "jobs", "cancel", "--all", "--user", "ann") == {"jobs": [two], "refused": []}
        assert [(await job(b, job_id)).status for job_id in (one, two, others)] == ["cancelled", "cancelled", "queued"]


async def test_purge_forgets_jobs_and_their_archives(config: Config) -> None:
    async with bench(config) as b:
        await b.put(70000, 1000)
        async with working(b):
            done = [await b.ended(await b.export(70000)) for _ in range(2)]
        bad, waiting = await failed(b), await accepted(b)
        keys = [job.result.key for job in done if job.result]
        _, error = await delineate(config, "jobs", "purge", waiting, code=1)
        assert "cancel it first" in error
        await delineate(config, "jobs", "purge", done[0].id)
        assert [await b.storage.stat_archive(key) is None for key in keys] == [True, False]
        assert await b.queue.get(done[0].id) is None
        nothing = await answer(config, "jobs", "purge", "--status", "completed", "--older-than", "1h")
        assert nothing == {"jobs": [], "refused": []}
        purged = await answer(config, "jobs", "purge", "--status", "completed", "--status", "failed")
        assert purged == {"jobs": [done[1].id, bad], "refused": []}
        assert await b.storage.stat_archive(keys[1]) is None
        assert (await b.queue.stats()).failed == 0


async def test_a_paused_queue_starts_nothing_until_it_is_resumed(config: Config) -> None:
    async with bench(config) as b, working(b):
        await b.put(70000, 1000)
        assert "resume" in (await delineate(config, "queue", "pause"))[0]
        job_id = await b.export(70000)
        stats = await answer(config, "queue", "stats")
        assert stats.pop("oldestWaitingSeconds") > 0
        assert stats == {"waiting": 1, "active": 0, "delayed": 0, "failed": 0, "workers": 1, "paused": True}
        text, _ = await delineate(config, "queue", "stats")
        assert "waiting  1 (the oldest for " in text
        assert "paused   yes" in text
        assert (await job(b, job_id)).attempts == 0
        await delineate(config, "queue", "resume")
        assert (await b.ended(job_id)).status is JobStatus.COMPLETED
        assert "paused   no" in (await delineate(config, "queue", "stats"))[0]


async def test_drain_waits_for_running_jobs(config: Config) -> None:
    async with bench(config) as b:
        lease = await claimed(b)
        behind = await accepted(b)
        late = await answer(config, "queue", "drain", "--timeout", "1s", code=1)
        assert late == {"paused": True, "active": 1}
        await b.queue.register("w")
        drained = asyncio.create_task(delineate(config, "queue", "drain", "--timeout", "1m"))
        await asyncio.sleep(1)
        await b.queue.bury(lease, FAILURE)
        text, _ = await drained
        assert "drained" in text
        assert (await job(b, behind)).status is JobStatus.QUEUED
        assert (await b.queue.stats()).paused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("jobs",), "ACTION"),
        (("jobs", "retry"), "name at least one JOB, or use --all"),
        (("jobs", "purge"), "name at least one JOB, or use --status"),
        (("jobs", "purge", "--status", "queued"), "invalid choice"),
        (("jobs", "list", "--limit", "0"), "'0' is not a whole number from 1"),
        (("queue", "drain", "--timeout", "soon"), "'soon' is not a duration"),
    ],
)
async def test_what_makes_no_sense_is_told_with_code_2(config: Config, words: tuple[str, ...], said: str) -> None:
    _, error = await delineate(config, *words, code=2)
    assert said in error


async def test_without_redis_it_is_one_line_and_code_2(config: Config) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    _, error = await delineate(config, "queue", "stats", code=2, DELINEATE__REDIS__URL=nowhere)
    assert error.count("\n") == 1
    assert "Redis is not available" in error
