"""The whole service as real processes, and the clients that hold it to its promises.

Service     own Valkey, own S3 server, API and worker processes as an operator runs them
Exporter    asks for exports without pause and remembers what it was told
Follower    an EventSource: follows a job's stream, and comes back with Last-Event-ID when it ends
Health      polls /health and knows what it said when
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import redis.exceptions
from redis.asyncio import Redis

from delineate.config import Config, load_config
from delineate.embedded import redis_command, s3_command, s3_environment
from delineate.queue.keys import Keys
from tests.api.running import Event, parse_events
from tests.conftest import CONF
from tests.servers import ACCESS_KEY, SECRET_KEY, ServerProcess, free_port, wait_until
from tests.worker.test_worker import content, worker_process

replace = msgspec.structs.replace
CPU_TICKS = os.sysconf("SC_CLK_TCK")
# One PUT, and three parts.
FILES = {70_000: 1_000, 70_001: 12_000_000}


class Service:
    """Started once for several tests. `redis_port` is where the processes look for Redis: a proxy's, perhaps."""

    def __init__(self, folder: Path, *, proxied_port: int | None = None, **environ: str) -> None:
        self.folder = folder
        self.redis_folder = folder / "redis"
        self.redis_folder.mkdir()
        self.on_tmpfs = self._mount_tmpfs()
        port, s3_port = free_port(), free_port()
        # The embedded profile's command: a SIGKILL of Redis loses nothing that was answered, only the machine's can.
        self.redis = ServerProcess(redis_command(self.redis_folder, port), port, folder / "redis.log")
        for bucket in ("files", "archives"):
            (folder / "s3" / bucket).mkdir(parents=True)
        for file_id, size in FILES.items():
            (folder / "s3" / "files" / str(file_id)).write_bytes(content(file_id, size))
        keys = s3_environment(ACCESS_KEY, SECRET_KEY)
        self.s3 = ServerProcess(s3_command(folder / "s3", s3_port), s3_port, folder / "s3.log", keys)
        self.config = self._config(proxied_port or port, s3_port)
        self.keys = Keys(self.config.redis.prefix)
        self.api_port = free_port()
        self.url = f"http://127.0.0.1:{self.api_port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environ = {
            "DELINEATE__LOG__LEVEL": "info",
            "DELINEATE__API__PORT": str(self.api_port),
            # The values that the shipped configuration has: /health is measured with them.
            "DELINEATE__QUEUE__HEARTBEAT": "1",
            "DELINEATE__QUEUE__DEAD_AFTER": "3",
            "DELINEATE__ARCHIVE__PART_BYTES": "5242880",
            "DELINEATE__WORKER__CONCURRENCY": "6",
            "DELINEATE__WORKER__DRAIN_TIMEOUT": "1",
            # Long enough that an outage finds jobs in the middle.
            "DELINEATE__PROCESSING__SIMULATED_DELAY__ENABLED": "true",
            "DELINEATE__PROCESSING__SIMULATED_DELAY__MIN": "0.5",
            "DELINEATE__PROCESSING__SIMULATED_DELAY__MAX": "2",
            **environ,
        }

    def _mount_tmpfs(self) -> bool:
        """Give Redis a disk of its own, small enough to be filled; needs root."""
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(self.redis_folder)]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    @staticmethod
    def _config(redis_port: int, s3_port: int) -> Config:
        loaded = load_config({"DELINEATE_ENV": "test"}, CONF)
        return replace(
            loaded,
            redis=replace(loaded.redis, url=f"redis://127.0.0.1:{redis_port}/0"),
            storage=replace(
                loaded.storage,
                endpoint_url=f"http://127.0.0.1:{s3_port}",
                access_key_id=ACCESS_KEY,
                secret_access_key=SECRET_KEY,
            ),
        )

    def start(self) -> None:
        self.redis.start()
        self.s3.start()
        for name in ("api0", "api1", "worker0", "worker1"):
            self.launch(name)
        self.wait_healthy()

    def launch(self, name: str) -> None:
        """Start an API process or a worker; its output goes to a log of that name."""
        command = name.rstrip("0123456789")
        self.processes[name] = worker_process(self.config, self.log(name), command, **self._environ)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for server in (self.redis, self.s3):
            if server.process is not None:
                server.process.send_signal(signal.SIGCONT)
        for name in list(self.processes):
            self.kill(name)
        self.redis.stop()
        self.s3.stop()
        if self.on_tmpfs:
            subprocess.run(["umount", str(self.redis_folder)], check=True)

    def wait_healthy(self) -> None:
        def healthy() -> bool:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)  # noqa: S310
            return False

        wait_until(healthy, "a healthy service", 30)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        for line in self.log(name).read_text().splitlines():
            yield json.loads(line)

    def complaints(self) -> Counter[str]:
        """How many warnings and errors each process has logged."""
        return Counter(
            {
                name: sum(line["level"] in ("warning", "error", "critical") for line in self.lines(name))
                for name in self.processes
            }
        )

    def cpu_seconds(self) -> Counter[str]:
        """Time on the processor of each process, since its start."""
        used: Counter[str] = Counter()
        for name, process in self.processes.items():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            used[name] = (int(fields[11]) + int(fields[12])) / CPU_TICKS  # type: ignore[assignment]
        return used

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        """Redis itself, past any proxy."""
        async with Redis(port=self.redis.port, decode_responses=True) as client:
            yield client

    async def records(self) -> dict[str, dict[str, str]]:
        """Every job's hash, by id; tombstones of refused requests are not jobs."""
        found = {}
        async with self.client() as client:
            async for key in client.scan_iter(f"{self.keys.base}job:*", count=1000):
                if not key.endswith(":parts"):
                    fields: dict[Any, Any] = await client.hgetall(key)
                    if fields and fields["status"] != "withdrawn":
                        found[key.rpartition(":")[2]] = fields
        return found

    async def left_over(self) -> Counter[str]:
        """What the queue's lists still hold."""
        async with self.client() as client:
            left = Counter(wait=await client.llen(self.keys.wait), delayed=await client.zcard(self.keys.delayed))
            async for key in client.scan_iter(f"{self.keys.base}queue:active:*", count=1000):
                left[key] = await client.llen(key)
            return +left


