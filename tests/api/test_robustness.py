"""What must not take an answer, an event or the memory of an API process away."""

from __future__ import annotations

import asyncio
import json

import pytest
import redis.exceptions
from tornado.netutil import bind_sockets

from delineate.api.app import listening, make_app
from delineate.api.auth import MAX_FORWARDED, make_caller
from delineate.config import Config
from delineate.job import Job, NewJob
from delineate.queue import Enqueued, Queue, open_queue
from delineate.queue.progress import open_job_events
from delineate.storage import open_storage
from tests.api.running import next_event, result, running_api

BODY = json.dumps({"file_ids": [70000]}).encode()
POST = b"POST /v1/export HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)


async def test_a_request_that_begins_during_the_drain_is_answered(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Queue.enqueue

    async def slow(self: Queue, new: NewJob) -> Enqueued:
        enqueued = await real(self, new)
        await asyncio.sleep(0.5)
        return enqueued

    monkeypatch.setattr(Queue, "enqueue", slow)
    async with (
        open_queue(config) as queue,
        open_storage(config.storage) as storage,
        open_job_events(config) as job_events,
        make_app(config, queue, storage, job_events) as api,
    ):
        sockets = bind_sockets(0, "127.0.0.1")
        port = sockets[0].getsockname()[1]
        async with listening(api, sockets):
            (reader_1, writer_1), (reader_2, writer_2) = [
                await asyncio.open_connection("127.0.0.1", port) for _ in range(2)
            ]
            writer_2.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader_2.readuntil(b"}")
            writer_1.write(POST)
            await asyncio.sleep(0.1)

            async def second() -> bytes:
                await asyncio.sleep(0.2)
                writer_2.write(POST)
                return await reader_2.read()

            late = asyncio.create_task(second())
        assert (await reader_1.read()).startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 200" in await late
        for writer in (writer_1, writer_2):
            writer.close()


async def test_a_followed_job_ends_also_after_a_reading_that_nobody_foresaw(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_api(config) as api:
        lease = await api.claimed()
        async with api.stream(lease.job.id) as events:
            await next_event(events)
            real = Queue.get
            failures = iter([redis.exceptions.ResponseError("ERR something nobody foresaw")])

            async def sometimes(self: Queue, job_id: str) -> Job | None:
                for failure in failures:
                    raise failure
                return await real(self, job_id)

            monkeypatch.setattr(Queue, "get", sometimes)
            await api.queue.finish(lease, result())
            async with asyncio.timeout(10):
                while (await next_event(events)).name != "completed":
                    pass
    assert "nobody foresaw" in caplog.text


def test_a_forwarded_header_of_any_length_is_read_from_its_end_and_not_kept() -> None:
    caller = make_caller(["127.0.0.0/8"])
    assert caller("127.0.0.1", "x" * 60_000 + ", 203.0.113.9") == "203.0.113.9"
    assert caller("127.0.0.1", "9" * 60_000) == "127.0.0.1"
    assert caller("203.0.113.1", "198.51.100.7") == "203.0.113.1"
    assert MAX_FORWARDED < 1000
