"""Real proxies in front of a real API process: the very files of docs/proxies, run as docs/proxies.md says.

Api     one `delineate api` process, and what it says about itself past any proxy
Front   HAProxy or Caddy in front of it
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from delineate.config import Config
from delineate.queue import open_queue
from tests.api.running import Event, Reply, WorkerSide, parse_events
from tests.servers import ServerProcess, answers, free_port, wait_until
from tests.worker.test_worker import worker_process

FILES = Path(__file__).resolve().parent.parent.parent / "docs" / "proxies"
ARGUMENTS = {
    "haproxy": ["-db", "-f", str(FILES / "haproxy.cfg")],
    "caddy": ["run", "--adapter", "caddyfile", "--config", str(FILES / "Caddyfile")],
}
# The API believes these two; a test's client has another address of 127.0.0.0/8, to be somebody.
PROXY, CDN = "127.0.0.1", "127.0.0.9"


class Api:
    def __init__(self, config: Config, folder: Path, **environ: str) -> None:
        self.port, self.log = free_port(), folder / "api.log"
        self._process = worker_process(
            config,
            self.log,
            "api",
            DELINEATE__API__PORT=str(self.port),
            DELINEATE__API__TRUSTED_PROXIES=f"{PROXY}/32,{CDN}/32",
            DELINEATE__RATE_LIMIT__ENABLED="true",
            # A day for 5,000 requests: within a test nothing of what was used comes back.
            DELINEATE__RATE_LIMIT__REQUESTS="5000",
            DELINEATE__RATE_LIMIT__WINDOW="86400",
            DELINEATE__SSE__RETRY="0.2",
            DELINEATE__LOG__LEVEL="info",
            **environ,
        )
        wait_until(lambda: answers(self.port), f"start of the API, see {self.log}")

    def stop(self) -> None:
        """What clients and proxies do to it is no reason to complain."""
        end(self._process)
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        complaints = [line for line in lines if line["level"] not in ("debug", "info")]
        assert not complaints, complaints

    async def open_streams(self) -> int:
        """The gauge active_sse_connections."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/metrics") as answer,
        ):
            text = await answer.text()
        return next(int(float(line.split()[1])) for line in text.splitlines() if line.startswith("active_sse_conn"))


class Front(NamedTuple):
    """`port` is where the proxy listens."""

    name: str
    port: int

    @asynccontextmanager
    async def client(self, address: str = PROXY) -> AsyncIterator[aiohttp.ClientSession]:
        """A client without cookies, which calls from `address` and takes gzip."""
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{self.port}", cookie_jar=aiohttp.DummyCookieJar(), connector=connector
        ) as session:
            yield session

    @asynccontextmanager
    async def stream(self, job_id: str, **headers: str) -> AsyncIterator[AsyncIterator[Event]]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client() as client, client.get(f"/v1/export/{job_id}/progress", headers=sent) as answer:
            assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
            assert "Content-Encoding" not in answer.headers
            yield parse_events(answer)


async def ask(client: aiohttp.ClientSession, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    """`headers` with _ for -."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client.request(method, path, json=body, headers=sent) as answer:
        return Reply(answer.status, answer.headers, await answer.text())


@asynccontextmanager
async def worker_side(config: Config) -> AsyncIterator[WorkerSide]:
    """The test is the worker, and so knows when something happens."""
    async with open_queue(config) as queue:
        yield WorkerSide(queue, f"w-{uuid.uuid4().hex[:8]}")


def find(program: str) -> str:
    """Its path. Skips the test where it is not installed; fails it there if that is CI."""
    # Debian has HAProxy where only root looks.
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        reason = f"{program} is not installed (Debian: apt-get install {program})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@contextmanager
def front(name: str, upstream: int, folder: Path, *, idle: str = "60s", further: str = "") -> Iterator[Front]:
    """A proxy in front of the port `upstream`; `further` is more configuration, for HAProxy."""
    program, port = find(name), free_port()
    environ = {
        "API_ADDRESS": f"127.0.0.1:{upstream}",
        "PROXY_LISTEN": f"127.0.0.1:{port}",
        "PROXY_IDLE": idle,
        "PROXY_TRUSTED": f"{CDN}/32",
        "CADDY_ADMIN": "off",
        # Caddy writes what it knows to disk.
        "XDG_DATA_HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }
    if name == "caddy":
        # HTTP, as with the default; from an address alone Caddy would conclude HTTPS.
        environ["PROXY_LISTEN"] = f"http://127.0.0.1:{port}"
    command = [program, *ARGUMENTS[name]]
    if further:
        (folder / "further.cfg").write_text(further)
        command = [*command, "-f", str(folder / "further.cfg")]
    server = ServerProcess(command, port, folder / f"{name}-{port}.log", environ)
    server.start()
    try:
        yield Front(name, port)
    finally:
        server.kill()


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
        raise


async def ended(events: AsyncIterator[Event], seconds: float = 10) -> list[Event]:
    """All that a stream still brings, until it ends or is cut."""
    found = []
    async with asyncio.timeout(seconds):
        try:
            async for event in events:
                found.append(event)  # noqa: PERF401 - what came before a cut counts
        except aiohttp.ClientPayloadError:
            pass  # a proxy that speaks in chunks cannot cut without being noticed
    return found