@asynccontextmanager
async def http(service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    # A new connection for each request, so that every API process gets its share.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(service.url, cookie_jar=aiohttp.DummyCookieJar(), connector=connector) as session:
        yield session


def check_refusal(status: int, headers: Any, text: str) -> None:
    """A 503 as the contract has it."""
    document = json.loads(text)
    assert (status, document["code"]) == (503, "queue_unavailable"), (status, text)
    assert document["error"] == "Service Unavailable"
    assert document["requestId"] == headers["X-Request-ID"]
    assert int(headers["Retry-After"]) >= 1


class Exporter:
    """Asks for exports; `accepted` are job ids, `refused` the request ids of those that were answered 503."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.accepted: list[str] = []
        self.refused: list[str] = []
        self.slowest = 0.0

    async def export(self) -> str | None:
        """The job's id, or None if the service said 503. Any other answer fails the test."""
        request_id = str(uuid.uuid4())
        started = time.monotonic()
        body = {"file_ids": list(FILES)}
        async with self._session.post("/v1/export", json=body, headers={"X-Request-ID": request_id}) as answer:
            text = await answer.text()
        self.slowest = max(self.slowest, time.monotonic() - started)
        if answer.status == 200:
            job_id: str = json.loads(text)["jobId"]
            self.accepted.append(job_id)
            return job_id
        check_refusal(answer.status, answer.headers, text)
        self.refused.append(request_id)
        return None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Export without pause while the block runs."""
        stop = asyncio.Event()

        async def export_until_stopped() -> None:
            while not stop.is_set():
                await self.export()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.2)

        task = asyncio.create_task(export_until_stopped())
        try:
            yield
        finally:
            stop.set()
            await task


class Follower:
    """Follows one job to its end; `connections` counts how often it had to connect, `events` what it was shown."""

    def __init__(self, session: aiohttp.ClientSession, job_id: str) -> None:
        self._session = session
        self.job_id = job_id
        self.events: list[Event] = []
        self.connections = 0
        self.gone = False
        self.task = asyncio.create_task(self._follow())

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None

    @property
    def ended(self) -> bool:
        return self.last is not None and self.last.name in ("completed", "failed", "cancelled")

    async def _follow(self) -> None:
        retry_ms = 2000
        while not self.ended:
            headers = {"Last-Event-ID": self.last.id} if self.last else {}
            self.connections += 1
            timeout = aiohttp.ClientTimeout(total=None)
            path = f"/v1/export/{self.job_id}/progress"
            with contextlib.suppress(aiohttp.ClientError):
                async with self._session.get(path, headers=headers, timeout=timeout) as answer:
                    if answer.status in (204, 404):
                        self.gone = answer.status == 404
                        return
                    if answer.status == 200:
                        async for event in parse_events(answer):
                            if event.name == "retry":
                                retry_ms = event.data
                            elif event.name != "heartbeat":
                                self.events.append(event)
            if not self.ended:
                await asyncio.sleep(retry_ms / 1000)


class Health:
    """What /health said, polled four times a second."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.answers: list[tuple[float, int, dict[str, str]]] = []
        self._task = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        while True:
            async with self._session.get("/health") as answer:
                document = await answer.json()
            self.answers.append((time.monotonic(), answer.status, document["checks"]))
            await asyncio.sleep(0.25)

    async def says(self, within: float = 5.0, **checks: str) -> float:
        """Seconds until it says that, and nothing else for half a second; without `checks` that all is well.

        Fails the test if it takes longer than `within`. Each process has its own view, hence the half second.
        """
        started, status = time.monotonic(), 503 if checks else 200
        while True:
            assert not self._task.done(), self._task.exception()
            await asyncio.sleep(0.05)
            since = started
            for at, said, document in self.answers:
                if said != status or not checks.items() <= document.items():
                    since = max(since, at)
            assert since - started < within, f"after {within} s /health says {self.answers[-1]}, not {checks}"
            if self.answers[-1][0] - since > 0.5:
                return since - started

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Wait for a condition, plain or async."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                found = await found
        if found:
            return
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        await asyncio.sleep(0.05)
