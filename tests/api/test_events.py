"""Live progress: the promises of a stream, from its first event to the one that ends it."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import AsyncExitStack
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from delineate.api.feeds import REREADS_AT_ONCE
from delineate.config import Config
from delineate.job import Job
from delineate.queue.connection import connect
from delineate.queue.keys import Keys
from tests.api.running import (
    FAILURE,
    RunningApi,
    changed,
    next_event,
    parse_events,
    progress,
    result,
    running_api,
    until,
)


async def kill_pubsub(config: Config) -> None:
    client: Redis = connect(config.redis)
    try:
        await client.client_kill_filter(_type="pubsub")
    finally:
        await client.aclose()


def streams(running: RunningApi) -> int:
    return len(running.api.services.streams)


@pytest.mark.parametrize("path", ["/v1/export/{}/progress", "/v1/download/subscribe/{}"])
async def test_stream_shows_the_present_then_every_change_then_ends(config: Config, path: str) -> None:
    async with running_api(config) as running:
        lease = await running.claimed()
        await running.report(lease, 10, 100)
        async with running.http.get(path.format(lease.job.id)) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert answer.headers["Cache-Control"] == "no-cache, no-transform"
            assert answer.headers["X-Accel-Buffering"] == "no"
            for name in ("X-Request-ID", "RateLimit-Limit", "X-Frame-Options", "Strict-Transport-Security"):
                assert name in answer.headers
            events = parse_events(answer)
            assert (await next_event(events, skip=())).name == "retry"
            first = await next_event(events)
            assert first.name == "progress"
            assert first.id == str((await running.job(lease.job.id)).version)
            assert set(first.data) == {
                *("jobId", "status", "progress", "currentFile", "totalFiles", "stage", "message", "attempts"),
                *("bytesDone", "bytesTotal", "updatedAt"),
            }
            assert (first.data["status"], first.data["progress"]) == ("processing", 10)
            versions = [int(first.id)]
            for percent in (20, 30, 99):
                await running.report(lease, percent)
                event = await next_event(events)
                assert (event.name, event.data["progress"]) == ("progress", percent)
                versions.append(int(event.id))
            assert versions == sorted(set(versions))
            await running.queue.finish(lease, result())
            last = await next_event(events)
            assert last.name == "completed"
            assert last.data["progress"] == 100
            assert "X-Amz-Signature" in last.data["downloadUrl"]
            assert last.data["filename"] == "export.zip"
            assert last.data["size"] == 1234
            assert last.data["expiresAt"].endswith("Z")
            assert [event async for event in events] == []
        await until(lambda: streams(running) == 0 and running.job_events.jobs == 0, "the end of the subscription")


async def test_ended_jobs_get_their_final_event_at_once(config: Config) -> None:
    async with running_api(config) as running:
        for job, name in (
            (await running.completed(), "completed"),
            (await running.failed(), "failed"),
            (await running.cancelled(), "cancelled"),
        ):
            async with running.stream(job.id) as events:
                found = [event async for event in events if event.name != "retry"]
            assert [event.name for event in found] == [name]
            assert found[0].data["jobId"] == job.id
            if name == "failed":
                assert found[0].data["error"] == {"code": FAILURE.code, "message": FAILURE.message}
            # Seen already: 204 tells an EventSource to stop.
            path = f"/v1/export/{job.id}/progress"
            assert (await running.fetch("GET", path, Last_Event_ID=found[0].id)).status == 204
            for other in ("0", "nonsense", str(int(found[0].id) + 1)):
                async with running.stream(job.id, Last_Event_ID=other) as events:
                    assert (await next_event(events)).name == name
        assert running.job_events.jobs == 0


async def test_cancel_and_failure_reach_the_stream(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        async with running.stream(job.id) as events:
            assert (await next_event(events)).data["status"] == "queued"
            await running.queue.cancel(job.id)
            assert (await next_event(events)).name == "cancelled"
        lease = await running.claimed()
        async with running.stream(lease.job.id) as events:
            await next_event(events)
            await running.queue.retry(lease, FAILURE, 60)
            assert (await next_event(events)).data["status"] == "queued"


async def test_reconnect_shows_nothing_older(config: Config) -> None:
    async with running_api(config) as running:
        lease = await running.claimed()
        async with running.stream(lease.job.id) as events:
            seen = await next_event(events)
        await running.report(lease, 50)
        async with running.stream(lease.job.id, Last_Event_ID=seen.id) as events:
            event = await next_event(events)
            assert event.data["progress"] == 50
            assert int(event.id) > int(seen.id)


async def test_many_streams_of_one_job_share_a_subscription(config: Config) -> None:
    async with running_api(config) as running:
        lease = await running.claimed()

        async def follow() -> list[str]:
            async with running.stream(lease.job.id) as events:
                return [event.name async for event in events if event.name not in ("retry", "heartbeat")]

        followers = [asyncio.create_task(follow()) for _ in range(30)]
        await until(lambda: streams(running) == 30, "all streams")
        assert running.job_events.jobs == 1
        await running.report(lease, 50)
        await running.queue.finish(lease, result())
        for names in await asyncio.gather(*followers):
            assert names[0] == "progress"
            assert names[-1] == "completed"


async def test_idle_stream_gets_heartbeats_and_a_clean_end(config: Config) -> None:
    quick = changed(config, "sse", heartbeat=0.1, max_duration=0.7, retry=1.5)
    async with running_api(quick) as running:
        job = await running.queued()
        async with running.stream(job.id) as events:
            found = [event async for event in events]
        names = [event.name for event in found]
        assert names[:2] == ["retry", "progress"]
        assert names.count("heartbeat") >= 3
        assert names[-1] == "retry"
        assert found[0].data == 1500
        assert 750 <= found[-1].data <= 2250


async def test_gone_client_is_forgotten_at_once(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        async with running.stream(job.id) as events:
            await next_event(events)
            assert streams(running) == 1
        await until(lambda: streams(running) == 0 and running.job_events.jobs == 0, "forgetting the client", 2)


async def test_reset_connection_is_forgotten_at_once(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"GET /v1/export/{job.id}/progress HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.readuntil(b"event: progress")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await until(lambda: streams(running) == 0, "forgetting the client", 2)


async def test_client_that_leaves_before_the_answer_costs_nothing(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(f"GET /v1/export/{job.id}/progress HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await writer.drain()
            writer.transport.abort()
        async with running.stream(job.id) as events:
            await next_event(events)
        await until(lambda: streams(running) == 0 and running.job_events.jobs == 0, "forgetting the clients", 3)


def streams_ended(reason: str) -> float:
    return REGISTRY.get_sample_value("sse_streams_ended_total", {"reason": reason}) or 0.0


async def test_reader_that_stops_reading_is_dropped_and_others_are_not(config: Config) -> None:
    async with running_api(changed(config, "sse", heartbeat=0.2, max_buffer_bytes=4096)) as running:
        lease = await running.claimed()
        dropped = streams_ended("slow_reader")
        with socket.socket() as sleepy:
            sleepy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sleepy.connect(("127.0.0.1", running.port))
            sleepy.sendall(f"GET /v1/export/{lease.job.id}/progress HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            async with running.stream(lease.job.id) as events:
                await next_event(events)
                await until(lambda: streams(running) == 2, "both streams")

                async def report() -> None:
                    for step in range(400):
                        await running.queue.progress(lease, progress(step // 5, step))

                reporting = asyncio.create_task(report())
                last = 0
                while last < 399:
                    last = (await next_event(events)).data["bytesDone"]
                await reporting
                await until(lambda: streams(running) == 1, "dropping the sleeper", 5)
                assert streams_ended("slow_reader") == dropped + 1


async def test_slow_reader_gets_the_newest_state_instead_of_a_backlog(config: Config) -> None:
    async with running_api(changed(config, "sse", max_buffer_bytes=4096)) as running:
        lease = await running.claimed()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
        writer.write(f"GET /v1/export/{lease.job.id}/progress HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: streams(running) == 1, "the stream")
        for step in range(400):
            await running.queue.progress(lease, progress(step // 5, step))
        await running.queue.finish(lease, result())
        text = (await asyncio.wait_for(reader.read(), 10)).decode()
        writer.close()
        assert text.count("event: progress") < 300
        assert text.count("event: completed") == 1
        ids = [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")]
        assert ids == sorted(set(ids))


async def test_lost_pubsub_connection_comes_back_and_nothing_is_missed(config: Config) -> None:
    async with running_api(config) as running:
        lease, ending = await running.claimed(), await running.claimed()
        async with running.stream(lease.job.id) as events, running.stream(ending.job.id) as ends:
            await next_event(events)
            await next_event(ends)
            for percent in (20, 40, 60):
                await kill_pubsub(config)
                # Published while nobody listens, most likely: only reading again brings it.
                await running.report(lease, percent)
                seen = 0
                while seen < percent:
                    seen = (await next_event(events)).data["progress"]
            await kill_pubsub(config)
            await running.queue.finish(ending, result())
            assert (await next_event(ends)).name == "completed"


@pytest.mark.parametrize("lost", [1, 5])
async def test_a_redis_that_forgot_the_last_reports_does_not_silence_a_stream(config: Config, lost: int) -> None:
    """A failover takes what the replica had not got yet, a power cut the last second; versions then come again."""
    async with running_api(config) as running, connect(config.redis) as redis:
        lease = await running.claimed()
        key = Keys(config.redis.prefix).job(lease.job.id)
        async with running.stream(lease.job.id) as events:
            await next_event(events)
            saved = await raw_dump(config, key)
            for percent in range(10, 10 + lost):
                await running.report(lease, percent)
            while (await next_event(events)).data["progress"] != 9 + lost:
                pass
            await redis.restore(key, 0, saved, replace=True)
            await kill_pubsub(config)
            feed = running.api.services.feeds._feeds[lease.job.id]
            await until(lambda: feed.version == lease.job.version, "second look at the job")
            await running.queue.finish(lease, result())
            assert [event.name async for event in events][-1] == "completed"


async def raw_dump(config: Config, key: str) -> bytes:
    async with Redis.from_url(config.redis.url, protocol=2) as redis:
        return cast(bytes, await redis.dump(key))


async def test_head_of_a_stream_opens_none(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        reply = await running.fetch("HEAD", f"/v1/export/{job.id}/progress")
        assert (reply.status, reply.headers["Content-Type"]) == (200, "text/event-stream")
        assert running.job_events.jobs == 0


async def test_drain_ends_streams_cleanly(config: Config) -> None:
    async with running_api(config) as running:
        job = await running.queued()
        async with running.stream(job.id) as events:
            await next_event(events)
            await running.api.drain(running.server)
            names = [event.name async for event in events]
        assert names == ["retry"]
        await until(lambda: streams(running) == 0, "the end of the stream")


async def test_stream_ends_with_its_job_although_redis_forgot_its_last_seconds(config: Config) -> None:
    """As after a failover to a replica that lagged and whose clock is behind: older versions come once more."""
    async with running_api(config) as running, connect(config.redis) as redis:
        lease = await running.claimed()
        key = Keys(config.redis.prefix).job(lease.job.id)
        async with running.stream(lease.job.id) as events:
            await next_event(events)
            remembered: dict[Any, Any] = {name: str(value) for name, value in (await redis.hgetall(key)).items()}
            await redis.hincrby(key, "version", 60_000)
            await running.report(lease, 50)
            shown = await next_event(events)
            assert shown.data["progress"] == 50
            await redis.hset(key, mapping=remembered)
            await kill_pubsub(config)
            await running.queue.finish(lease, result())
            last = await next_event(events)
            while last.name == "progress":
                last = await next_event(events)
            assert last.name == "completed"
            assert int(last.id) < int(shown.id)


async def test_streams_look_again_a_few_at_a_time(config: Config) -> None:
    """When Redis is back, those who ask for something are not behind everybody who watches."""
    async with running_api(config) as running, AsyncExitStack() as stack:
        feeds = [await running.api.services.feeds.join((await running.queued()).id) for _ in range(60)]
        for feed in feeds:
            stack.callback(running.api.services.feeds.leave, feed)
        get, reading, most, looked = running.queue.get, 0, 0, 0

        async def counting(job_id: str) -> Job | None:
            nonlocal reading, most, looked
            reading += 1
            most = max(most, reading)
            try:
                return await get(job_id)
            finally:
                reading -= 1
                looked += 1

        running.queue.get = counting  # type: ignore[method-assign]
        await kill_pubsub(config)
        await until(lambda: looked == len(feeds), "a look at every job")
        assert most <= REREADS_AT_ONCE
