"""Callers of a service, and what goes wrong while they call: once each, so that every metric has something to count."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp

from tests.api.running import parse_events
from tests.nginx.test_serve import Serve
from tests.storage.proxy import Exchange, FaultyProxy, answers, passes

SMALL, MIDDLE, LARGE, SLOW, MISSING = 70_000, 70_001, 70_002, 70_003, 70_404
# The large one takes three parts; the slow one comes with the first request for it.
FILES = {SMALL: 1_000, MIDDLE: 300_000, LARGE: 12_000_000, SLOW: 1_000}
# Each of these may send 100 requests a minute; the last sends more.
CALLERS = [f"127.0.0.{number}" for number in range(100, 200)]
IMPATIENT = "127.0.0.99"
ENDED = ("completed", "failed", "cancelled")
ENVIRON = {
    "DELINEATE_WORKER_PROCESSES": "2",
    "DELINEATE__RATE_LIMIT__ENABLED": "true",
    "DELINEATE__QUEUE__BACKOFF": "1",
    "DELINEATE__STORAGE__RETRIES": "0",
    "DELINEATE__STORAGE__OPERATION_TIMEOUT": "120",
    "DELINEATE__ARCHIVE__PART_BYTES": "5242880",
    "DELINEATE__WORKER__CONCURRENCY": "8",
    "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
}


class Pace(NamedTuple):
    """How long, how many jobs a second, how long each takes, and how long the store takes for the slow file."""

    seconds: float
    jobs_per_second: float
    job_seconds: tuple[float, float]
    slow_seconds: float
    scrape_seconds: int

    @property
    def environ(self) -> dict[str, str]:
        least, most = self.job_seconds
        delay = "DELINEATE__PROCESSING__SIMULATED_DELAY__"
        return ENVIRON | {f"{delay}MIN": str(least), f"{delay}MAX": str(most)}


class Traffic:
    """`run` returns when every job that was accepted has ended, and says when the last one was asked for."""

    def __init__(self, serve: Serve, proxy: FaultyProxy, pace: Pace) -> None:
        self._serve, self._proxy, self._pace = serve, proxy, pace
        self._callers = itertools.cycle(CALLERS)

    async def run(self) -> float:
        stop = asyncio.Event()
        seconds, started = self._pace.seconds, time.monotonic()
        self._calm()
        async with asyncio.TaskGroup() as jobs:
            jobs.create_task(self._steady(jobs, stop))
            await asyncio.sleep(seconds / 8)
            self._crowd(jobs)
            for incident in (self._impatient, self._hiccup, self._outage, self._crash):
                await asyncio.sleep(seconds / 8)
                await incident()
            await asyncio.sleep(max(0, started + seconds - time.monotonic()))
            stop.set()
            return time.time()  # of now; the group waits for its jobs then

    def _calm(self) -> None:
        """The store as it mostly is: well, and slow with one file."""

        async def slowly(exchange: Exchange) -> None:
            await asyncio.sleep(self._pace.slow_seconds)
            await passes(exchange)

        self._proxy.heal()
        self._proxy.fail_while(lambda exchange: exchange.target.endswith(f"/{SLOW}"), slowly)

    async def _steady(self, jobs: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        """Jobs of every fate, whatever else happens."""
        often = (self._downloaded, self._watched, self._downloaded, self._watched, self._started)
        seldom = (self._hasty, self._missing, self._cancelled, self._slow, self._hasty, self._slow)
        for fate in itertools.cycle(fate for one in seldom for fate in (*often, one)):
            if stop.is_set():
                return
            jobs.create_task(fate())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1 / self._pace.jobs_per_second)

    def _crowd(self, jobs: asyncio.TaskGroup) -> None:
        """More jobs at once than the workers take."""
        for _ in range(40):
            jobs.create_task(self._watched())

    async def _impatient(self) -> None:
        """More requests than one caller may send, also if one minute ends and another begins meanwhile."""
        async with self._caller(IMPATIENT) as client:
            for _ in range(210):
                await self._ask(client, "GET", "/v1/exports")

    async def _hiccup(self) -> None:
        """The store refuses some archives and answers everything else: their jobs are tried again."""
        self._proxy.fail("PutObject", *[answers(500)] * 3)

    async def _outage(self) -> None:
        """The store is away: who asks about files is told so, and jobs wait for it."""
        self._proxy.fail_while(lambda _: True, answers(503, "SlowDown"))
        async with self._caller() as client:
            for _ in range(6):
                await self._ask(client, "POST", "/v1/download/check", {"file_id": SMALL})
                await asyncio.sleep(0.25)
        self._calm()

    async def _crash(self) -> None:
        """Every worker is killed while the second of three parts is on its way."""
        second = asyncio.Event()

        async def held(exchange: Exchange) -> None:
            second.set()
            await asyncio.sleep(2)  # by then nobody waits for the answer
            await passes(exchange)

        self._proxy.fail_while(lambda exchange: "partNumber=2" in exchange.target, held)
        async with self._caller() as client:
            job = await self._export(client, LARGE)
            async with asyncio.timeout(60):
                await second.wait()
            for pid in self._workers():
                os.kill(pid, signal.SIGKILL)
            self._calm()
            await self._ended(client, job)

    async def _downloaded(self) -> None:
        async with self._caller() as client:
            job = await self._export(client, SMALL, MIDDLE)
            await self._ended(client, job)
            await self._ask(client, "GET", f"/v1/export/{job}/download")

    async def _hasty(self) -> None:
        """Asks for the link before there is one."""
        async with self._caller() as client:
            job = await self._export(client, SMALL, MIDDLE)
            await self._ask(client, "GET", f"/v1/export/{job}/download")

    async def _watched(self) -> None:
        async with self._caller() as client:
            job = await self._export(client, SMALL, MIDDLE)
            async with client.get(f"/v1/export/{job}/progress") as answer:
                async for _ in parse_events(answer):
                    pass

    async def _started(self) -> None:
        async with self._caller() as client:
            await self._ask(client, "POST", "/v1/download/start", {"file_id": MIDDLE})

    async def _slow(self) -> None:
        async with self._caller() as client:
            await self._ended(client, await self._export(client, SLOW))

    async def _missing(self) -> None:
        async with self._caller() as client:
            await self._ended(client, await self._export(client, MISSING))

    async def _cancelled(self) -> None:
        async with self._caller() as client:
            job = await self._export(client, SMALL, MIDDLE)
            await self._ask(client, "DELETE", f"/v1/export/{job}")

    @asynccontextmanager
    async def _caller(self, address: str = "") -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.TCPConnector(local_addr=(address or next(self._callers), 0))
        jar = aiohttp.DummyCookieJar()
        base = f"http://127.0.0.1:{self._serve.port}"
        async with aiohttp.ClientSession(base, cookie_jar=jar, connector=connector) as client:
            yield client

    @staticmethod
    async def _ask(client: aiohttp.ClientSession, method: str, path: str, body: object = None) -> Any:
        async with client.request(method, path, json=body) as answer:
            return await answer.json()

    async def _export(self, client: aiohttp.ClientSession, *file_ids: int) -> str:
        return str((await self._ask(client, "POST", "/v1/export", {"file_ids": file_ids}))["jobId"])

    async def _ended(self, client: aiohttp.ClientSession, job: str) -> None:
        async with asyncio.timeout(300):
            # While the queue cannot be asked, the answer has no status.
            while (await self._ask(client, "GET", f"/v1/export/{job}")).get("status") not in ENDED:
                await asyncio.sleep(1)

    def _workers(self) -> list[int]:
        address = f"http://127.0.0.1:{self._serve.internal_port}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        return [int(pid) for pid in re.findall(r'process_open_fds{pid="(\d+)",role="worker"}', text)]
