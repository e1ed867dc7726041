"""Event streams through real proxies: at once, for as long as heartbeats come, and caught up after a cut."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace

from delineate.config import Config
from delineate.storage import open_storage
from tests.api.running import next_event, parse_events, progress, result, until
from tests.chaos.service import Follower
from tests.chaos.service import until as until_true
from tests.chaos.tcp_proxy import TcpProxy
from tests.proxies.fronts import ARGUMENTS, Api, Front, ask, end, ended, front, worker_side
from tests.servers import free_port
from tests.worker.test_worker import content, worker_process

AT_ONCE = 0.5
HEARTBEAT = 0.5  # of beating_api
both = pytest.mark.parametrize("name", list(ARGUMENTS))


# All types, which is what HAProxy compresses when it is not told which.
COMPRESSING = """
frontend compressing
    bind 127.0.0.1:{port}
    compression algo gzip
    default_backend api
"""


async def check_at_once(proxy: Front, config: Config) -> None:
    """Without a heartbeat that could push an event out of a buffer."""
    loop = asyncio.get_running_loop()
    async with worker_side(config) as jobs:
        lease = await jobs.claimed()
        # Large events, which proxies think worth compressing.
        await jobs.queue.progress(lease, replace(progress(10), message="x" * 1000))
        began = loop.time()
        async with proxy.stream(lease.job.id) as events:
            assert (await next_event(events)).data["progress"] == 10
            assert loop.time() - began < AT_ONCE
            for percent in (20, 40, 60):
                began = loop.time()
                await jobs.queue.progress(lease, replace(progress(percent), message="x" * 1000))
                assert (await next_event(events, skip=("retry",))).data["progress"] == percent
                assert loop.time() - began < AT_ONCE
            began = loop.time()
            await jobs.queue.finish(lease, result())
            assert (await next_event(events)).name == "completed"
            assert await ended(events) == []
            assert loop.time() - began < AT_ONCE


async def compresses(proxy: Front, path: str) -> bool:
    async with proxy.client() as client:
        return (await ask(client, "GET", path)).headers.get("Content-Encoding") == "gzip"


async def test_events_arrive_at_once_although_the_proxy_compresses(proxy: Front, shared_config: Config) -> None:
    for path in ("/openapi.json", "/docs", "/style.css", "/app.js"):
        assert await compresses(proxy, path)
    await check_at_once(proxy, shared_config)


async def test_events_arrive_at_once_where_haproxy_compresses_every_type(
    quiet_api: Api, shared_config: Config, tmp_path: Path
) -> None:
    port = free_port()
    with front("haproxy", quiet_api.port, tmp_path, further=COMPRESSING.format(port=port)):
        proxy = Front("haproxy", port)
        assert await compresses(proxy, "/docs")
        await check_at_once(proxy, shared_config)


async def test_events_arrive_at_once_over_http_2(quiet_api: Api, shared_config: Config, tmp_path: Path) -> None:
    """With prior knowledge: HAProxy takes it without TLS."""
    loop = asyncio.get_running_loop()
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        with front("haproxy", quiet_api.port, tmp_path) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/v1/export/{lease.job.id}/progress"
            curl = await asyncio.create_subprocess_exec(
                *("curl", "-sN", "--http2-prior-knowledge", "-w", "%{http_version}", url),
                stdout=asyncio.subprocess.PIPE,
            )
            assert curl.stdout is not None
            await curl.stdout.readuntil(b'"processing"')
            began = loop.time()
            await jobs.report(lease, 20)
            await curl.stdout.readuntil(b'"progress":20,')
            assert loop.time() - began < AT_ONCE
            await jobs.queue.finish(lease, result())
            rest, _ = await curl.communicate()
        assert b"event: completed\n" in rest
        assert rest.endswith(b"\n\n2")


async def test_client_that_leaves_frees_its_stream_at_the_api(
    proxy: Front, quiet_api: Api, shared_config: Config
) -> None:
    """At once, not with the next heartbeat: none comes within the test."""
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        async with proxy.stream(lease.job.id) as events:
            await next_event(events)
            assert await quiet_api.open_streams() == 1

        async def none_open() -> bool:
            return await quiet_api.open_streams() == 0

        await until_true(none_open, "the end of the stream", 5)


@both
async def test_heartbeats_keep_a_silent_stream_through_a_longer_idle_timeout(
    name: str, beating_api: Api, shared_config: Config, tmp_path: Path
) -> None:
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        with front(name, beating_api.port, tmp_path, idle="2s") as proxy:
            async with proxy.stream(lease.job.id) as events:
                await next_event(events)
                began = asyncio.get_running_loop().time()
                while asyncio.get_running_loop().time() - began < 2.5:
                    assert (await next_event(events, skip=())).name == "heartbeat"
                await jobs.report(lease, 20)
                assert (await next_event(events)).data["progress"] == 20


@both
async def test_stream_that_a_shorter_idle_timeout_cuts_is_caught_up(
    name: str, beating_api: Api, shared_config: Config, tmp_path: Path
) -> None:
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        with front(name, beating_api.port, tmp_path, idle="300ms") as proxy:
            began = asyncio.get_running_loop().time()
            async with proxy.stream(lease.job.id) as events:
                seen = await next_event(events)
                assert {event.name for event in await ended(events)} <= {"heartbeat"}
            assert asyncio.get_running_loop().time() - began < HEARTBEAT + 0.3 + AT_ONCE
            # What an EventSource does then: the present state, nothing older, and what happened in between is in it.
            await jobs.report(lease, 20)
            async with proxy.stream(lease.job.id, Last_Event_ID=seen.id) as events:
                event = await next_event(events)
                assert (event.data["progress"], int(event.id) > int(seen.id)) == (20, True)
                await ended(events)
            await jobs.queue.finish(lease, result())
            async with proxy.stream(lease.job.id, Last_Event_ID=event.id) as events:
                last = await next_event(events)
                assert last.name == "completed"
            # Once more it would be told to stay away.
            async with proxy.client() as client:
                path = f"/v1/export/{lease.job.id}/progress"
                assert (await ask(client, "GET", path, Last_Event_ID=last.id)).status == 204


@both
async def test_event_source_behind_a_proxy_that_always_cuts_sees_everything_to_the_end(
    name: str, beating_api: Api, shared_config: Config, tmp_path: Path
) -> None:
    async with worker_side(shared_config) as jobs:
        lease = await jobs.claimed()
        with front(name, beating_api.port, tmp_path, idle="300ms") as proxy:
            async with proxy.client() as client:
                follower = Follower(client, lease.job.id)
                for percent in (20, 40):
                    connections = follower.connections
                    await until(lambda n=connections: follower.connections > n, "the next connection")
                    await jobs.report(lease, percent)
                    await until(lambda p=percent: follower.last and follower.last.data["progress"] == p, f"{percent} %")
                await jobs.queue.finish(lease, result())
                await follower.task
        versions = [int(event.id) for event in follower.events]
        assert versions == sorted(versions)
        assert follower.events[-1].name == "completed"


@pytest.fixture
def cdn(beating_api: Api) -> Iterator[TcpProxy]:
    """Cloudflare in small: it cuts what is silent for 1 s instead of 100 or 120 s, and beats go on every 0.5 s."""
    proxy = TcpProxy(free_port(), beating_api.port)
    proxy.idle_seconds = 1
    proxy.start()
    yield proxy
    proxy.stop()


async def test_cdn_that_cuts_silence_ends_a_long_request_but_not_a_stream(cdn: TcpProxy, shared_config: Config) -> None:
    base = f"http://127.0.0.1:{cdn.port}"
    async with worker_side(shared_config) as jobs, aiohttp.ClientSession(base) as client:
        lease = await jobs.claimed()
        async with client.get(f"/v1/export/{lease.job.id}/progress") as answer:
            events, loop = parse_events(answer), asyncio.get_running_loop()
            await next_event(events)
            began = loop.time()
            # Waits for the end of its job, which nobody works on.
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await client.post("/v1/download/start", json={"file_id": 70000})
            assert 0.9 < loop.time() - began < 2
            while loop.time() - began < 2.5:
                assert (await next_event(events, skip=())).name == "heartbeat"
            await jobs.queue.finish(lease, result())
            assert (await next_event(events)).name == "completed"


async def test_whole_export_through_each_proxy(config: Config, tmp_path: Path) -> None:
    """With a worker process; the archive comes from the store, past the proxy."""
    file = content(70000, 6_000_000)
    api, worker = Api(config, tmp_path), worker_process(config, tmp_path / "worker.log")
    try:
        async with open_storage(config.storage) as storage:
            await storage.put_source(70000, file, "a.bin")
        for name in ARGUMENTS:
            with front(name, api.port, tmp_path) as proxy:
                async with proxy.client() as client, asyncio.timeout(20):
                    job_id = (await ask(client, "POST", "/v1/export", {"file_ids": [70000]})).json["jobId"]
                    follower = Follower(client, job_id)
                    await follower.task
                    assert (follower.events[-1].name, follower.connections) == ("completed", 1)
                    link = (await ask(client, "GET", f"/v1/export/{job_id}/download")).json["downloadUrl"]
                    async with client.get(link) as answer:
                        archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
            assert archive.read("a.bin") == file
    finally:
        end(worker)
        api.stop()
