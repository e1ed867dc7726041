"""The older endpoints for a single file."""

from __future__ import annotations

import asyncio

from delineate.config import Config
from delineate.job import Lease
from tests.api.running import FAILURE, RunningApi, changed, result, running_api, until


async def claim_next(running: RunningApi) -> Lease:
    await running.queue.register(running.worker)
    async with asyncio.timeout(10):
        while not (leases := await running.queue.claim(running.worker, 1)):
            await asyncio.sleep(0.01)
    return leases[0]


async def test_check_says_whether_a_file_is_there(config: Config) -> None:
    async with running_api(config) as running:
        await running.storage.put_source(70000, b"content", "a.txt")
        reply = await running.fetch("POST", "/v1/download/check", {"file_id": 70000})
        key = config.storage.source_key.format(file_id=70000)
        assert (reply.status, reply.json) == (
            200,
            {"file_id": 70000, "available": True, "s3Key": key, "size": 7},
        )
        reply = await running.fetch("POST", "/v1/download/check", {"file_id": 70001})
        assert reply.json == {"file_id": 70001, "available": False, "s3Key": None, "size": None}


async def test_start_waits_for_the_end(config: Config) -> None:
    async with running_api(config) as running:
        asked = asyncio.create_task(running.fetch("POST", "/v1/download/start", {"file_id": 70000}))
        lease = await claim_next(running)
        await running.report(lease, 50)
        await running.queue.finish(lease, result())
        reply = await asked
        assert reply.status == 200
        body = reply.json
        assert set(body) == {"file_id", "jobId", "status", "downloadUrl", "size", "processingTimeMs", "message"}
        assert (body["file_id"], body["jobId"], body["status"]) == (70000, lease.job.id, "completed")
        assert "X-Amz-Signature" in body["downloadUrl"]
        assert body["size"] == 1234
        assert 0 <= body["processingTimeMs"] < 10_000
        await until(lambda: running.job_events.jobs == 0, "the end of the subscription")


async def test_start_tells_of_failure(config: Config) -> None:
    async with running_api(config) as running:
        asked = asyncio.create_task(running.fetch("POST", "/v1/download/start", {"file_id": 70000}))
        await running.queue.bury(await claim_next(running), FAILURE)
        body = (await asked).json
        assert (body["status"], body["downloadUrl"], body["size"]) == ("failed", None, None)
        assert body["message"] == FAILURE.message


async def test_start_hands_over_to_polling_when_it_takes_long(config: Config) -> None:
    async with running_api(changed(config, "api", request_timeout=0.3)) as running:
        reply = await running.fetch("POST", "/v1/download/start", {"file_id": 70000})
        assert reply.status == 202
        assert reply.headers["Location"] == f"/v1/export/{reply.json['jobId']}"
        assert "Retry-After" in reply.headers
        assert (await running.job(reply.json["jobId"])).status == "queued"


async def test_start_does_not_hold_up_the_end_of_the_process(config: Config) -> None:
    async with running_api(config) as running:
        asked = asyncio.create_task(running.fetch("POST", "/v1/download/start", {"file_id": 70000}))
        await claim_next(running)
        await until(lambda: running.job_events.jobs == 1, "the wait")
        await running.api.drain(running.server)
        assert (await asked).status == 202


async def test_client_that_stops_waiting_is_forgotten_and_its_job_goes_on(config: Config) -> None:
    async with running_api(config) as running:
        asked = asyncio.create_task(running.fetch("POST", "/v1/download/start", {"file_id": 70000}))
        await until(lambda: running.job_events.jobs == 1, "the wait")
        asked.cancel()
        await until(lambda: running.job_events.jobs == 0, "forgetting the client", 3)
        assert (await claim_next(running)).job.file_ids == (70000,)
