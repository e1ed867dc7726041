"""Open event streams: memory of each in the API and in nginx, and the CPU that events take.

Every stream follows a job of its own, which is the dearest case: a feed and a
subscription for each. At last ten follow each job, as in a team. Events are published as a worker's progress would be.
What the kernel keeps for sockets is in no process's memory and is not counted.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from benchmarks.scaling.fleet import Fleet, Meter, memory_bytes
from benchmarks.scaling.requests import pause, resume
from delineate.job import JobStatus, NewJob, Stage, new_job_id
from delineate.queue import open_queue
from delineate.queue.keys import Keys
from delineate.queue.progress import JobEvent

EVENTS_PER_SECOND = 200
OPENED_AT_ONCE = 50
OPEN_SECONDS = 60


class Watcher(asyncio.Protocol):
    """One stream: counts events, keeps nothing."""

    events = 0  # of all of them

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.opened = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        Watcher.events += data.count(b"event: progress")
        if not self.opened.done() and b"event: progress" in data:
            self.opened.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("a stream ended before its first event"))


async def measure_streams(fleet: Fleet, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """One row a way and number of streams."""
    service = fleet.one
    ways = {"direct": service.api_port, "nginx": service.http_port}
    rows: list[dict[str, Any]] = []
    await pause((service,))
    async with open_queue(service.config) as queue:
        jobs = [new_job_id() for _ in range(max(counts))]
        for job in jobs:
            await queue.enqueue(NewJob(id=job, user=job, file_ids=(70_000,)))
    # Processes keep the memory they once had, so all is compared with the state before the first stream.
    before = memory(fleet)
    for count in sorted(counts):
        for way, port in ways.items():
            for watchers in (1, 10) if count == max(counts) else (1,):
                found = await measure_some(fleet, port, jobs[: count // watchers], watchers, seconds, before)
                if way == "direct":
                    found["nginx_bytes"] = 0  # what it keeps of the streams before
                rows.append({"way": way, "streams": count, "watchers_of_job": watchers} | found)
    fleet.forget_jobs(service.config.redis.prefix)
    await resume((service,))
    return rows


def memory(fleet: Fleet) -> dict[str, int]:
    return {f"{role}_bytes": memory_bytes(fleet.one.pids(role)) for role in ("api", "nginx")}


async def measure_some(
    fleet: Fleet, port: int, jobs: list[str], watchers_of_job: int, seconds: float, before: dict[str, int]
) -> dict[str, Any]:
    watchers = await watch(port, jobs * watchers_of_job)
    try:
        await asyncio.sleep(1)
        taken = {name: found - before[name] for name, found in memory(fleet).items()}
        meter = Meter(fleet)
        await asyncio.sleep(seconds)
        idle = meter.read()
        meter.start()
        seen, started = Watcher.events, time.monotonic()
        published = await publish(fleet, jobs, seconds)
        await asyncio.sleep(0.2)
        took, arrived = time.monotonic() - started, Watcher.events - seen
        busy = meter.read()
    finally:
        for watcher in watchers:
            if watcher.transport is not None:
                watcher.transport.abort()
    await asyncio.sleep(1)
    return {
        **taken,
        "lost": published * watchers_of_job - arrived,
        "api_idle_percent": 100 * idle["api"] / seconds,
        "nginx_idle_percent": 100 * idle["nginx"] / seconds,
        "api_percent": 100 * busy["api"] / took,
        "nginx_percent": 100 * busy["nginx"] / took,
    }


async def watch(port: int, jobs: list[str]) -> list[Watcher]:
    loop = asyncio.get_running_loop()
    watchers: list[Watcher] = []
    for start in range(0, len(jobs), OPENED_AT_ONCE):
        some = []
        for job in jobs[start : start + OPENED_AT_ONCE]:
            request = f"GET /v1/export/{job}/progress HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
            watcher = Watcher(request)
            await loop.create_connection(lambda made=watcher: made, "127.0.0.1", port)  # type: ignore[misc]
            some.append(watcher)
        async with asyncio.timeout(OPEN_SECONDS):
            await asyncio.gather(*(watcher.opened for watcher in some))
        watchers += some
    return watchers


async def publish(fleet: Fleet, jobs: list[str], seconds: float) -> int:
    """Events published, one job after the other, evenly over `seconds`."""
    keys = Keys(fleet.one.config.redis.prefix)
    count = round(seconds * EVENTS_PER_SECOND)
    started = time.monotonic()
    for number in range(count):
        await asyncio.sleep(max(0.0, started + number / EVENTS_PER_SECOND - time.monotonic()))
        now = round(time.time() * 1000)
        event = JobEvent(
            version=now * 1000 + number,
            status=JobStatus.PROCESSING,
            progress=number % 100,
            current_file=1,
            total_files=1,
            stage=Stage.PACKING,
            message="Packing",
            attempts=1,
            bytes_done=number,
            bytes_total=count,
            updated_at=now,
        )
        fleet.redis.publish(keys.channel(jobs[number % len(jobs)]), msgspec.json.encode(event))
    return count
